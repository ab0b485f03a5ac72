"""Which latents of a dictionary are most similar, by the cosine of their decoder rows.

In: a run. Out: [F, m] latents and cosines. numpy only, in parallel by dask.
"""

from functools import lru_cache
from pathlib import Path

import dask
import numpy as np
import safetensors
from numpy.typing import NDArray
from safetensors.numpy import load

from actcache import CorruptError
from actcache.progress import Progress
from actcache.text import is_utf8
from analysis.cosines import Nearest, nearest_cosines
from analysis.reduce import compute, join_columns
from saetrain import Run

TASK_LATENTS = 2048


def nearest_latents(run: Run, n_nearest: int, *, on_progress: Progress | None = None) -> Nearest:
    """The `n_nearest` latents of largest decoder cosine; the lower latent comes first in a tie.

    Args:
        on_progress: called with (tasks done, tasks in all), see `n_geometry_tasks`.
    """
    n_latents = run.sae_config.n_latents
    task = dask.delayed(_nearest_of_block, pure=False)
    place = str(run.weights().absolute())
    m = min(n_nearest, n_latents - 1)
    parts = [
        task(place, run.run_id, first, min(first + TASK_LATENTS, n_latents), m)
        for first in range(0, n_latents, TASK_LATENTS)
    ]
    nearest: Nearest = compute(dask.delayed(join_columns, pure=False)(parts), parts=parts, on_progress=on_progress)
    return nearest


def n_geometry_tasks(n_latents: int) -> int:
    return -(-n_latents // TASK_LATENTS)


def unit_decoder(run: Run) -> NDArray[np.float32]:
    """[F, D]: the decoder rows of a run as unit vectors. Raises CorruptError."""
    return _unit_decoder(str(run.weights().absolute()), run.run_id)


@lru_cache(maxsize=2)
def _unit_decoder(path: str, run_id: str) -> NDArray[np.float32]:
    """[F, D], computed once per process. `run_id` distinguishes runs that were at the same path."""
    try:
        decoder: NDArray[np.float32]
        if is_utf8(path):
            with safetensors.safe_open(path, framework="numpy") as file:
                decoder = file.get_tensor("decoder")
        else:
            decoder = load(Path(path).read_bytes())["decoder"]
        if decoder.ndim != 2 or decoder.dtype != np.float32:
            raise ValueError(f"its decoder is {decoder.dtype} {list(decoder.shape)}")
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise CorruptError(f"{path} cannot be read ({error}). Train the run again.") from error
    norm = np.sqrt(np.einsum("fd,fd->f", decoder, decoder, dtype=np.float64))
    unit: NDArray[np.float32] = (decoder / np.maximum(norm, 1e-30)[:, None]).astype(np.float32)
    return unit


def _nearest_of_block(path: str, run_id: str, first: int, stop: int, m: int) -> Nearest:
    decoder = _unit_decoder(path, run_id)
    return nearest_cosines(decoder[first:stop], decoder, m, start=first)
