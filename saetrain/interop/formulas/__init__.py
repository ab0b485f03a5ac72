"""What each package computes from its own files: the foreign side of a parity report.

Every module defines `load(path) -> Forward`. It takes raw tensors and settings from the files, names and orients them
as the package does, and knows nothing of our readers, so that a field that a reader misreads shows as a difference.
Files reach this place only after a reader has accepted them.
"""

from saetrain.interop.formulas import (
    clipscope,
    dictionary_learning,
    discover_then_name,
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

__all__ = [
    "clipscope", "dictionary_learning", "discover_then_name", "lasgroup", "msae", "overcomplete", "patchsae", "prisma",
    "publication", "ra_sae", "saelens", "saelens_pickle", "saev", "sparsify", "universal_sae", "visaebench",
]  # fmt: skip
