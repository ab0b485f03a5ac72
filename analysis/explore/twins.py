"""The twin of a latent in another run, which is the latent whose decoder row is most similar, where an `inspect` result
names both runs; and how stable all latents are, which is the cosine with the twin, the largest over these runs.
"""

import threading
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actcache import PipelineError
from analysis.concepts import unit_decoder
from analysis.cosines import nearest_cosines
from analysis.explore.encoding import short
from analysis.explore.records import Twin
from analysis.explore.sources import Sources
from saetrain import Run


def find_twins(sources: Sources, latent: int) -> list[Twin] | None:
    """The nearest latent in each other run of the inspections; None if there is no such run."""
    if sources.run is None or not (others := find_others(sources)):
        return None
    direction = unit_decoder(sources.run)[latent]
    twins: list[Twin] = []
    for run in others:
        cosines = unit_decoder(run) @ direction
        best = int(cosines.argmax())
        twins.append({"run": run.path.name, "latent": best, "cosine": short(float(cosines[best]))})
    return twins


@lru_cache(maxsize=4)
def find_others(sources: Sources) -> tuple[Run, ...]:
    """The other runs of the same width that an inspection compared with the table's run, as far as they are there."""
    own = sources.run
    if own is None:
        return ()
    found: dict[str, Run] = {}
    for inspection, file in sources.inspections:
        parents = {parent.id: parent.path for name, parent in inspection.parents.items() if name.split()[0] == "run"}
        if own.run_id not in parents:
            continue
        for run_id, name in parents.items():
            if run_id != own.run_id and (run := _open(run_id, name, own.path, file)) and run.d_model == own.d_model:
                found[run_id] = run
    return tuple(found.values())


def _open(run_id: str, name: str, own: Path, file: Path) -> Run | None:
    """A run by its id, beside the table's run, beside the result, or in a folder there."""
    for folder in (own.absolute().parent, file.absolute().parent, *file.absolute().parent.glob("*/")):
        try:
            run = Run.open(folder / name)
        except (PipelineError, OSError):
            continue
        if run.run_id == run_id:
            return run
    return None


class Stability:
    """The column `stability` of the atlas, computed beside the server: [F] of F x F' products takes a minute."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._thread: threading.Thread | None = None
        self._failed = ""
        self.columns: dict[str, NDArray[np.float32]] = {}

    @property
    def state(self) -> str:
        """Why the column is not there."""
        if self._sources.run is None:
            return f"Stability compares the decoders of two runs. {self._sources.missing['run']}"
        if not find_others(self._sources):
            return (
                "Stability compares this run with others. Write `inspect RUN OTHER --out inspection.json` and name the "
                "result with --result."
            )
        if self._failed:
            return f"Stability could not be computed: {self._failed}"
        return "Stability is being computed. This page shows it as soon as it is there."

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        if find_others(self._sources):
            self._thread = threading.Thread(target=self._try, daemon=True)
            self._thread.start()

    def _try(self) -> None:
        try:
            self.make()
        except (PipelineError, OSError, MemoryError) as error:
            self._failed = str(error) or type(error).__name__

    def make(self) -> None:
        """Compute the column now, if another run is known."""
        run, others = self._sources.run, find_others(self._sources)
        if run is None or not others:
            return
        rows = unit_decoder(run)
        best = [nearest_cosines(rows, unit_decoder(other), 1).cosine[:, 0] for other in others]
        alive = self._sources.n_fired > 0
        self.columns = {"stability": np.where(alive, np.max(best, axis=0), np.nan).astype(np.float32)}
