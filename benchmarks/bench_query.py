"""Measures queries on large codes: seconds and bytes for one latent, one image, co-firing and two groups.

Writes synthetic codes into --folder once (each token has `--l0` latents, drawn log-uniformly, so that some fire often
and most rarely), then queries them in fresh processes: `library` is opening and querying, `command` is the whole
command with its start. The page cache is warm. The limit for one latent is reading its bytes from one file per array.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import emit, parser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr

from actcache.artifacts import Artifact, begin_artifact, seal_artifact
from saetrain import CodeStore
from saetrain.codes.store import CODES
from saetrain.codes.writer import code_dtypes, write_shard

ROOT = Path(__file__).parents[1]


def write_codes(
    path: Path, *, n_images: int, grid: int, n_latents: int, l0: int, n_shards: int, n_classes: int = 1000,
    run: Artifact | None = None, images: Path | None = None, preprocess: dict[str, object] | None = None,
) -> CodeStore:  # fmt: skip
    """Write codes of this size, with an extra column `split`. Codes that exist already are reused.

    Args:
        run, images: the parents that the codes name, if these are there. preprocess: how a model would see the images.
    """
    nowhere = ("0" * 16, path.parent / "gone")
    parents = dict.fromkeys(("store", "run", "images"), nowhere)
    if run is not None:
        parents["run"] = run.id, run.path
    if images is not None:
        parents["images"] = "0" * 16, images
    n_tokens = 1 + grid * grid
    sizes = [len(part) for part in np.array_split(np.arange(n_images), n_shards)]
    dtypes = code_dtypes(n_latents, n_images * n_tokens)

    def prepare(folder: Path) -> None:
        number = np.arange(n_images)
        table = {
            "source_index": number,
            "uri": [f"class{i % n_classes:03d}/{i:08d}.jpg" for i in range(n_images)],
            "label": pa.array(number % n_classes, pa.int32()),
            "label_name": [f"class{i % n_classes:03d}" for i in range(n_images)],
            "bytes": np.full(n_images, -1),
            "split": [["train", "test"][i % 5 == 0] for i in range(n_images)],
        }
        pq.write_table(pa.table(table), folder / "images.parquet")
        zarr.create_group(folder / CODES, zarr_format=3)

    artifact = begin_artifact(
        path,
        "codes",
        settings={
            "rows_id": "0" * 16, "hook_point": "blocks.10.hook_resid_post", "tokens": "all", "n_images": n_images,
            "n_tokens": n_tokens, "grid": [grid, grid], "n_latents": n_latents, "shard_sizes": sizes, "dtypes": dtypes,
            "preprocess": preprocess or {},
        },
        parents=parents,
        provenance={"quality": {}, "source": {}, "sae": {}},
        prepare=prepare,
    )  # fmt: skip
    if not artifact.complete:
        rng = np.random.default_rng(0)
        first = 0
        for shard, size in enumerate(sizes):
            n_rows = size * n_tokens
            spread = np.exp(rng.random((n_rows, l0), dtype=np.float32) * np.log(n_latents)).astype(np.int64) - 1
            latent = np.sort(spread.clip(0, n_latents - 1), axis=1)
            while (same := latent[:, 1:] == latent[:, :-1]).any():  # a latent fires once a token
                latent[:, 1:][same] = rng.integers(0, n_latents, int(same.sum()))
                latent.sort(axis=1)
            latent = latent.ravel()
            value = rng.random(len(latent), dtype=np.float32).astype(np.float16) + np.float16(0.01)
            order = np.argsort(latent.astype(dtypes["latent"]), kind="stable")
            row = first + order // l0
            write_shard(
                artifact,
                shard,
                {
                    "indptr": np.arange(n_rows + 1) * l0, "latent": latent, "value": value,
                    "latent_indptr": np.concatenate([[0], np.cumsum(np.bincount(latent, minlength=n_latents))]),
                    "row": row, "latent_value": value[order],
                },
            )  # fmt: skip
            first += n_rows
        seal_artifact(path, n_entries=n_images * n_tokens * l0, failed={})
    return CodeStore.open(path)


ASK = """
import json, sys, time
started = time.perf_counter()
import analysis, saetrain
analysis.query_latent, saetrain.CodeStore
loaded = time.perf_counter()
codes = saetrain.CodeStore.open(sys.argv[1])
table = {call}
done = time.perf_counter()
print(json.dumps({{"import": loaded - started, "ask": done - loaded, "bytes": codes.bytes_read}}))
"""


def ask_library(path: Path, call: str, repeat: int) -> dict[str, float]:
    """Medians over fresh processes, without the first of several, which warms the page cache."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    runs = [
        json.loads(
            subprocess.run([sys.executable, "-c", ASK.format(call=call), str(path)], env=environment, check=True,
                           capture_output=True, text=True).stdout
        )
        for _ in range(repeat)
    ]  # fmt: skip
    return {name: statistics.median(run[name] for run in runs[repeat > 1 :]) for name in runs[0]}


def ask_command(path: Path, arguments: list[str], repeat: int) -> float:
    """Median seconds of a whole command, including its start."""
    command = [sys.executable, str(ROOT / "cli.py"), "--json", "query", str(path), *arguments]
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    return statistics.median(times[repeat > 1 :])


def read_plainly(n_bytes: int, folder: Path) -> float:
    """Seconds to read this many contiguous bytes."""
    file = folder / "plain"
    file.write_bytes(bytes(n_bytes))
    started = time.perf_counter()
    file.read_bytes()
    seconds = time.perf_counter() - started
    file.unlink()
    return seconds


def main() -> None:
    options = parser(__doc__, images=50_762, grid=14, n_latents=49_152, l0=32, shards=40, repeat=6)
    options.add_argument(
        "--slow", action="store_true", help="also measure co-firing and two groups, which read much more"
    )
    options.add_argument("--folder", type=Path, help="where to keep the codes; a temporary folder by default")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        path = folder / f"synthetic-{given.images}-{given.n_latents}-{given.shards}.codes"
        codes = write_codes(path, n_images=given.images, grid=given.grid, n_latents=given.n_latents, l0=given.l0,
                            n_shards=given.shards)  # fmt: skip
        middle = given.n_latents // 2
        calls = {
            "rare": f"analysis.query_latent(codes, {middle})",
            "usual": f"analysis.query_latent(codes, {int(given.n_latents / np.log(given.n_latents))})",
            "common": f"analysis.query_latent(codes, {min(9, given.n_latents - 1)})",
            "where": f"analysis.query_latent(codes, {middle}, where=\"split == 'test'\")",
            "image": f"analysis.query_image(codes, {given.images // 2})",
            "class": "analysis.query_class(codes, 'class007')",
        }
        if given.slow:
            calls["co_firing"] = f"analysis.query_co_firing(codes, {middle})"
            calls["groups"] = "analysis.query_groups(codes, \"split == 'test'\")"
        result: dict[str, Any] = {"n_tokens": codes.n_images * codes.n_tokens, "n_entries": codes.n_entries}
        for name, call in calls.items():
            measured = ask_library(path, call, 1 if name in ("co_firing", "groups") else given.repeat)
            result[f"{name}_library_s"], result[f"{name}_bytes"] = measured["ask"], int(measured["bytes"])
            result["import_s"] = measured["import"]
        result["rare_command_s"] = ask_command(path, ["--latent", str(middle)], given.repeat)
        result["rare_limit_s"] = read_plainly(result["rare_bytes"], folder)
        emit(given, **result)


if __name__ == "__main__":
    main()
