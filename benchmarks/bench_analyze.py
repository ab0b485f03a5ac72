"""Measures `analyze` on codes of growing size: seconds, entries per second, and peak memory of a process of its own.

Writes synthetic codes in shards of 256 images, like bench_query.py, and analyzes them without pictures. The limit is
one thread in the same run that reads latent, row and value of every shard and counts latents with np.bincount. The page
cache is warm.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import emit, parser

import numpy as np
import pyarrow.parquet as pq
from bench_query import ROOT, write_codes

from saetrain import CodeStore

ANALYZE = """
import json, resource, sys, time
import analysis
if __name__ == "__main__":
    started = time.perf_counter()
    config = analysis.AnalyzeConfig(n_gallery=0)
    analysis.analyze(sys.argv[1], sys.argv[2], config=config, overwrite=True, n_workers=int(sys.argv[3]) or None)
    seconds = time.perf_counter() - started
    peaks = [resource.getrusage(who).ru_maxrss * 1024 / 1e9 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps([seconds, *peaks]))
"""


def read_and_count(codes: CodeStore) -> float:
    """Time the minimal work of any analysis: reading and counting each entry once."""
    started = time.perf_counter()
    for shard in range(codes.n_shards):
        entries = codes.read_shard(shard)
        np.bincount(entries.latent, minlength=codes.n_latents)
        entries.row.max(initial=0)
        entries.latent_value.max(initial=0)
    return time.perf_counter() - started


def main() -> None:
    options = parser(__doc__, images=5_076, grid=14, n_latents=49_152, l0=32, shard_images=256, classes=1000)
    options.add_argument(
        "--n-workers", type=int, default=0, help="number of worker processes; 0 uses threads of one process"
    )
    options.add_argument("--folder", type=Path, help="where to keep the codes; a temporary folder by default")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        path = folder / f"synthetic-{given.images}-{given.n_latents}-{given.shard_images}-{given.classes}.codes"
        codes = write_codes(path, n_images=given.images, grid=given.grid, n_latents=given.n_latents, l0=given.l0,
                            n_shards=-(-given.images // given.shard_images), n_classes=given.classes)  # fmt: skip
        limit = read_and_count(codes)
        made = Path(temporary) / "made.concepts"
        command = [sys.executable, "-c", ANALYZE, str(path), str(made), str(given.n_workers)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
        seconds, peak, worker_peak = json.loads(done.stdout)
        emit(
            given,
            n_tokens=codes.n_images * codes.n_tokens,
            n_entries=codes.n_entries,
            seconds=seconds,
            entries_per_s=codes.n_entries / seconds,
            limit_s=limit,
            share_of_limit=limit / seconds,
            peak_gb=peak,
            worker_peak_gb=worker_peak if given.n_workers else None,
            class_rows=pq.ParquetFile(made / "class_counts.parquet").metadata.num_rows,
            class_gb=(made / "class_counts.parquet").stat().st_size / 1e9,
            table_gb=sum(file.stat().st_size for file in made.iterdir() if file.is_file()) / 1e9,
        )


if __name__ == "__main__":
    main()
