"""A map of the latents: decoder directions in two dimensions, latents of similar direction close to each other.

It is made once, by t-SNE with cosine distance, in a process of its own, and kept beside the seal (notes/map.parquet)
with the id of the run, so a table of another run does not show it.

Source: openTSNE (Poličar et al. 2024); its gradient by interpolation makes the time linear in the number of latents.
"""

import json
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actcache import SettingsError, StorageError
from analysis.concepts import ConceptTable, unit_decoder
from analysis.explore.makers import Recipe, read_kept
from analysis.explore.sources import Sources
from analysis.naming import write_beside_seal
from saetrain import Run

MAP_FILE = "map.parquet"
INSTALL = "The map needs openTSNE, which is not installed: pip install 'patchsae[explore]'."
MIN_LATENTS = 8
PERPLEXITY = 30
"""openTSNE's default; a third of the latents must be at least as many."""
FEW, WIDTH = 4096, 50


def read_map(sources: Sources) -> dict[str, NDArray[np.float32]]:
    """The columns map_x and map_y [F]; none if the map has not been made, or is that of another run."""
    table = read_kept(sources, MAP_FILE, "map", {"run_id": sources.run.run_id if sources.run else None})
    if table is None or not {"x", "y"} <= set(table.column_names):
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


def _explain(sources: Sources) -> str:
    if sources.run is None:
        return f"The map is made from the run's decoder. {sources.missing['run']}"
    return INSTALL if find_spec("openTSNE") is None else ""


def _find_paths(sources: Sources) -> tuple[Path, ...]:
    assert sources.run is not None
    return sources.concepts.path, sources.run.path


MAP = Recipe("The map of decoder directions", read_map, _explain, _find_paths, make_map)
