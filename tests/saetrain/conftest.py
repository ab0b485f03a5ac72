"""planted_store holds activations that are sparse combinations of a known dictionary. No model is involved.

make_store writes more of the same kind; random_sae gives a network with every parameter away from its initial value.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pytest

from actcache import HookPoint
from actcache.sources.plan import IMAGES_SCHEMA, ImagePlan
from actcache.store import StoreLayout, StoreSettings
from actcache.store.writer import ShardWriter, begin_store, seal_store
from saetrain import CodeStore, Run, SAEConfig, TrainConfig

if TYPE_CHECKING:
    from saetrain import SAE

N_IMAGES, GRID, D_MODEL, N_ATOMS = 320, (4, 4), 32, 48
N_TOKENS = 1 + GRID[0] * GRID[1]
FAILED = (5, 77, 310)


def planted_atoms() -> np.ndarray:
    atoms = np.random.default_rng(1).normal(size=(N_ATOMS, D_MODEL))
    return atoms / np.linalg.norm(atoms, axis=1, keepdims=True)


def planted_activations(n_images: int = N_IMAGES, seed: int = 2, offset: float = 2.0) -> np.ndarray:
    """Activations [I, T, D]: three atoms per token, an offset and a little noise."""
    rng = np.random.default_rng(seed)
    n_rows = n_images * N_TOKENS
    active = np.argsort(rng.random((n_rows, N_ATOMS)), axis=1)[:, :3]
    weights = rng.uniform(1, 3, (n_rows, 3))
    x = np.einsum("rk,rkd->rd", weights, planted_atoms()[active]) + rng.normal(0, 0.02, (n_rows, D_MODEL)) + offset
    return x.reshape(n_images, N_TOKENS, D_MODEL)


def write_store(
    path: Path,
    *,
    n_images: int = N_IMAGES,
    failed: tuple[int, ...] = FAILED,
    layers: tuple[int, ...] = (0,),
    model_id: str = "planted",
    rows_id: str = "planted-rows",
    dtype: str = "float16",
    codec: str = "raw",
    seed: int = 2,
    offset: float = 2.0,
    n_shards: int | None = None,
) -> Path:
    """A store in shards of 64 images; layer l holds planted activations plus l. Sealed if n_shards is None."""
    table = pa.table(
        {
            "source_index": np.arange(n_images),
            "uri": [f"{i}.png" for i in range(n_images)],
            "label": np.full(n_images, -1, dtype=np.int32),
            "label_name": [""] * n_images,
            "bytes": np.arange(n_images),
        },
        schema=IMAGES_SCHEMA,
    )
    itemsize = np.dtype(dtype).itemsize
    layout = StoreLayout(n_images, GRID, D_MODEL, chunk_images=16, shard_images=64, itemsize=itemsize)
    settings = StoreSettings(
        model_id=model_id,
        rows_id=rows_id,
        hook_points=tuple(map(HookPoint, layers)),
        dtype=dtype,
        precision="float32",
        codec=codec,
        layout=layout,
        patch_size=(8, 8),
        seed=0,
        limit=None,
        preprocess={},
    )
    plan = ImagePlan(table, rows_id, 0)
    provenance = {"images": "planted", "model": "none", "pretrained": "none"}
    artifact = begin_store(path, plan=plan, images_path=path.parent, settings=settings, provenance=provenance)
    x = planted_activations(n_images, seed, offset)
    for shard in range(layout.n_shards if n_shards is None else n_shards):
        with ShardWriter(artifact, shard) as writer:
            for block in range(layout.n_blocks(shard)):
                images = np.array(layout.block_range(shard, block))
                valid = ~np.isin(images, failed)
                for layer in layers:
                    part = np.where(valid[:, None, None], x[images] + layer, 0)
                    patches = part[:, 1:].reshape(len(images), *GRID, D_MODEL).transpose(1, 0, 2, 3)
                    writer.write(HookPoint(layer), block, patches, part[:, 0], valid=valid)
            writer.commit({image: "broken" for image in failed if image in layout.shard_range(shard)})
    seal_store(path)
    return path


def build_random_sae(config: SAEConfig, d_model: int = 12, seed: int = 0) -> "SAE":
    """A random SAE, with every parameter and the normalization away from its initial value."""
    import torch

    from saetrain import SAE

    sae = SAE(config.resolve(d_model), d_model, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in (sae.encoder, sae.b_enc, sae.b_dec):
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    if sae.config.normalize == "center":
        sae.set_normalization(np.linspace(-1, 1, d_model), 3.0)
    return sae


@pytest.fixture(scope="session")
def atoms() -> np.ndarray:
    return planted_atoms()


@pytest.fixture(scope="session")
def make_store() -> Callable[..., Path]:
    return write_store


@pytest.fixture(scope="session")
def random_sae() -> "Callable[..., SAE]":
    return build_random_sae


@pytest.fixture(scope="session")
def planted_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """320 images in five shards, three of them failed. Read-only."""
    return write_store(tmp_path_factory.mktemp("planted") / "planted.acts")


@pytest.fixture(scope="session")
def planted_run(tmp_path_factory: pytest.TempPathFactory, planted_store: Path) -> Run:
    """A top-k SAE of planted_store, trained briefly. Read-only."""
    from saetrain import train

    config = TrainConfig(n_steps=90, batch_size=256, lr=3e-3, dead_tokens=5000, pool_tokens=2000)
    sae = SAEConfig(n_latents=96, k=3)
    return train(planted_store, tmp_path_factory.mktemp("run") / "run", sae=sae, config=config)


@pytest.fixture(scope="session")
def planted_codes(tmp_path_factory: pytest.TempPathFactory, planted_run: Run, planted_store: Path) -> CodeStore:
    """Codes of planted_store. Read-only."""
    from saetrain import encode

    return encode(planted_run, planted_store, tmp_path_factory.mktemp("codes") / "x.codes")


@pytest.fixture(scope="session")
def dense_codes() -> Callable[[CodeStore], np.ndarray]:
    """dense(codes) -> float16 [I, T, F], from the arrays that are sorted by row."""

    def dense(codes: CodeStore) -> np.ndarray:
        values = np.zeros((codes.n_images * codes.n_tokens, codes.n_latents), dtype=np.float16)
        for number in range(codes.n_shards):
            shard = codes.read_shard(number)
            rows = shard.first_row + np.repeat(np.arange(len(shard.indptr) - 1), np.diff(shard.indptr))
            values[rows, shard.latent] = shard.value
        return values.reshape(codes.n_images, codes.n_tokens, codes.n_latents)

    return dense
