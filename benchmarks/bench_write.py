"""Measures writing shards: ShardWriter against write(2) and fsync of the same bytes to the same disk, in alternation.

Checksums, chunk order, index, renaming and the commit record count. The statistics do not, since extraction computes
them on the device of the tower. `share_of_limit` is the median ratio over the pairs.
"""

import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
from common import emit, parser

from actcache import HookPoint
from actcache.sources import ImagePlan
from actcache.sources.plan import IMAGES_SCHEMA
from actcache.store import ChannelStatistics, StoreSettings
from actcache.store.writer import ShardWriter, begin_store


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--images", type=int, default=1024, help="number of images in one shard")
    arguments.add_argument("--grid", type=int, default=14)
    arguments.add_argument("--d-model", type=int, default=768)
    arguments.add_argument("--hook-points", type=int, default=1)
    arguments.add_argument("--codec", default="raw")
    arguments.add_argument("--pairs", type=int, default=5)
    arguments.add_argument("--folder", type=Path, default=Path(), help="a folder on the disk to measure")
    options = arguments.parse_args()

    hooks = [HookPoint(layer) for layer in range(options.hook_points)]
    settings = StoreSettings.from_json({
        "model_id": "0" * 16, "rows_id": "0" * 16, "hook_points": [str(hook) for hook in hooks], "dtype": "float16",
        "precision": "float32", "codec": options.codec, "n_images": options.images, "grid": [options.grid] * 2,
        "patch_size": [16, 16], "d_model": options.d_model, "n_extra": 0,
        "chunk_images": 64 if options.images % 64 == 0 else 16, "shard_images": options.images,
        "preprocess": {}, "seed": 0, "limit": None,
    })  # fmt: skip
    layout = settings.layout
    n = layout.chunk_images
    rng = np.random.default_rng(0)
    patches = rng.normal(size=(options.grid, n, options.grid, options.d_model)).astype(np.float16)
    cls = rng.normal(size=(n, options.d_model)).astype(np.float16)
    statistics = {"patch": ChannelStatistics.of(cls), "cls": ChannelStatistics.of(cls)}
    columns = [range(options.images), ["x"] * options.images, [-1] * options.images, [""] * options.images]
    table = pa.table(
        dict(zip(IMAGES_SCHEMA.names, [*columns, [1] * options.images], strict=True)), schema=IMAGES_SCHEMA
    )
    n_bytes = options.hook_points * sum(layout.shard_bytes(array, 0) for array in layout.arrays())
    plain = np.ascontiguousarray(patches).reshape(-1).view(np.uint8)

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:

        def write_shard() -> float:
            shutil.rmtree(f"{folder}/x.acts", ignore_errors=True)
            plan = ImagePlan(table, "0" * 16, 0)
            path = Path(folder) / "x.acts"
            store = begin_store(path, plan=plan, images_path=path.parent, settings=settings, provenance={})
            os.sync()
            started = time.perf_counter()
            with ShardWriter(store, 0) as writer:
                for block in range(layout.n_blocks(0)):
                    for hook in hooks:
                        writer.write(hook, block, patches, cls, statistics=statistics)
                writer.commit({})
            return time.perf_counter() - started

        def write_plain() -> float:
            Path(f"{folder}/plain").unlink(missing_ok=True)
            os.sync()
            started = time.perf_counter()
            fd = os.open(f"{folder}/plain", os.O_WRONLY | os.O_CREAT)
            done = 0
            while done < n_bytes:
                done += os.write(fd, memoryview(plain)[: min(len(plain), n_bytes - done)])
            os.fsync(fd)
            os.close(fd)
            return time.perf_counter() - started

        times = [(write_shard(), write_plain()) for _ in range(options.pairs + 1)][1:]  # by turns; the first warms up
        ours, limit = (median(column) for column in zip(*times, strict=True))
        share = median(b / a for a, b in times)
    emit(
        options,
        n_bytes=n_bytes,
        gb_per_s=n_bytes / ours / 1e9,
        tokens_per_s=options.hook_points * options.images * layout.n_tokens / ours,
        limit_write_fsync_gb_s=n_bytes / limit / 1e9,
        share_of_limit=share,
    )


if __name__ == "__main__":
    main()
