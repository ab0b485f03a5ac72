"""The formats of other packages: what reads, computes and writes each."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from actcache import HookPoint, SettingsError
from saetrain.interop import (
    clipscope,
    dictionary_learning,
    discover_then_name,
    formulas,
    msae,
    overcomplete,
    patchsae,
    prisma,
    saelens,
    saelens_pickle,
    saev,
    sparsify,
    universal_sae,
    visaebench,
)
from saetrain.interop.formulas.forward import Forward
from saetrain.interop.recognition import recognize
from saetrain.model import SAE

Writer = Callable[[SAE, HookPoint], dict[str, bytes]]
"""SAE, hook point -> the bytes of each file, by its name."""


@dataclass(frozen=True)
class Format:
    """One format: `read` makes an SAE of ours from its files, and `load` what its own package computes from them.

    `write` is None for a format that is only read. `remark` tells what a user has to know of a file that was read, one
    sentence each.
    """

    read: Callable[[Path], SAE]
    load: Callable[[Path], Forward]
    write: Writer | None = None
    remark: Callable[[Path], tuple[str, ...]] | None = None


@dataclass(frozen=True)
class Foreign:
    """A checkpoint: `sae` is our version of it, and `forward` computes what its own package would.

    Attributes:
        notes: sentences on what was not in its files and on how it is meant.
    """

    format: str
    sae: SAE
    forward: Forward
    notes: tuple[str, ...] = ()


FORMATS = {
    "saelens": Format(saelens.read, formulas.saelens.load, saelens.write),
    "dictionary_learning": Format(
        dictionary_learning.read, formulas.dictionary_learning.load, dictionary_learning.write
    ),
    "sparsify": Format(sparsify.read, formulas.sparsify.load, sparsify.write),
    "saev": Format(saev.read, formulas.saev.load, saev.write),
    "prisma": Format(prisma.read, formulas.prisma.load, prisma.write),
    "patchsae": Format(patchsae.read, formulas.patchsae.load, patchsae.write),
    "overcomplete": Format(overcomplete.read, formulas.overcomplete.load, remark=overcomplete.remark),
    "visaebench": Format(visaebench.read, formulas.visaebench.load, remark=overcomplete.remark),
    "clipscope": Format(clipscope.read, formulas.clipscope.load, remark=clipscope.remark),
    "universal_sae": Format(universal_sae.read, formulas.universal_sae.load, remark=universal_sae.remark),
    "msae": Format(msae.read, formulas.msae.load, remark=msae.remark),
    "discover_then_name": Format(discover_then_name.read, formulas.discover_then_name.load),
    "saelens_pickle": Format(saelens_pickle.read, formulas.saelens_pickle.load),
}


def read_foreign(path: Path) -> Foreign:
    """Read a checkpoint of any known format. Raises SettingsError, CorruptError."""
    name, path = recognize(path)
    remark = FORMATS[name].remark
    return Foreign(name, FORMATS[name].read(path), FORMATS[name].load(path), notes=remark(path) if remark else ())


def find_writer(to: str) -> Writer:
    """What writes an SAE in a format. Raises SettingsError for a format that is only read, or unknown."""
    if to in FORMATS and (write := FORMATS[to].write):
        return write
    written = ", ".join(name for name, each in FORMATS.items() if each.write)
    raise SettingsError(f"--to must be one of {written}, got {to!r}.")
