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

from common import emit, parser

import numpy as np
from bench_read import RandomBlock, begin, make_settings


def main() -> None:
    arguments = parser(__doc__, grid=14, d_model=768, hook_points=1, codec="raw", pairs=5)
    arguments.add_argument("--images", type=int, default=1024, help="number of images in one shard")
    arguments.add_argument("--folder", type=Path, default=Path(), help="a folder on the disk to measure")
    options = arguments.parse_args()

    settings = make_settings(
        options, options.images, options.hook_points, options.images, codec=options.codec,
        chunk_images=64 if options.images % 64 == 0 else 16,
    )  # fmt: skip
    layout, random = settings.layout, RandomBlock(settings)
    n_bytes = options.hook_points * sum(layout.shard_bytes(array, 0) for array in layout.arrays())
    plain = random.patches.reshape(-1).view(np.uint8)

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:

        def write_shard() -> float:
            shutil.rmtree(f"{folder}/x.acts", ignore_errors=True)
            artifact = begin(Path(folder) / "x.acts", settings)
            os.sync()
            started = time.perf_counter()
            random.write_shard(artifact, 0)
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
