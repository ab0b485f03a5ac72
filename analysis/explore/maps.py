"""A map of the latents: decoder directions in two dimensions, latents of similar direction close to each other.

It is made once, by t-SNE with cosine distance, in a process of its own, and kept beside the seal (notes/map.parquet)
with the id of the run, so a table of another run does not show it.

Source: openTSNE (Poličar et al. 2024); its gradient by interpolation makes the time linear in the number of latents.
"""

import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actcache import CorruptError, SettingsError, StorageError
from actcache.store import read_signed_table
from analysis.concepts import NOTES, ConceptTable, unit_decoder
from analysis.explore.sources import Sources
from analysis.naming import write_beside_seal
from saetrain import Run

MAP_FILE = "map.parquet"
INSTALL = "The map needs openTSNE, which is not installed: pip install 'patchsae[explore]'."
ADVICE = "Delete it; the explorer makes it again."
MIN_LATENTS = 8
PERPLEXITY = 30
"""openTSNE's default; a third of the latents must be at least as many."""
FEW, WIDTH = 4096, 50
NICE = 10
"""The priority of the process that makes the map: what people look at comes first."""


def read_map(sources: Sources) -> dict[str, NDArray[np.float32]]:
    """The columns map_x and map_y [F]; none if the map has not been made, or is that of another run."""
    file = sources.concepts.path / NOTES / MAP_FILE
    if not file.is_file():
        return {}
    try:
        table = read_signed_table(file, ADVICE)
    except CorruptError:
        return {}
    facts = json.loads((table.schema.metadata or {}).get(b"map", b"{}"))
    known = sources.run is None or facts.get("run_id") == sources.run.run_id
    if not known or table.num_rows != sources.n_latents or not {"x", "y"} <= set(table.column_names):
        return {}
    return {f"map_{axis}": np.asarray(table[axis].to_numpy(), dtype=np.float32) for axis in "xy"}


def make_map(concepts: ConceptTable | str | Path, run: Run | str | Path) -> dict[str, NDArray[np.float32]]:
    """Make the map, keep it beside the seal if that can be written, and return its columns as `read_map` does.

    Raises SettingsError: openTSNE is not installed, or there are too few latents.
    """
    if find_spec("openTSNE") is None:
        raise SettingsError(INSTALL)
    table = concepts if isinstance(concepts, ConceptTable) else ConceptTable.open(concepts)
    opened = run if isinstance(run, Run) else Run.open(run)
    place = embed_directions_in_2d(unit_decoder(opened), table.table["n_tokens"].to_numpy() > 0)
    facts = {"run_id": opened.run_id, "method": "t-SNE", "perplexity": PERPLEXITY}
    columns = {axis: place[:, i] for i, axis in enumerate("xy")}
    with suppress(StorageError):  # a table that others own, on a disk that is full
        write_beside_seal(table, MAP_FILE, pa.table(columns).replace_schema_metadata({"map": json.dumps(facts)}))
    return {f"map_{axis}": values for axis, values in columns.items()}


def embed_directions_in_2d(directions: NDArray[np.float32], alive: NDArray[np.bool_]) -> NDArray[np.float32]:
    """[F, 2] from unit directions [F, D]: places of the latents that fire, NaN for all others."""
    place = np.full((len(directions), 2), np.nan, dtype=np.float32)
    chosen = np.flatnonzero(alive)
    if len(chosen) < MIN_LATENTS:
        raise SettingsError(f"A map needs at least {MIN_LATENTS} latents that fire, got {len(chosen)}.")
    from openTSNE import TSNE

    # The Euclidean distance of unit vectors orders them as the cosine does, and is what the fast search for neighbors
    # knows. For few latents, threads cost more than they give.
    model = TSNE(
        perplexity=min(PERPLEXITY, (len(chosen) - 1) / 3), metric="euclidean", random_state=0,
        n_jobs=1 if len(chosen) <= FEW else -1,
    )  # fmt: skip
    place[chosen] = np.asarray(model.fit(reduce_width(directions[chosen])))
    return place


def reduce_width(directions: NDArray[np.float32]) -> NDArray[np.float32]:
    """[n, at most WIDTH]: the principal components of directions [n, D], among which neighbors are found faster."""
    if directions.shape[1] <= WIDTH:
        return directions
    centered = directions - directions.mean(axis=0)
    axes = np.linalg.eigh(centered.T @ centered)[1][:, ::-1][:, :WIDTH]
    return np.ascontiguousarray(centered @ axes, dtype=np.float32)


class MapMaker:
    """Makes the map of a table in a process of its own, once, unless it is there.

    Attributes:
        state: what the page is told while there is no map.
        made: a map that this process has made.
    """

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self.state, self.made = "", dict[str, NDArray[np.float32]]()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin, if something is to be made and can be."""
        if self.sources.run is None:
            self.state = f"The map is made from the run's decoder. {self.sources.missing['run']}"
        elif find_spec("openTSNE") is None:
            self.state = INSTALL
        elif not read_map(self.sources):
            self.state = "The map of decoder directions is being made. Load the page again in a minute or two."
            paths = [str(self.sources.concepts.path.absolute()), str(self.sources.run.path.absolute())]
            nothing, known = subprocess.DEVNULL, {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
            self._process = subprocess.Popen(
                [sys.executable, "-c", _MAKE, *paths], stdin=nothing, stdout=nothing, stderr=subprocess.PIPE, env=known,
                start_new_session=True,  # Ctrl-C is for the server, which ends this process
            )  # fmt: skip
            threading.Thread(target=self._wait, args=(self._process,), daemon=True).start()

    def _wait(self, process: "subprocess.Popen[bytes]") -> None:
        _, told = process.communicate()
        if process.returncode:
            last = told.decode(errors="replace").strip().splitlines()[-1:] or ["it was stopped"]
            self.state = f"The map could not be made: {last[0][:300]}"

    def make(self) -> None:
        """Make the map now, unless it is there or cannot be made."""
        if self.sources.run is None:
            self.state = f"The map is made from the run's decoder. {self.sources.missing['run']}"
        elif not read_map(self.sources):
            try:
                self.made = make_map(self.sources.concepts, self.sources.run)
            except SettingsError as error:
                self.state = str(error)

    def stop(self) -> None:
        """End the process, if it still runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()


_MAKE = f"""
import os, sys, warnings
warnings.simplefilter("ignore")
os.nice({NICE})
from actcache import PipelineError
from analysis.explore.maps import make_map
try:
    make_map(sys.argv[1], sys.argv[2])
except PipelineError as error:
    sys.exit(str(error))
"""
