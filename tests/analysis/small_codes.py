"""Small CodeStores made from a dense array, as encode() would write them, with any cut into shards; and tasks for
dask's workers, which cannot import a test."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from numpy.typing import NDArray

from actcache.artifacts import begin_artifact, seal_artifact
from analysis.reduce.pairs import Piece
from saetrain import CodeStore
from saetrain.codes.store import CODES, SEEN_FILE
from saetrain.codes.writer import code_dtypes, write_shard

QUALITY = {"all": {"fvu": 0.1, "l0": 2.0, "cosine": 0.9}, "dead": 0.0}


def write_codes(
    path: Path,
    dense: NDArray[np.float16],
    sizes: Sequence[int],
    labels: NDArray[np.int32] | None = None,
    *,
    grid: tuple[int, int] | None = None,
    tokens: str = "all",
    failed: Sequence[int] = (),
    names: str = "",
    seen: NDArray[np.bool_] | None = None,
    columns: Mapping[str, object] | None = None,
) -> CodeStore:
    """dense [I, T, F] -> codes in shards of `sizes` images, whose file names begin with `names`.

    Args:
        seen: [I], images that the run has learned from. columns: more columns of the image table.
    """
    n_images, n_tokens, n_latents = dense.shape
    assert sum(sizes) == n_images
    labels = np.full(n_images, -1, np.int32) if labels is None else labels
    table = pa.table(
        {
            "source_index": np.arange(n_images),
            "uri": [f"{names}{i:05d}.png" for i in range(n_images)],
            "label": pa.array(labels, pa.int32()),
            "label_name": [f"class{label}" if label >= 0 else "" for label in labels],
            "bytes": np.full(n_images, -1),
            **(columns or {}),
        }
    )

    def prepare(folder: Path) -> None:
        pq.write_table(table, folder / "images.parquet")
        zarr.create_group(folder / CODES, zarr_format=3)
        if seen is not None:
            (folder / SEEN_FILE).write_bytes(seen.tobytes())

    artifact = begin_artifact(
        path,
        "codes",
        settings={
            "rows_id": "0" * 16, "hook_point": "blocks.2.hook_resid_post", "tokens": tokens, "n_images": n_images,
            "n_tokens": n_tokens, "grid": list(grid or (1, n_tokens - 1)), "n_latents": n_latents,
            "shard_sizes": list(sizes), "dtypes": code_dtypes(n_latents, n_images * n_tokens), "preprocess": {},
        },
        parents={name: (digit * 16, path / "gone") for name, digit in (("store", "1"), ("run", "2"), ("images", "3"))},
        provenance={"quality": QUALITY, "source": {"images": "x", "model": "m", "pretrained": "p"},
                    "sae": {"variant": "topk", "n_latents": n_latents, "hook_point": "blocks.2.hook_resid_post",
                            "d_model": 8}},
        prepare=prepare,
    )  # fmt: skip
    first = 0
    for number, size in enumerate(sizes):
        write_shard(artifact, number, shard_arrays(dense[first : first + size], first))
        first += size
    seal_artifact(path, n_entries=int((dense > 0).sum()), failed={str(image): "unreadable" for image in failed})
    return CodeStore.open(path)


def shard_arrays(dense: NDArray[np.float16], first_image: int) -> dict[str, NDArray[np.generic]]:
    """The six arrays of a shard of dense [I, T, F]."""
    n_latents = dense.shape[2]
    flat = dense.reshape(-1, n_latents)
    row, latent = np.nonzero(flat)
    latent_row, row_of = np.nonzero(flat.T)
    counts = [np.bincount(row, minlength=len(flat)), np.bincount(latent, minlength=n_latents)]
    return {
        "indptr": np.concatenate([[0], np.cumsum(counts[0])]),
        "latent": latent,
        "value": flat[row, latent],
        "latent_indptr": np.concatenate([[0], np.cumsum(counts[1])]),
        "row": row_of + first_image * dense.shape[1],
        "latent_value": flat[row_of, latent_row],
    }


def which_process(codes: CodeStore, shard: int, *shared: object) -> int:
    return os.getpid()


def dawdle(piece: Piece, *, folder: str) -> int:
    """Records which process has shard 5, and waits there until the test has seen it."""
    first = Path(folder) / "first"
    if piece.shard == 5 and not first.exists():
        first.write_text(str(os.getpid()))
        time.sleep(30)
    return 1


def keep(codes: CodeStore, latents: range, statistics: dict[str, object]) -> dict[str, object]:
    return statistics
