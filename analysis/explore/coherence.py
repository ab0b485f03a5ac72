"""The column `coherence` of the atlas: do the patches on which a latent fires lie next to each other?

It is what `benchmark` measures of each latent: the mean over images of Moran's I, minus its expectation if the
activations were put on random patches. It is taken on a sample of images. Shards are read in a random order, and as
soon as a latent has ENOUGH images with a Moran's I, the shards that follow are read without it. A latent that fires
often therefore costs one shard, and one with fewer images than that is measured on all of them.
"""

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actcache import SettingsError, StorageError
from analysis.benchmark import LEAST_IMAGES, LEAST_PATCHES, Grid, find_morans
from analysis.concepts import ConceptTable
from analysis.explore.makers import Recipe, read_kept
from analysis.explore.sources import Sources
from analysis.naming import write_beside_seal
from analysis.reduce import Block, cut_blocks
from saetrain import CodeStore, LatentCodes

FILE, NAME = "coherence.parquet", "coherence"
ENOUGH = 100
"""Images of a latent after which it is left out of further shards. The mean of I is then known to about a hundredth."""
BLOCK_ENTRIES = 1 << 20


def read_coherence(sources: Sources) -> dict[str, NDArray[np.float32]]:
    """The column `coherence` [F]; none if it has not been measured, or on other codes."""
    table = read_kept(sources, FILE, NAME, {"codes_id": sources.concepts.artifact.parent("codes").id})
    if table is None or NAME not in table.column_names:
        return {}
    return {NAME: np.asarray(table[NAME].to_numpy(), dtype=np.float32)}


def make_coherence(
    concepts: ConceptTable | str | Path, codes: CodeStore | str | Path
) -> dict[str, NDArray[np.float32]]:
    """Measure the coherence of all latents, keep it beside the seal if that can be written, and return the column.

    Raises SettingsError: the codes have no patches, or too few of them. Others as `CodeStore.read_by_latent`.
    """
    table = concepts if isinstance(concepts, ConceptTable) else ConceptTable.open(concepts)
    opened = codes if isinstance(codes, CodeStore) else CodeStore.open(codes)
    if reason := explain_grid(opened):
        raise SettingsError(reason)
    values, n_images = measure_coherence(opened)
    facts = {"codes_id": opened.codes_id, "enough": ENOUGH, "least_images": LEAST_IMAGES}
    kept = pa.table({NAME: values, "n_images": n_images}).replace_schema_metadata({NAME: json.dumps(facts)})
    with suppress(StorageError):  # a table that others own, on a disk that is full
        write_beside_seal(table, FILE, kept)
    return {NAME: values}


def measure_coherence(codes: CodeStore, *, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """([F] the mean of Moran's I above its expectation, NaN for latents with too few images; [F] how many there were).

    Args:
        seed: of the order in which shards are read.
    """
    grid = Grid(*codes.grid)
    total, n_images = np.zeros(codes.n_latents), np.zeros(codes.n_latents, dtype=np.int32)
    for shard in np.random.Generator(np.random.Philox(seed)).permutation(codes.n_shards).tolist():
        wanted = n_images < ENOUGH
        for block in cut_blocks(codes.read_by_latent(shard), BLOCK_ENTRIES):
            found = find_morans(_take(block, wanted), codes.n_tokens, grid, codes.valid)
            latents = slice(block.first, block.first + len(block.indptr) - 1)
            n = latents.stop - latents.start
            total[latents] += np.bincount(found.latent, found.moran, n)
            n_images[latents] += np.bincount(found.latent, minlength=n).astype(np.int32)
    enough = n_images >= LEAST_IMAGES
    mean = np.divide(total, n_images, out=np.full(codes.n_latents, np.nan), where=enough)
    return (mean - grid.null).astype(np.float32), n_images


def _take(block: Block, wanted: NDArray[np.bool_]) -> LatentCodes:
    """The entries of the wanted latents of a block; its first latent has number 0."""
    count = np.diff(block.indptr)
    mine = wanted[block.first : block.first + len(count)]
    keep = np.repeat(mine, count)
    indptr = np.concatenate([[0], np.cumsum(count * mine)])
    return LatentCodes(indptr, block.row[keep], block.value[keep])


def explain_grid(codes: CodeStore) -> str:
    """Why codes have no coherence, "" if they have."""
    grid = Grid(*codes.grid)
    if codes.tokens == "cls":
        return "Spatial coherence needs codes of patches, but only CLS was encoded."
    if grid.most < LEAST_PATCHES:
        return f"Spatial coherence needs images of more than {LEAST_PATCHES} patches, but these have {grid.n_patches}."
    return ""


def _explain(sources: Sources) -> str:
    if sources.codes is None:
        return f"Spatial coherence is measured on the codes. {sources.missing['codes']}"
    return explain_grid(sources.codes)


def _find_paths(sources: Sources) -> tuple[Path, ...]:
    assert sources.codes is not None
    return sources.concepts.path, sources.codes.path


COHERENCE = Recipe("Spatial coherence", read_coherence, _explain, _find_paths, make_coherence)
