"""Which latents of a dictionary point in similar directions: the nearest by decoder cosine, block by block.

In: a run. Out: [F, m] latents and cosines. No (F x F) array is made: a task holds 256 rows of it. numpy only, run by
dask.
"""

from functools import lru_cache
from typing import NamedTuple

import dask
import numpy as np
import safetensors
from numpy.typing import NDArray

from actcache import CorruptError
from analysis.reduce import OnProgress, compute
from saetrain import Run

BLOCK_LATENTS = 256
TASK_LATENTS = 2048
_GROUPS = 64


class Nearest(NamedTuple):
    """The latents whose decoder row is nearest to a latent's own, nearest first, without the latent itself."""

    latent: NDArray[np.int32]  # [F, m]
    cosine: NDArray[np.float32]  # [F, m]


def nearest_latents(run: Run, n_nearest: int, *, on_progress: OnProgress | None = None) -> Nearest:
    """The `n_nearest` latents of largest decoder cosine; the lower latent comes first in a tie.

    Args:
        on_progress: called with (tasks done, tasks in all), see `n_geometry_tasks`.
    """
    n_latents = run.sae_config.size
    task = dask.delayed(_nearest_of_block, pure=False)
    place = str((run.path / "sae.safetensors").absolute())
    m = min(n_nearest, n_latents - 1)
    parts = [
        task(place, run.run_id, first, min(first + TASK_LATENTS, n_latents), m)
        for first in range(0, n_latents, TASK_LATENTS)
    ]
    nearest: Nearest = compute(dask.delayed(_stack, pure=False)(parts), parts=parts, on_progress=on_progress)
    return nearest


def n_geometry_tasks(n_latents: int) -> int:
    return -(-n_latents // TASK_LATENTS)


def _stack(parts: list[Nearest]) -> Nearest:
    return Nearest._make(np.concatenate(column) for column in zip(*parts, strict=True))


@lru_cache(maxsize=2)
def _unit_decoder(path: str, run_id: str) -> NDArray[np.float32]:
    """[F, D], computed once per process. `run_id` distinguishes runs that were at the same path."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            decoder: NDArray[np.float32] = file.get_tensor("decoder")
    except (OSError, safetensors.SafetensorError) as error:
        raise CorruptError(f"{path} cannot be read ({error}). Train the run again.") from error
    norm = np.sqrt(np.einsum("fd,fd->f", decoder, decoder, dtype=np.float64))
    unit: NDArray[np.float32] = (decoder / np.maximum(norm, 1e-30)[:, None]).astype(np.float32)
    return unit


def _nearest_of_block(path: str, run_id: str, first: int, stop: int, m: int) -> Nearest:
    decoder = _unit_decoder(path, run_id)
    blocks = [
        _nearest_rows(decoder, start, min(start + BLOCK_LATENTS, stop), m)
        for start in range(first, stop, BLOCK_LATENTS)
    ]
    return _stack(blocks)


def _nearest_rows(decoder: NDArray[np.float32], start: int, stop: int, m: int) -> Nearest:
    """The nearest latents of rows start to stop - 1.

    The m-th largest maximum over groups bounds the m-th largest cosine from below, so only a few more than m cosines
    are sorted, not F.
    """
    cosine = decoder[start:stop] @ decoder.T  # [b, F]
    own = np.arange(stop - start)
    cosine[own, start + own] = -2.0
    n_latents = cosine.shape[1]
    groups = min(_GROUPS, n_latents // max(m, 1))
    cut = n_latents - n_latents % groups
    maxima = cosine[:, :cut].reshape(len(own), groups, -1).max(axis=1) if groups > 1 else cosine
    floor = np.partition(maxima, maxima.shape[1] - m, axis=1)[:, maxima.shape[1] - m] if m else np.full(len(own), 3.0)
    row, latent = np.nonzero(cosine >= floor[:, None])
    value = cosine[row, latent]
    order = np.lexsort((latent, -value, row))
    row, latent, value = row[order], latent[order], value[order]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    kept = rank < m
    return Nearest(latent[kept].reshape(-1, m).astype(np.int32), value[kept].reshape(-1, m).astype(np.float32))
