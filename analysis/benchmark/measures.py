"""list_measures(): what is measured of every subject, in the order of the tables.

A measure is a line of this list. What several subjects share (the judge with its model, masks, a second data set) is
opened when the first measure asks for it, and once for all subjects.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from actcache import ActivationStore, open_stores
from analysis.benchmark.absorption import measure_absorption
from analysis.benchmark.attributes import read_attributes
from analysis.benchmark.causal_use import measure_causal_use
from analysis.benchmark.causes import Causes, open_causes
from analysis.benchmark.coherence import measure_coherence
from analysis.benchmark.image_embeddings import ImageEmbeddings, embed_judged
from analysis.benchmark.image_pairs import ImagePairs
from analysis.benchmark.matching import NAME as MATCHING
from analysis.benchmark.matching import Matching, measure_matching
from analysis.benchmark.measured import Measured, Skipped
from analysis.benchmark.monosemanticity import measure_monosemanticity
from analysis.benchmark.patch_concepts import NAME as PATCH_CONCEPTS
from analysis.benchmark.patch_concepts import measure_patch_concepts
from analysis.benchmark.patch_labels import LabeledPatches, read_patch_labels
from analysis.benchmark.patch_probe import PatchProbe, fit_patch_probe
from analysis.benchmark.reconstruction import measure_reconstruction
from analysis.benchmark.sparse_probing import measure_sparse_probing
from analysis.benchmark.stability import Stability, find_partners
from analysis.benchmark.subject import Judged, Subject
from analysis.benchmark.task import Task, measure_task, open_task
from analysis.benchmark.transfer import Transfer, measure_transfer, open_transfer
from analysis.benchmark.visaebench.protocol import Protocol, measure_visaebench, open_protocol
from analysis.benchmark.work import Workshop
from analysis.config import BenchmarkConfig, ModelOptions, StudyConfig
from analysis.lineage import open_same_images
from analysis.results import BenchmarkSubject, BenchmarkTable

Show = Callable[[int, int], None]


class Measure(NamedTuple):
    """A measure that is taken of every subject, and the table in which it stands. `what`: its name in the progress."""

    table: BenchmarkTable
    what: str
    take: Callable[[Subject, Show], list[Measured | Skipped]]


@dataclass
class Bench:
    """What the measures are taken with. Each property is opened on first use, and says why where it cannot be."""

    judged: Judged
    shop: Workshop
    subjects: Sequence[Subject]
    described: Sequence[BenchmarkSubject]
    pairs: ImagePairs | Skipped
    config: BenchmarkConfig
    study: StudyConfig
    model: ModelOptions

    def _show(self, what: str) -> Show:
        return lambda done, total: self.shop.report(what, done, total)

    @cached_property
    def probe(self) -> PatchProbe | Skipped:
        return fit_patch_probe(self.judged, self.shop.runs[0].hook_point, self.shop.tokens)

    @cached_property
    def task(self) -> Task | Skipped:
        return open_task(self.judged, self.shop.runs[0], self.study, self.model, self._show("run the model"))

    @cached_property
    def causes(self) -> Causes | Skipped:
        return open_causes(self.task, self.judged, self.shop.runs[0], self._show("steer by class means"))

    @cached_property
    def labels(self) -> LabeledPatches | Skipped:
        codes = self.subjects[0].codes
        return read_patch_labels(codes, self.judged, self.config, PATCH_CONCEPTS, self._show("read masks"))

    @cached_property
    def matching(self) -> Matching:
        untrained = {each.of: each for each in self.subjects if each.of is not None}
        return Matching(self.judged, read_attributes(self.judged, self.labels, MATCHING), untrained, self.pairs)

    @cached_property
    def embeddings(self) -> ImageEmbeddings | Skipped:
        given, how = self.config.embeddings, self.model
        other = None if given is None else open_same_images(self.judged.store, given, flag="--embeddings")
        return embed_judged(
            other, self.judged, self.shop.folder, device=how.device, batch_size=how.batch_size,
            on_progress=self._show("embed"),
        )  # fmt: skip

    @cached_property
    def stability(self) -> Stability:
        return Stability(self.judged)

    @cached_property
    def other_stores(self) -> list[ActivationStore]:
        """The stores that were given beside the one that is judged."""
        given = [path for path in (self.config.transfer, self.config.embeddings) if path is not None]
        return [store for path in given for store in open_stores(path).stores]

    @cached_property
    def transfer(self) -> Transfer | Skipped:
        other = None if self.config.transfer is None else open_stores(self.config.transfer)
        return open_transfer(other, self.shop, self.study)

    @cached_property
    def protocol(self) -> Protocol:
        return open_protocol(self.judged.store, self.shop.runs[0], self.config)


def list_measures(bench: Bench) -> list[Measure]:
    """The measures, in the order in which the tables show them."""
    judged, shop = bench.judged, bench.shop
    measures = [
        Measure("reconstruction", "decode", lambda s, show: measure_reconstruction(s, judged, bench.probe, show)),
        Measure("reconstruction", "run the model with", lambda s, show: measure_task(s, judged, bench.task, show)),
        Measure("labeled", "probe", lambda s, show: measure_sparse_probing(s, judged, show)),
        Measure("labeled", "find concepts with", lambda s, show: measure_patch_concepts(s, judged, bench.labels, show)),
        Measure("labeled", "match attributes with", lambda s, show: measure_matching(s, bench.matching, show)),
        Measure(
            "labeled", "tell siblings apart with",
            lambda s, show: measure_absorption(s, judged, bench.config.hierarchy, show),
        ),
        Measure("unlabeled", "measure the coherence of", lambda s, show: measure_coherence(s, judged, show)),
        Measure(
            "unlabeled", "compare the images of",
            lambda s, show: measure_monosemanticity(s, judged, bench.embeddings, show),
        ),
        Measure(
            "reliability", "match",
            lambda s, show: bench.stability.measure(s, find_partners(s, bench.subjects, bench.described), show),
        ),
        Measure("reliability", "intervene in", lambda s, show: measure_causal_use(s, judged, bench.causes, show)),
        Measure("reliability", "transfer", lambda s, show: measure_transfer(s, bench.transfer, shop, show)),
    ]  # fmt: skip
    if bench.config.protocol is not None:
        measures.append(
            Measure(
                "visaebench", "take visaebench's metrics of",
                lambda s, show: measure_visaebench(s, bench.protocol, shop.encode_elsewhere, show),
            )
        )  # fmt: skip
    return measures
