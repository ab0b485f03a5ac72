"""planted_store: activations that are sparse combinations of a known dictionary. No model involved."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from actcache import HookPoint, StoreLayout
from actcache.images import IMAGES_SCHEMA, ImagePlan
from actcache.writer import ShardWriter, begin_store, seal_store

N_IMAGES, GRID, D_MODEL, N_ATOMS = 320, (4, 4), 32, 48
FAILED = (5, 77, 310)


def planted_atoms() -> np.ndarray:
    atoms = np.random.default_rng(1).normal(size=(N_ATOMS, D_MODEL))
    return atoms / np.linalg.norm(atoms, axis=1, keepdims=True)


def planted_activations() -> np.ndarray:
    """[I, T, D]: three atoms a token, an offset, a little noise."""
    rng = np.random.default_rng(2)
    n_rows = N_IMAGES * 17
    active = np.argsort(rng.random((n_rows, N_ATOMS)), axis=1)[:, :3]
    weights = rng.uniform(1, 3, (n_rows, 3))
    x = np.einsum("rk,rkd->rd", weights, planted_atoms()[active]) + rng.normal(0, 0.02, (n_rows, D_MODEL)) + 2.0
    return x.reshape(N_IMAGES, 17, D_MODEL)


@pytest.fixture(scope="session")
def atoms() -> np.ndarray:
    return planted_atoms()


@pytest.fixture(scope="session")
def planted_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("planted") / "planted.acts"
    table = pa.table(
        {
            "source_index": np.arange(N_IMAGES),
            "uri": [f"{i}.png" for i in range(N_IMAGES)],
            "label": np.full(N_IMAGES, -1, dtype=np.int32),
            "label_name": [""] * N_IMAGES,
            "bytes": np.arange(N_IMAGES),
        },
        schema=IMAGES_SCHEMA,
    )
    settings = {
        "model_id": "planted",
        "rows_id": "planted-rows",
        "hook_points": ["blocks.0.hook_resid_post"],
        "dtype": "float16",
        "precision": "float32",
        "codec": "raw",
        "n_images": N_IMAGES,
        "grid": list(GRID),
        "patch_size": [8, 8],
        "d_model": D_MODEL,
        "n_extra": 0,
        "chunk_images": 16,
        "shard_images": 64,
        "preprocess": {},
    }
    plan = ImagePlan(table, "planted-rows", 0)
    provenance = {"images": "planted", "model": "none", "pretrained": "none"}
    artifact = begin_store(path, plan=plan, images_path=path.parent, settings=settings, provenance=provenance)
    x = planted_activations()
    x[list(FAILED)] = 0
    layout = StoreLayout(n_images=N_IMAGES, grid=GRID, d_model=D_MODEL, chunk_images=16, shard_images=64)
    for shard in range(layout.n_shards):
        with ShardWriter(artifact, shard) as writer:
            for block in range(layout.n_blocks(shard)):
                images = np.array(layout.block_range(shard, block))
                patches = x[images, 1:].reshape(len(images), *GRID, D_MODEL).transpose(1, 0, 2, 3)
                valid = ~np.isin(images, FAILED)
                writer.write(HookPoint(0), block, patches, x[images, 0], valid=valid)
            writer.commit({image: "broken" for image in FAILED if image in layout.shard_range(shard)})
    seal_store(path)
    return path
