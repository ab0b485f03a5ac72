"""The formats of other packages: what reads, computes and writes each."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from actcache import HookPoint, SettingsError
from saetrain.interop import (
    clipscope,
    dictionary_learning,
    discover_then_name,
    formulas,
    lasgroup,
    msae,
    overcomplete,
    patchsae,
    prisma,
    publication,
    ra_sae,
    saelens,
    saelens_pickle,
    saev,
    sparsify,
    universal_sae,
    visaebench,
)
from saetrain.interop.constants import InputConstants, Lacking, Statistics, fold_constants, normalize_input
from saetrain.interop.formulas.forward import Forward
from saetrain.interop.recognition import recognize
from saetrain.model import SAE

Writer = Callable[[SAE, HookPoint], dict[str, bytes]]
"""SAE, hook point -> the bytes of each file, by its name."""


@dataclass(frozen=True)
class Format:
    """One format: `read` makes an SAE of ours from its files, and `load` what its own package computes from them.

    `write` is None for a format that is only read. `lacking` tells of a file whether its package normalizes the input
    by constants that lie in no file; `read` and `load` then work on the normalized input. `remark` tells what a user
    has to know of a file that was read, one sentence each.
    """

    read: Callable[[Path], SAE]
    load: Callable[[Path], Forward]
    write: Writer | None = None
    lacking: Lacking | None = None
    remark: Callable[[Path], tuple[str, ...]] | None = None


@dataclass(frozen=True)
class Foreign:
    """A checkpoint: `sae` is our version of it, and `forward` computes what its own package would.

    Attributes:
        path: the folder or file that its reader took.
        load: makes `forward`, which nobody may need.
        statistics: by which the package normalizes its input, if these constants lie in no file.
        constants: those of the input that `sae` and `forward` contain, beside what the file says.
        notes: sentences on what was not in its files and on how it is meant.
    """

    format: str
    path: Path
    sae: SAE
    load: Callable[[], Forward]
    statistics: Statistics | None = None
    constants: InputConstants | None = None
    notes: tuple[str, ...] = ()

    @cached_property
    def forward(self) -> Forward:
        return self.load()

    @property
    def lacks_constants(self) -> bool:
        """Whether `sae` and `forward` still work on an input that is normalized by constants that are not known.

        `with_constants` supplies them; until then, what the SAE says of activations is meaningless.
        """
        return self.statistics is not None and self.constants is None

    def with_constants(self, constants: InputConstants) -> "Foreign":
        """The same checkpoint on activations that are not normalized yet. Raises SettingsError as `fold_constants`."""

        def load() -> Forward:
            return normalize_input(self.forward, constants)

        return replace(self, sae=fold_constants(self.sae, constants), load=load, constants=constants)


FORMATS = {
    "saelens": Format(saelens.read, formulas.saelens.load, saelens.write),
    "dictionary_learning": Format(
        dictionary_learning.read,
        formulas.dictionary_learning.load,
        dictionary_learning.write,
        remark=dictionary_learning.remark,
    ),
    "sparsify": Format(sparsify.read, formulas.sparsify.load, sparsify.write),
    "saev": Format(saev.read, formulas.saev.load, saev.write, saev.lacking),
    "prisma": Format(prisma.read, formulas.prisma.load, prisma.write),
    "patchsae": Format(patchsae.read, formulas.patchsae.load, patchsae.write),
    "overcomplete": Format(
        overcomplete.read, formulas.overcomplete.load, lacking=overcomplete.lacking, remark=overcomplete.remark
    ),
    "visaebench": Format(
        visaebench.read, formulas.visaebench.load, lacking=visaebench.lacking, remark=overcomplete.remark
    ),
    "clipscope": Format(clipscope.read, formulas.clipscope.load, remark=clipscope.remark),
    "universal_sae": Format(
        universal_sae.read, formulas.universal_sae.load, lacking=universal_sae.lacking, remark=universal_sae.remark
    ),
    "msae": Format(msae.read, formulas.msae.load, remark=msae.remark),
    "discover_then_name": Format(discover_then_name.read, formulas.discover_then_name.load),
    "saelens_pickle": Format(saelens_pickle.read, formulas.saelens_pickle.load),
    "ra_sae": Format(ra_sae.read, formulas.ra_sae.load),
    "lasgroup": Format(lasgroup.read, formulas.lasgroup.load),
    "published": Format(publication.read, formulas.publication.load),
}


def read_foreign(path: Path, constants: InputConstants | None = None) -> Foreign:
    """Read a checkpoint of any known format. Raises SettingsError, CorruptError.

    Args:
        constants: the normalization of its input, where the user gives it. Without it, look at `lacks_constants`.
    """
    name, path = recognize(path)
    format_ = FORMATS[name]
    statistics = format_.lacking(path) if format_.lacking else None
    notes = format_.remark(path) if format_.remark else ()
    foreign = Foreign(name, path, format_.read(path), partial(format_.load, path), statistics, notes=notes)
    return foreign if constants is None else foreign.with_constants(constants)


def find_writer(to: str) -> Writer:
    """What writes an SAE in a format. Raises SettingsError for a format that is only read, or unknown."""
    if to in FORMATS and (write := FORMATS[to].write):
        return write
    written = ", ".join(name for name, each in FORMATS.items() if each.write)
    raise SettingsError(f"--to must be one of {written}, got {to!r}.")
