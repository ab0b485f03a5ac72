"""The formats of other packages: what reads, computes and writes each, and how a checkpoint is recognized."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from actcache import HookPoint, SettingsError
from saetrain.interop import (
    dictionary_learning,
    formulas,
    lasgroup,
    overcomplete,
    patchsae,
    prisma,
    ra_sae,
    saelens,
    saev,
    sparsify,
)
from saetrain.interop.constants import InputConstants, Lacking, Statistics, fold_constants, normalize_input
from saetrain.interop.files import load_tensors
from saetrain.interop.formulas.forward import Forward
from saetrain.model import SAE

Writer = Callable[[SAE, HookPoint], dict[str, bytes]]
"""SAE, hook point -> the bytes of each file, by its name."""


@dataclass(frozen=True)
class Format:
    """One format: `read` makes an SAE of ours from its files, and `load` what its own package computes from them.

    `write` is None for a format that is only read. `lacking` tells of a file whether its package normalizes the input
    by constants that lie in no file; `read` and `load` then work on the normalized input.
    """

    read: Callable[[Path], SAE]
    load: Callable[[Path], Forward]
    write: Writer | None = None
    lacking: Lacking | None = None


@dataclass(frozen=True)
class Foreign:
    """A checkpoint: `sae` is our version of it, and `forward` computes what its own package would.

    Attributes:
        statistics: by which the package normalizes its input, if these constants lie in no file.
        constants: those of the input that `sae` and `forward` contain, beside what the file says.
    """

    format: str
    sae: SAE
    forward: Forward
    statistics: Statistics | None = None
    constants: InputConstants | None = None

    @property
    def lacks_constants(self) -> bool:
        """Whether `sae` and `forward` still work on an input that is normalized by constants that are not known.

        `with_constants` supplies them; until then, what the SAE says of activations is meaningless.
        """
        return self.statistics is not None and self.constants is None

    def with_constants(self, constants: InputConstants) -> "Foreign":
        """The same checkpoint on activations that are not normalized yet. Raises SettingsError as `fold_constants`."""
        forward = normalize_input(self.forward, constants)
        return replace(self, sae=fold_constants(self.sae, constants), forward=forward, constants=constants)


FORMATS = {
    "saelens": Format(saelens.read, formulas.saelens.load, saelens.write),
    "dictionary_learning": Format(
        dictionary_learning.read, formulas.dictionary_learning.load, dictionary_learning.write
    ),
    "sparsify": Format(sparsify.read, formulas.sparsify.load, sparsify.write),
    "saev": Format(saev.read, formulas.saev.load, saev.write, saev.lacking),
    "prisma": Format(prisma.read, formulas.prisma.load, prisma.write),
    "patchsae": Format(patchsae.read, formulas.patchsae.load, patchsae.write),
    "overcomplete": Format(overcomplete.read, formulas.overcomplete.load),
    "ra_sae": Format(ra_sae.read, formulas.ra_sae.load),
    "lasgroup": Format(lasgroup.read, formulas.lasgroup.load),
}
FOLDERS = {
    saelens.WEIGHTS: "saelens", dictionary_learning.WEIGHTS: "dictionary_learning", sparsify.WEIGHTS: "sparsify",
    saev.WEIGHTS: "saev", prisma.WEIGHTS: "prisma", lasgroup.WEIGHTS: "lasgroup",
}  # fmt: skip
"""The file by which a folder is recognized -> its format."""


def read_foreign(path: Path, constants: InputConstants | None = None) -> Foreign:
    """Read a checkpoint of any known format. Raises SettingsError, CorruptError.

    Args:
        constants: the normalization of its input, where the user gives it. Without it, look at `lacks_constants`.
    """
    name, path = _recognize(path)
    format_ = FORMATS[name]
    statistics = format_.lacking(path) if format_.lacking else None
    foreign = Foreign(name, format_.read(path), format_.load(path), statistics)
    return foreign if constants is None else foreign.with_constants(constants)


def find_writer(to: str) -> Writer:
    """What writes an SAE in a format. Raises SettingsError for a format that is only read, or unknown."""
    if to in FORMATS and (write := FORMATS[to].write):
        return write
    written = ", ".join(name for name, each in FORMATS.items() if each.write)
    raise SettingsError(f"--to must be one of {written}, got {to!r}.")


def _recognize(path: Path) -> tuple[str, Path]:
    """(format, the path that its reader takes)."""
    if (module := ra_sae.find(path)) is not None:
        return "ra_sae", module
    if path.is_file():
        with open(path, "rb") as file:
            first = file.read(1)
        return ("saev" if first == b"{" else _recognize_file(path)), path
    for weights, name in FOLDERS.items():
        if (path / weights).is_file():
            with open(path / weights, "rb") as file:  # saev and overcomplete share a name
                return ("overcomplete" if name == "saev" and file.read(1) != b"{" else name), path
    if (path / patchsae.WEIGHTS).is_file():
        return _recognize_file(path / patchsae.WEIGHTS), path / patchsae.WEIGHTS
    raise SettingsError(
        f"{path} is not a known kind of checkpoint. Give a folder with {saelens.WEIGHTS} (SAELens), "
        f"{dictionary_learning.WEIGHTS} (dictionary_learning), {sparsify.WEIGHTS} (sparsify) or {saev.WEIGHTS} (saev, "
        "overcomplete), or a .pt file (PatchSAE, ViT-Prisma)."
    )


def _recognize_file(path: Path) -> str:
    """PatchSAE or ViT-Prisma: only the latter's settings name an architecture, or lie beside the file."""
    content = load_tensors(path)
    inside = "cfg" in content or "config" in content
    beside = not inside and (path.parent / prisma.CONFIG).is_file()
    return "prisma" if beside or "architecture" in prisma.config_of(content) else "patchsae"
