"""Writes the golden store of the schema that the code has now: tests/golden/schema-N/tiny.acts.

    python tests/golden/make.py [--overwrite]

Needs no model: every value is a formula of (layer, image, token, channel), exact in float16. While a schema is not
released its store is made again whenever the format changes; afterwards it is never touched. Made again by other
versions of zarr or pyarrow, images.parquet and zarr.json may differ in bytes, not in content.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from actcache import HookPoint
from actcache.artifacts.opening import SCHEMA
from actcache.sources.plan import plan_images
from actcache.store import StoreSettings
from actcache.store.writer import ShardWriter, begin_store, seal_store

HERE = Path(__file__).parent
N_LISTED, N_IMAGES, SEED, FAILED = 50, 39, 4, 20
LAYERS = (2, 11)
GRID, N_EXTRA, D_MODEL = (2, 3), 2, 8
PREFIXES = {1: ["cls"], 2: ["reg", "dist"]}
"""The special tokens of the store of each schema."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--overwrite", action="store_true")
    options = arguments.parse_args()
    write_golden(HERE / f"schema-{SCHEMA}" / "tiny.acts", overwrite=options.overwrite)


def write_golden(path: Path, *, schema: int = SCHEMA, overwrite: bool = False) -> None:
    listing = pa.table(
        {
            "uri": [f"{'ville' if i % 2 else 'forêt'}/{i:03d}.png" for i in range(N_LISTED)],
            "label": pa.array([i % 2 for i in range(N_LISTED)], pa.int32()),
            "label_name": ["forêt", "ville"] * (N_LISTED // 2),
            "bytes": [1000 + i for i in range(N_LISTED)],
            "camera": [f"camera {i % 3}" for i in range(N_LISTED)],  # a column of the user's
        }
    )
    plan = plan_images(listing, limit=N_IMAGES, seed=SEED)
    settings: dict[str, Any] = {
        "model_id": "0123456789abcdef",
        "rows_id": plan.rows_id,
        "hook_points": [str(HookPoint(layer)) for layer in LAYERS],
        "dtype": "float16",
        "precision": "float32",
        "codec": "raw",
        "n_images": N_IMAGES,
        "grid": list(GRID),
        "patch_size": [16, 16],
        "d_model": D_MODEL,
        "n_extra": N_EXTRA,
        "chunk_images": 16,
        "shard_images": 16,
        "seed": SEED,
        "limit": N_IMAGES,
        "preprocess": {
            "size": [32, 48],
            "mode": "RGB",
            "mean": [0.48145466, 0.4578275, 0.40821073],
            "std": [0.26862954, 0.26130258, 0.27577711],
            "interpolation": "bicubic",
            "resize_mode": "shortest",
            "fill_color": 0,
        },
    }
    prefix = PREFIXES[schema]
    if prefix != ["cls"]:
        settings["prefix"] = prefix
    path.parent.mkdir(parents=True, exist_ok=True)
    artifact = begin_store(
        path,
        plan=plan,
        images_path=path.parent / "images",
        settings=StoreSettings.from_json(settings),
        provenance={"model": "none", "pretrained": "none", "images": "images"},
        overwrite=overwrite,
    )
    layout = StoreSettings.from_json(settings).layout
    for shard in range(layout.n_shards):
        images = np.array(layout.shard_range(shard))
        with ShardWriter(artifact, shard) as writer:
            for layer in LAYERS:
                x = golden_values(layer, images, len(prefix))
                first, stop = len(prefix), len(prefix) + GRID[0] * GRID[1]
                patches = x[:, first:stop].reshape(len(images), *GRID, D_MODEL).transpose(1, 0, 2, 3)
                special: dict[str, Any] = {"cls": x[:, 0]} if prefix == ["cls"] else {"registers": x[:, :first]}
                cls = special.pop("cls", None)
                writer.write(HookPoint(layer), 0, patches, cls, valid=images != FAILED, extra=x[:, stop:], **special)
            writer.commit({FAILED: "truncated file"} if FAILED in images else {})
    seal_store(path)


def golden_values(layer: int, images: np.ndarray, n_special: int) -> np.ndarray:
    """float16 [I, T, D]: special tokens, the patches row by row, the prompt tokens. The failed image is zeros."""
    tokens, channels = np.arange(n_special + GRID[0] * GRID[1] + N_EXTRA)[:, None], np.arange(D_MODEL)
    whole = 37 * images[:, None, None] + 11 * tokens + 5 * channels + 3 * layer
    return np.where(images[:, None, None] == FAILED, 0, whole % 251 / 16 - 5).astype(np.float16)


if __name__ == "__main__":
    main()
