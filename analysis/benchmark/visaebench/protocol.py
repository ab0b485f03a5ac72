"""measure_visaebench(): the seven metrics of one subject, or the reasons for which some cannot be taken.

What the package calls mean and std are the run's own: the SAE reads what it was trained on. The package takes them from
the images that it evaluates on; to have its numbers, give it those of the run.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from actcache import PipelineError, SettingsError, open_stores
from actcache.store import StoreGroup
from analysis.benchmark.measured import Measured, Skipped
from analysis.benchmark.subject import Subject
from analysis.benchmark.visaebench import absorption, cross_domain, decoding, localization, monosemanticity
from analysis.benchmark.visaebench import sparse_probing as probing
from analysis.benchmark.visaebench.hierarchy import number_groups, read_hierarchy
from analysis.benchmark.visaebench.images import ProtocolImages
from analysis.benchmark.visaebench.pairs import Columns, Take, Totals, read_pairs, sum_pairs
from analysis.config import BenchmarkConfig
from saetrain import CodeStore, Run

NAMES = (
    localization.NAME, decoding.FVU, decoding.PRESERVED, probing.NAME, monosemanticity.NAME, cross_domain.NAME,
    absorption.NAME,
)  # fmt: skip
DEFECTS = {
    localization.NAME: "without coherence it is -1 / (P - 1), not 0, and a few active patches spread widely around it",
    decoding.FVU: "the mean term is divided by tokens, not by elements, so the value is too low",
    decoding.PRESERVED: "the probe is trained and judged on the same data set, with a fixed penalty",
    probing.NAME: "latents are ranked on the test images, too, and half of the area lies between k = 50 and 100",
    monosemanticity.NAME: "16 images of each latent, embeddings that are not centered, and no null to compare with",
    cross_domain.NAME: "the mean of four numbers that do not belong together",
    absorption.NAME: "F1 is taken on the images that the probe was fitted on, and no latent that fails is looked for",
}
"""What is known to be wrong with each metric. It is computed so nevertheless."""
NO_INTERVAL = "visaebench has no intervals"

Encode = Callable[[Subject, StoreGroup], CodeStore]
"""(a subject, other activations) -> its codes of these."""


@dataclass(frozen=True)
class Protocol:
    """What the metrics are given; a text says why something is missing.

    Attributes:
        groups: name -> (numbers of the classes, depth).
    """

    images: ProtocolImages
    groups: dict[str, tuple[tuple[int, ...], int]] | str
    transfer: ProtocolImages | str
    embeddings: StoreGroup | str


def open_protocol(store: StoreGroup, run: Run, config: BenchmarkConfig) -> Protocol:
    """What the configuration gives. Raises SettingsError where the hierarchy is not a file of groups."""
    images = ProtocolImages.of(store)
    groups: dict[str, tuple[tuple[int, ...], int]] | str = "give groups of sibling classes with --hierarchy"
    if config.hierarchy is not None:
        found = read_hierarchy(config.hierarchy)
        try:
            groups = number_groups(found, images.names)
        except SettingsError as error:
            groups = str(error)
    return Protocol(images, groups, _open_transfer(run, config), _open_embeddings(store, config))


def _open_transfer(run: Run, config: BenchmarkConfig) -> ProtocolImages | str:
    if config.transfer is None:
        return "give activations of another data set with --transfer"
    try:
        other = open_stores(config.transfer)
        run.check_store(other)
        other.hook_point(run.hook_point)
        return ProtocolImages.of(other)
    except PipelineError as error:
        return f"--transfer: {error}"


def _open_embeddings(store: StoreGroup, config: BenchmarkConfig) -> StoreGroup | str:
    if config.embeddings is None:
        return "give activations of the same images by another model with --embeddings"
    try:
        other = open_stores(config.embeddings)
        other.hook_point(None)
    except PipelineError as error:
        return f"--embeddings: {error}"
    if other.rows_id != store.rows_id:
        return (
            f"--embeddings {other.path.name} holds other images than {store.path.name}, or in another order; extract "
            "it from the same images, with the same --seed and --limit"
        )
    return other


def measure_visaebench(
    subject: Subject, protocol: Protocol, encode: Encode, on_progress: Callable[[int, int], None]
) -> list[Measured | Skipped]:
    """The seven metrics, in the package's order.

    Args:
        encode: makes the codes of the second data set.
        on_progress: called with (images done, in all) of each pass over activations, and with tests of absorption.
    """
    if importlib.util.find_spec("sklearn") is None:
        return [Skipped(name, "it needs the package scikit-learn: pip install 'patchsae[quality]'") for name in NAMES]
    images, codes = protocol.images, subject.codes
    if codes.tokens == "cls":
        return [Skipped(name, "visaebench reads patches, and only CLS is encoded; give a run on patches")
                for name in NAMES]  # fmt: skip
    found: dict[str, Measured | str] = {}
    try:
        _, test = images.split
        labels = ""
    except SettingsError as error:
        test, labels = np.empty(0, np.int64), str(error)
    index = images.classes[1] if images.labels is not None else np.zeros(len(images), np.int64)
    totals = sum_pairs(codes, images, index, int(index.max(initial=0)) + 1)
    found[localization.NAME] = localization.measure_localization(codes, images, totals)

    takers: list[tuple[NDArray[np.int64], Take]] = []
    columns = top = None
    tests: list[absorption.Test] = []
    if not labels:
        best = probing.choose_best(totals, max(probing.GRID))
        columns = Columns(best, np.arange(len(images)), codes.n_latents, len(images))
        takers.append((columns.latents, columns.add))
    if not isinstance(protocol.embeddings, str):
        top = monosemanticity.TopImages(monosemanticity.choose_alive(totals), codes.n_latents)
        takers.append((top.latents, top.add))
    if images.labels is not None and not isinstance(protocol.groups, str):
        tests = absorption.choose_tests(totals, images, protocol.groups)
        takers += [absorption.make_taker(tests, images)] if tests else []
    read_pairs(codes, images, takers)

    decoded = decoding.decode_patches(subject.run, codes, images, np.sort(test), on_progress)
    found[decoding.FVU] = decoding.measure_fvu(decoded)
    found[decoding.PRESERVED] = labels or decoding.measure_preservation(decoded, images)
    found[probing.NAME] = labels if columns is None else probing.measure_probing(columns, images)
    if top is None or isinstance(protocol.embeddings, str):
        found[monosemanticity.NAME] = str(protocol.embeddings)
    else:
        found[monosemanticity.NAME] = monosemanticity.measure_monosemanticity(top, totals, images, protocol.embeddings)
    found[cross_domain.NAME] = _measure_transfer(subject, protocol, totals, encode, on_progress)
    if isinstance(protocol.groups, str) or images.labels is None:
        found[absorption.NAME] = labels if images.labels is None else str(protocol.groups)
    elif not tests:
        found[absorption.NAME] = (
            "no group of --hierarchy has three classes, ten images, and three images of a class and of its siblings"
        )
    else:
        outcomes = absorption.run_tests(tests, on_progress)
        found[absorption.NAME] = absorption.describe_absorption(outcomes, len(protocol.groups))
    return [_finish(name, found[name]) for name in NAMES]


def _measure_transfer(
    subject: Subject, protocol: Protocol, totals: Totals, encode: Encode, on_progress: Callable[[int, int], None]
) -> Measured | str:
    if isinstance(protocol.transfer, str):
        return protocol.transfer
    try:
        protocol.transfer.split  # noqa: B018 (before anything is encoded)
        codes = encode(subject, protocol.transfer.store)
        return cross_domain.measure_cross_domain(subject.run, totals, codes, protocol.transfer, on_progress)
    except PipelineError as error:
        return f"--transfer: {error}"


def _finish(name: str, found: Measured | str) -> Measured | Skipped:
    if isinstance(found, str):
        return Skipped(name, found)
    return replace(found, details={**found.details, "defect": DEFECTS[name], "no_interval": NO_INTERVAL})
