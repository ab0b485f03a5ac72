"""Measure 9, transfer: what runs and baselines, as they are, do on a second data set of the same model (`--transfer`).

    transfer fvu                 as fvu, with the mean of the second set
    transfer dead                share of the latents that fire on no judged token of it
    transfer k-sparse accuracy   as k-sparse accuracy, if its images have labels: ranking and probes are of its own

Each stands by itself, because a mean of unlike numbers hides their signs. Nothing is trained again: PCA, raw dimensions
and k-means are those that were fitted on the choosing images of the first set. Images of the second set that a run has
learned from, or that baselines were fitted on, are not judged.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from actcache import PipelineError
from actcache.artifacts import Artifact
from actcache.seen import LearnedImages, SeenImages
from actcache.store import StoreGroup
from analysis.benchmark import reconstruction, sparse_probing
from analysis.benchmark.judging import choose_judged
from analysis.benchmark.measured import Measured, Skipped
from analysis.benchmark.patch_probe import NAME as PROBE
from analysis.benchmark.subject import Judged, Subject
from analysis.benchmark.work import Workshop
from analysis.config import StudyConfig

NAME = "transfer"
MEASURES = ("fvu", "dead", sparse_probing.NAME)
"""What is reported of the second set, under its name there."""


@dataclass(frozen=True)
class Transfer:
    """The second data set. `seen`: how many of its images were learned from."""

    judged: Judged
    seen: SeenImages


def name_transfer(store: StoreGroup | None) -> dict[str, Artifact]:
    """The second data set as parents of a result: transfer store, transfer store 2, ..."""
    members = () if store is None else store.stores
    return {f"transfer store {i}" if i > 1 else "transfer store": each.artifact for i, each in enumerate(members, 1)}


def open_transfer(store: StoreGroup | None, shop: Workshop, config: StudyConfig) -> Transfer | Skipped:
    """Choose the images of the second data set.

    Args:
        config: `where` speaks of the images of the first set, and does not hold for these.

    Returns:
        Why there is none to judge: no store was given, it is one of the first, or of another model.
    """
    first = shop.judged
    if store is None:
        return Skipped(NAME, "no second data set was given; extract one with the same model, and name it by --transfer")
    if {each.store_id for each in store.stores} & {each.store_id for each in first.store.stores}:
        return Skipped(NAME, f"--transfer {store.path} is the store that is judged itself; give another data set")
    fitted = LearnedImages.of("baselines", first.store.images, first.choosing)
    try:
        for run in shop.runs:
            run.check_store(store)
        judged, counted = choose_judged(shop.runs, store, replace(config, where=None), learned=[fitted])
    except PipelineError as error:
        return Skipped(NAME, " ".join(f"--transfer: {error}".split()))
    return Transfer(judged, counted)


def measure_transfer(
    subject: Subject, transfer: Transfer | Skipped, shop: Workshop, on_progress: Callable[[int, int], None]
) -> list[Measured | Skipped]:
    """Encode the second data set, and measure it there."""
    if isinstance(transfer, Skipped):
        return [transfer]
    judged = transfer.judged
    there = replace(subject, codes=shop.encode_elsewhere(subject, judged.store))
    found = reconstruction.measure_reconstruction(there, judged, Skipped(PROBE, ""), on_progress)
    found += sparse_probing.measure_sparse_probing(there, judged, on_progress)
    about = {"store": judged.store.path.name, "n_judged": len(judged.images), "n_choosing": len(judged.choosing)}
    return [_rename(each, about) for each in found if each.name in MEASURES]


def _rename(found: Measured | Skipped, about: dict[str, object]) -> Measured | Skipped:
    name = f"{NAME} {found.name}"
    if isinstance(found, Skipped):
        return replace(found, name=name)
    return replace(found, name=name, details={**about, **found.details})
