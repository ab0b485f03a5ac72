"""KeptMeasures: numbers that were measured before an interruption, in the work folder; nothing is measured twice.

A file holds what one measure gave for one subject. Its name is a hash of everything that the numbers depend on: the
settings, the judged and the choosing images, the stores, the subject, its partners and the measure.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from actcache.artifacts import digest, storage_errors, write_atomic
from analysis.benchmark.measured import Measured, Skipped
from analysis.benchmark.measures import Bench, Measure, Show
from analysis.benchmark.subject import Subject
from analysis.benchmark.work import VERSION


@dataclass(frozen=True)
class KeptMeasures:
    """The numbers of a benchmark.

    Attributes:
        folder: the work folder.
        settings: of the result.
        reuse: whether numbers that are there already are taken.
    """

    folder: Path
    bench: Bench
    settings: Mapping[str, object]
    reuse: bool = True

    def take(self, measure: Measure, subject: Subject, show: Show) -> list[Measured | Skipped]:
        """What the measure gives for a subject, from the file if it is there.

        A measure that gave no number at all is tried again: what it lacked may be there now.
        """
        path = self.folder / f"measured-{self._name(measure, subject)}.json"
        if self.reuse and path.exists():
            try:
                return [_read(each) for each in json.loads(path.read_bytes())]
            except (ValueError, TypeError, KeyError):  # it was damaged: it is measured again
                pass
        found = measure.take(subject, show)
        if any(isinstance(each, Measured) for each in found):
            with storage_errors(self.folder):
                write_atomic(path, json.dumps([_write(each) for each in found]).encode())
        return found

    def _name(self, measure: Measure, subject: Subject) -> str:
        groups = {each.name: each.group for each in self.bench.described}
        partners = sorted(each.run.run_id for each in self.bench.subjects if groups[each.name] == groups[subject.name])
        return digest(
            {**self._common, "subject": subject.run.run_id, "codes": subject.codes.artifact.id,
             "partners": partners if groups[subject.name] else [], "measure": [measure.table, measure.what]}
        )  # fmt: skip

    @cached_property
    def _common(self) -> dict[str, object]:
        judged, stores = self.bench.judged, [*self.bench.judged.store.stores, *self.bench.other_stores]
        return {
            "version": VERSION, "settings": dict(self.settings), "stores": [each.store_id for each in stores],
            "judged": digest(judged.images.tolist()), "choosing": digest(judged.choosing.tolist()),
            "resamples": asdict(judged.resamples),
        }  # fmt: skip


def _write(measured: Measured | Skipped) -> dict[str, object]:
    if isinstance(measured, Skipped):
        return dict(vars(measured))
    replicates = None if measured.replicates is None else measured.replicates.tolist()
    return {**vars(measured), "replicates": replicates, "details": dict(measured.details)}


def _read(fields: dict[str, object]) -> Measured | Skipped:
    if "reason" in fields:
        return Skipped(**fields)  # type: ignore[arg-type]
    replicates = fields.pop("replicates")
    return Measured(**fields, replicates=None if replicates is None else np.array(replicates, np.float64))  # type: ignore[arg-type]
