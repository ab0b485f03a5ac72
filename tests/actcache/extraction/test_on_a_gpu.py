"""Extraction on a pretend GPU: the stream of the CPU, and copies only where pixels go in and activations come out."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pretend_device import PretendDevice, tell

from actcache import ActivationStore, HookPoint, extract, load_vision_tower

LAYERS, SITES = [0, 2], ["resid_post", "attn_out"]
HOOKS = [HookPoint(layer, site) for layer in LAYERS for site in SITES]
BATCH, N_IMAGES = 16, 40


def run(images: Path, store: Path, model: dict[str, str], device: str, **options: Any) -> ActivationStore:
    return extract(
        images, store, **model, layers=LAYERS, sites=SITES, precision="float32", dtype="float32", device=device,
        batch_size=BATCH, n_threads=1, **options,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_a_store_from_a_device_is_that_of_the_cpu(
    tmp_path: Path, tiny_images: Path, tiny_model: dict[str, str], kind: str
) -> None:
    expected = run(tiny_images, tmp_path / "cpu.acts", tiny_model, "cpu", limit=N_IMAGES)
    with PretendDevice(kind) as gpu:
        found = run(tiny_images, tmp_path / "device.acts", tiny_model, kind, limit=N_IMAGES)
    for hook in HOOKS:
        ours, theirs = (store.read(hook, images=range(N_IMAGES)) for store in (found, expected))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    n_batches = -(-N_IMAGES // BATCH)
    done = Counter(event.kind for event in gpu.waits if "Block" in event.place or "VisionTower" in event.place)
    # patches and CLS of each hook point; pixels, also those of the trial before; and no wait in the tower itself
    assert done == {"to host": 2 * len(HOOKS) * n_batches, "to device": n_batches + 1}, tell(gpu.waits)


def test_an_image_that_cannot_be_read_keeps_its_row(
    tmp_path: Path, tiny_images: Path, tiny_model: dict[str, str]
) -> None:
    folder = tmp_path / "images" / "class0"
    folder.mkdir(parents=True)
    files = sorted(tiny_images.rglob("*.png"))[:5]
    for number, file in enumerate(files):
        (folder / f"{number}.png").write_bytes(file.read_bytes() if number != 2 else b"not an image")
    expected = run(tmp_path / "images", tmp_path / "cpu.acts", tiny_model, "cpu", on_error="skip")
    with PretendDevice():
        found = run(tmp_path / "images", tmp_path / "gpu.acts", tiny_model, "cuda", on_error="skip")
    good = np.flatnonzero(expected.valid)
    assert np.array_equal(found.valid, expected.valid)
    assert len(good) == 4
    for hook in HOOKS:
        ours, theirs = (store.read(hook, images=good) for store in (found, expected))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_tower_on_a_gpu_computes_in_bfloat16_by_itself(tiny_model: dict[str, str]) -> None:
    """Its branches; the stream stays float32."""
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    expected = load_vision_tower(**tiny_model, precision="float32", device="cpu").run(pixels, HOOKS)
    with PretendDevice():
        tower = load_vision_tower(**tiny_model)  # device and precision are chosen
        assert (tower.device.type, tower.precision) == ("cuda", "bfloat16")
        found = tower.run(pixels, HOOKS)
        for hook, value in expected.items():
            assert found[hook].device.type == "cuda"
            assert found[hook].dtype == torch.float32
            difference = (found[hook].cpu() - value).square().mean().sqrt() / value.square().mean().sqrt()
            assert difference < 0.03
