"""A store in float32 with an SAE in the middle of the model, and the same model written out plainly; codes of images
that have columns of their own and masks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from saetrain import CodeStore

LAYER = 1
K = 4


@pytest.fixture(scope="session")
def middle_store(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path, tiny_model: dict[str, str]) -> Path:
    """tiny_images at blocks 0 and 1 of three, float32. Read-only."""
    from actcache import extract

    path = tmp_path_factory.mktemp("middle") / "middle.acts"
    options = {"shard_images": 16, "precision": "float32", "dtype": "float32"}
    extract(tiny_images, path, **tiny_model, layers=[0, LAYER], **options)  # type: ignore[arg-type]
    return path


@pytest.fixture(scope="session")
def middle_run(tmp_path_factory: pytest.TempPathFactory, middle_store: Path) -> Path:
    """A small top-k SAE on layer 1 of middle_store. Read-only."""
    from saetrain import SAEConfig, TrainConfig, train

    path = tmp_path_factory.mktemp("middle") / "run"
    config = TrainConfig(n_steps=60, batch_size=128, lr=3e-3)
    train(middle_store, path, layer=LAYER, sae=SAEConfig(n_latents=64, k=K), config=config)
    return path


class PlainSAE:
    """The formulas of docs/reference/format.md, dense, in float64."""

    def __init__(self, run: Path) -> None:
        from safetensors.torch import load_file

        self.w = {name: value.double() for name, value in load_file(run / "sae.safetensors").items()}

    def encode(self, x):  # type: ignore[no-untyped-def]
        """[..., D] -> dense codes [..., F]."""
        import torch

        z = ((x.double() - self.w["mean"]) * self.w["scale"] - self.w["b_dec"]) @ self.w["encoder"].T + self.w["b_enc"]
        top = z.topk(K, dim=-1)
        return torch.zeros_like(z).scatter(-1, top.indices, top.values.relu())

    def decode(self, z):  # type: ignore[no-untyped-def]
        return (z @ self.w["decoder"] + self.w["b_dec"]) / self.w["scale"] + self.w["mean"]


@pytest.fixture(scope="session")
def plain_sae(middle_run: Path) -> PlainSAE:
    return PlainSAE(middle_run)


@pytest.fixture(scope="session")
def plain_clip(tiny_model: dict[str, str]):  # type: ignore[no-untyped-def]
    """open_clip's own model."""
    import open_clip

    clip = open_clip.CLIP(**json.loads(Path(tiny_model["model"]).read_text())).eval()
    open_clip.load_checkpoint(clip, tiny_model["pretrained"])
    return clip.requires_grad_(False)


@pytest.fixture(scope="session")
def full_forward(plain_clip, tiny_images: Path) -> Callable[..., np.ndarray]:  # type: ignore[no-untyped-def,type-arg]
    """full_forward(uris, edit) -> unit image embeddings [B, E] of whole passes; edit replaces block 1's output."""
    import open_clip
    import torch
    from PIL import Image
    from torch.nn import functional as F

    transform = open_clip.image_transform(24, is_train=False)

    def forward(uris: list[str], edit: Callable[..., object] = lambda x: x) -> np.ndarray:  # type: ignore[type-arg]
        pixels = torch.stack([transform(Image.open(tiny_images / uri).convert("RGB")) for uri in uris])
        handle = plain_clip.visual.transformer.resblocks[LAYER].register_forward_hook(
            lambda module, args, out: edit(out)
        )
        try:
            with torch.no_grad():
                return np.asarray(F.normalize(plain_clip.visual(pixels), dim=1))
        finally:
            handle.remove()

    return forward


@pytest.fixture(scope="session")
def class_texts(plain_clip) -> np.ndarray:  # type: ignore[no-untyped-def,type-arg]
    """Unit embeddings of "a photo of a class0." and so on."""
    import open_clip

    tokens = open_clip.SimpleTokenizer()([f"a photo of a class{i}." for i in range(3)])
    return np.asarray(plain_clip.encode_text(tokens, normalize=True))


@pytest.fixture(scope="session")
def table_images(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path) -> Path:
    """A table of the 75 tiny images, read from elsewhere: domain, weight, mask; the last image is broken.

    A mask numbers the quarters of the picture 0 to 3; every fifth image has none.
    """
    folder = tmp_path_factory.mktemp("table")
    files = sorted(tiny_images.rglob("*.png"))
    masks = np.kron(np.array([[0, 1], [2, 3]], dtype=np.uint8), np.ones((12, 12), np.uint8))
    (folder / "masks").mkdir()
    Image.fromarray(masks).save(folder / "masks" / "quarters.png")
    (folder / "broken.png").write_bytes(b"not an image")
    n = len(files)
    table = {
        "path": [*map(str, files), str(folder / "broken.png")],
        "label": [*(file.parent.name for file in files), "class0"],
        "mask": ["masks/quarters.png" if i % 5 else "" for i in range(n + 1)],
        "domain": [["sketch", "photo"][i % 2] for i in range(n + 1)],
        "weight": np.linspace(0, 1, n + 1),
    }
    pq.write_table(pa.table(table), folder / "images.parquet")
    return folder / "images.parquet"


@pytest.fixture(scope="session")
def table_codes(
    tmp_path_factory: pytest.TempPathFactory, table_images: Path, tiny_model: dict[str, str], tiny_run: Path
) -> "CodeStore":
    """76 images, one failed, in shards of 16. Read-only."""
    from actcache import extract
    from saetrain import encode

    folder = tmp_path_factory.mktemp("table-codes")
    extract(table_images, folder / "x.acts", **tiny_model, layers=[2], shard_images=16, precision="float32",
            on_error="skip")  # fmt: skip
    return encode(tiny_run, folder / "x.acts", folder / "x.codes")


@pytest.fixture(scope="session")
def dense_values() -> Callable[["CodeStore"], NDArray[np.float64]]:
    """dense(codes) -> [I, T, F], from the arrays that are sorted by row."""

    def dense(codes: "CodeStore") -> NDArray[np.float64]:
        values = np.zeros((codes.n_images * codes.n_tokens, codes.n_latents))
        for number in range(codes.n_shards):
            shard = codes.read_shard(number)
            rows = shard.first_row + np.repeat(np.arange(len(shard.indptr) - 1), np.diff(shard.indptr))
            values[rows, shard.latent] = shard.value
        return values.reshape(codes.n_images, codes.n_tokens, codes.n_latents)

    return dense
