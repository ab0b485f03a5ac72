"""Shared fixtures: small real things, made once a session.

tiny_model is a real open_clip ViT (3 blocks, width 32, 24 px in patches of 8: 9 patches) with random weights in a file.
real_data points at the photographs and the trained CLIP that lie beside the checkout; tests that use it are skipped
where they are absent.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from warm_process import WarmProcess

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is loaded here, and for the processes that tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

LONGEST = (
    "tests/test_recipes.py", "tests/test_commands.py", "tests/analysis/benchmark", "tests/writing", "tests/fuzz",
    "tests/test_cli.py",
    "tests/test_notebooks.py", "tests/test_docs_site.py", "tests/actcache/models", "tests/test_benchmarks.py",
    "tests/test_docs.py", "tests/saetrain/interop", "tests/analysis", "tests/saetrain",
)  # fmt: skip
"""Files and folders that are tested first, those with the longest tests before the others."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Among several workers, begin with what takes long: a long file at the end would leave the others idle."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: next((n for n, path in enumerate(LONGEST) if item.nodeid.startswith(path)), 99))


TINY_CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 24, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, driven by Playwright."""
    api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    path = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)
    if path is None:
        pytest.skip("there is no chromium")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def real_data() -> Path:
    path = Path(os.environ.get("PATCHSAE_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (path / "cifar10").is_dir():
        pytest.skip(f"real images are absent ({path.name}); set PATCHSAE_DATA to the folder that holds cifar10")
    return path


@pytest.fixture(scope="session")
def peers_python() -> str:
    """The python of an environment with transformers and the packages that publish SAEs."""
    python = os.environ.get("PATCHSAE_PEERS_PYTHON")
    if not python:
        pytest.skip("PATCHSAE_PEERS_PYTHON does not name the python of an environment of benchmarks/peers-env.sh")
    return python


@pytest.fixture(scope="session")
def run_peers(peers_python: str) -> Callable[..., str]:
    """run_peers(SCRIPT or "-c", ARGUMENT, ...) -> what that python printed. It reaches no hub, and must succeed."""

    def run(*arguments: object, **environment: str) -> str:
        fixed = {"HF_HUB_OFFLINE": "1", "SPARSIFY_DISABLE_TRITON": "1", "MPLBACKEND": "Agg"}
        done = subprocess.run(
            [peers_python, *map(str, arguments)], capture_output=True, text=True, check=False,
            env={**os.environ, **fixed, **environment},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run


@pytest.fixture(scope="session")
def warm() -> "Iterator[WarmProcess]":
    """Real processes that need not import torch."""
    from warm_process import open_warm_process

    with open_warm_process() as process:
        yield process


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Keyword arguments `model` and `pretrained` of extract()."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("model")
    (folder / "tiny.json").write_text(json.dumps(TINY_CONFIG))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = open_clip.CLIP(**json.loads(json.dumps(TINY_CONFIG)))
    save_file({name: value.contiguous() for name, value in clip.state_dict().items()}, folder / "tiny.safetensors")
    return {"model": str(folder / "tiny.json"), "pretrained": str(folder / "tiny.safetensors")}


def write_images(folder: Path, n_images: int, *, n_classes: int = 3, size: int = 24, seed: int = 0) -> Path:
    """PNGs in class folders: noise around a color that belongs to the class."""
    rng = np.random.default_rng(seed)
    colors = rng.integers(40, 215, (n_classes, 3))
    for i in range(n_images):
        label = i % n_classes
        pixels = np.clip(colors[label] + rng.normal(0, 30, (size, size, 3)), 0, 255).astype(np.uint8)
        (folder / f"class{label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"class{label}" / f"{i:04d}.png")
    return folder


@pytest.fixture(scope="session")
def make_images() -> Callable[..., Path]:
    return write_images


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """75 images in three class folders."""
    return write_images(tmp_path_factory.mktemp("images") / "images", 75)


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path, tiny_model: dict[str, str]) -> Path:
    """Two hook points of tiny_images, in five shards of 16 images. Read-only."""
    from actcache import extract

    path = tmp_path_factory.mktemp("store") / "tiny.acts"
    extract(tiny_images, path, **tiny_model, layers=[2, 0], shard_images=16, precision="float32")
    return path


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path) -> Path:
    """A small top-k SAE on layer 2 of tiny_store. Read-only."""
    from saetrain import SAEConfig, TrainConfig, train

    path = tmp_path_factory.mktemp("run") / "run"
    sae = SAEConfig(n_latents=64, k=4)
    train(tiny_store, path, layer=2, sae=sae, config=TrainConfig(n_steps=60, batch_size=128, lr=3e-3))
    return path


@pytest.fixture(scope="session")
def tiny_codes(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path, tiny_store: Path) -> Path:
    """Codes of tiny_store. Read-only."""
    from saetrain import encode

    path = tmp_path_factory.mktemp("codes") / "tiny.codes"
    encode(tiny_run, tiny_store, path)
    return path
