"""Measures reading a warm store against memcpy with as many threads, and against zarr-python's default pipeline.

The kernel copies out of the page cache more slowly than memcpy copies in memory, so that a bare loop of system calls
for the same chunks is a second, nearer limit.

There are three ways of reading: random chunks into preallocated memory (as in training), all images in order, and one
image at a time. It also measures how long a sealed store of many shards and hook points takes to open, and how fast
`verify` is.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import emit, memcpy_gb_s, parser, timed

import numpy as np
import pyarrow as pa

from actcache import ActivationStore, HookPoint, verify
from actcache.artifacts import Artifact
from actcache.sources import ImagePlan
from actcache.sources.plan import IMAGES_SCHEMA
from actcache.store import ChannelStatistics, StoreSettings, aligned_empty
from actcache.store.shard_files import shard_path
from actcache.store.writer import ShardWriter, begin_store, seal_store


def make_settings(
    options: argparse.Namespace, n_images: int, n_hooks: int, shard_images: int, **other: Any
) -> StoreSettings:
    return StoreSettings.from_json({
        "model_id": "0" * 16, "rows_id": "0" * 16, "hook_points": [str(HookPoint(layer)) for layer in range(n_hooks)],
        "dtype": "float16", "precision": "float32", "codec": "raw", "n_images": n_images, "grid": [options.grid] * 2,
        "patch_size": [16, 16], "d_model": options.d_model, "n_extra": 0, "chunk_images": min(64, shard_images),
        "shard_images": shard_images, "preprocess": {}, "seed": 0, "limit": None, **other,
    })  # fmt: skip


def begin(path: Path, settings: StoreSettings) -> Artifact:
    n = settings.layout.n_images
    columns = [range(n), ["x"] * n, [-1] * n, [""] * n, [1] * n]
    table = pa.table(dict(zip(IMAGES_SCHEMA.names, columns, strict=True)), schema=IMAGES_SCHEMA)
    plan = ImagePlan(table, "0" * 16, 0)
    return begin_store(path, plan=plan, images_path=path.parent, settings=settings, provenance={})


class RandomBlock:
    """Random values of one block, and their statistics; every block of a store has the same."""

    def __init__(self, settings: StoreSettings) -> None:
        layout, rng = settings.layout, np.random.default_rng(0)
        self.settings, (rows, columns), n = settings, layout.grid, layout.chunk_images
        self.patches = rng.normal(size=(rows, n, columns, layout.d_model)).astype(np.float16)
        self.cls = rng.normal(size=(n, layout.d_model)).astype(np.float16)
        self.statistics = dict.fromkeys(("patch", "cls"), ChannelStatistics.of(self.cls))

    def write_shard(self, artifact: Artifact, shard: int) -> None:
        blocks = range(self.settings.layout.n_blocks(shard))
        with ShardWriter(artifact, shard) as writer:
            for block, hook in itertools.product(blocks, self.settings.hook_points):
                writer.write(hook, block, self.patches, self.cls, statistics=self.statistics)
            writer.commit({})


def make_store(path: Path, settings: StoreSettings) -> ActivationStore:
    """Make a sealed store of random values."""
    artifact, random = begin(path, settings), RandomBlock(settings)
    for shard in range(settings.layout.n_shards):
        random.write_shard(artifact, shard)
    seal_store(path)
    return ActivationStore.open(path)


@contextmanager
def temporary_store(options: argparse.Namespace) -> Iterator[ActivationStore]:
    """A store of `options.images` images in a temporary folder of its own."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        settings = make_settings(options, options.images, 1, min(1024, options.images))
        yield make_store(Path(folder) / "x.acts", settings)


def main() -> None:
    arguments = parser(__doc__, images=2048, grid=14, d_model=768, repeat=7, folder=Path())
    arguments.add_argument("--threads", type=int, default=os.cpu_count())
    arguments.add_argument("--shards", type=int, default=1250, help="number of shards of the store that is only opened")
    arguments.add_argument(
        "--hook-points", type=int, default=12, help="number of hook points of the store that is only opened"
    )
    options = arguments.parse_args()
    with temporary_store(options) as store:
        result = measure(store, options)
        small = argparse.Namespace(grid=1, d_model=options.d_model)
        settings = make_settings(small, 16 * options.shards, options.hook_points, 16)
        many = make_store(store.path.with_name("many.acts"), settings)
        result["open_s"] = statistics.median(
            timed(lambda: ActivationStore.open(many.path)) for _ in range(options.repeat)
        )
    emit(options, **result)


def read_chunks(store: ActivationStore, chunks: Any, out: Any, n_threads: int, **options: Any) -> None:
    """Read chunks [n, 2] (block, patch row) into out [n, chunk_images, columns, D], in threads like training."""

    def read(part: range) -> None:
        for i in part:
            store.read_chunk(None, int(chunks[i, 0]), int(chunks[i, 1]), out[i], **options)

    with ThreadPoolExecutor(n_threads) as readers:
        for done in [readers.submit(read, range(i, len(chunks), n_threads)) for i in range(n_threads)]:
            done.result()


def call_system(store: ActivationStore, chunks: Any, out: Any, n_threads: int) -> None:
    """The same reads as `read_chunks`, without any check: what the kernel alone takes."""
    layout, hook = store.layout, store.hook_points[0]
    fds = [os.open(shard_path(store.path, hook, "patches", shard), os.O_RDONLY) for shard in range(layout.n_shards)]
    shards, blocks = np.divmod(chunks[:, 0], layout.blocks_per_shard)
    offsets = [
        layout.chunk_offset("patches", int(shard), int(block), int(row))
        for shard, block, row in zip(shards, blocks, chunks[:, 1], strict=True)
    ]

    def read(part: range) -> None:
        for i in part:
            os.preadv(fds[shards[i]], [out[i]], offsets[i])

    with ThreadPoolExecutor(n_threads) as readers:
        for done in [readers.submit(read, range(i, len(chunks), n_threads)) for i in range(n_threads)]:
            done.result()
    for fd in fds:
        os.close(fd)


def measure(store: ActivationStore, options: argparse.Namespace) -> dict[str, object]:
    import zarr

    layout = store.layout
    n_bytes = store.n_images * layout.n_patches * layout.d_model * 2
    out = aligned_empty((store.n_images, layout.n_patches, layout.d_model), np.dtype(np.float16))  # like the loader's
    units = [(b, r) for b in range(-(-store.n_images // layout.chunk_images)) for r in range(layout.grid[0])]
    chunks = np.random.default_rng(1).permutation(np.array(units))
    pool = out.reshape(len(chunks), *layout.chunk_shape("patches"))
    array: Any = zarr.open_array(store.path / "activations.zarr" / str(store.hook_points[0]) / "patches", mode="r")

    def by_zarr() -> None:
        for block in range(0, store.n_images, layout.chunk_images):
            out[block : block + layout.chunk_images] = array[block : block + layout.chunk_images]

    ways = {
        "chunks": lambda: read_chunks(store, chunks, pool, options.threads),
        "system_calls": lambda: call_system(store, chunks, pool, options.threads),
        "images": lambda: store.read(tokens="patch", out=out),
        "zarr_default": by_zarr,
        "verify": lambda: verify(store.path, n_threads=options.threads),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    limits = []
    for _ in range(options.repeat):  # by turns: machines drift
        limits.append(memcpy_gb_s(n_bytes, options.threads))
        for name, way in ways.items():
            times[name].append(timed(way))
    rates = {name: n_bytes / statistics.median(values) / 1e9 for name, values in times.items()}
    limit = statistics.median(limits)
    images = np.random.default_rng(2).integers(0, store.n_images, 200)
    image_memory = np.empty((1, layout.n_tokens, layout.d_model), np.float16)
    started = time.perf_counter()
    for image in images:
        store.read(images=[int(image)], out=image_memory)
    return {
        "n_bytes": n_bytes,
        **{f"{name}_gb_s": rate for name, rate in rates.items()},
        "tokens_per_s": rates["chunks"] * 1e9 / (2 * layout.d_model),
        "limit_memcpy_gb_s": limit,
        "share_of_limit": rates["chunks"] / limit,
        "share_of_system_calls": rates["chunks"] / rates["system_calls"],
        "images_share_of_limit": rates["images"] / limit,
        "verify_share_of_limit": rates["verify"] / limit,
        "speedup": rates["chunks"] / rates["zarr_default"],
        "images_speedup": rates["images"] / rates["zarr_default"],
        "one_image_ms": (time.perf_counter() - started) / len(images) * 1e3,
    }


if __name__ == "__main__":
    main()
