"""Of a model that was trained with the sigmoid loss, `loss` is that loss, as open_clip computes it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from actcache import extract
from analysis import Fidelity, ModelOptions, evaluate_fidelity, mask_latents, set_latents
from analysis.classifier.outcomes import sigmoid_loss, softmax_loss
from saetrain import SAEConfig, TrainConfig, train

CPU = ModelOptions(device="cpu")
N_CLASSES = 3


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path, tiny_model: dict[str, str]) -> Any:
    """(clip, run, store) of the tiny model with a bias for its logits, as SigLIP has."""
    folder = tmp_path_factory.mktemp("biased")
    config = json.loads(Path(tiny_model["model"]).read_text()) | {"init_logit_bias": -10.0}
    (folder / "biased.json").write_text(json.dumps(config))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        clip = open_clip.CLIP(**json.loads(json.dumps(config))).eval().requires_grad_(False)
    save_file({name: value.contiguous() for name, value in clip.state_dict().items()}, folder / "w.safetensors")
    model = {"model": str(folder / "biased.json"), "pretrained": str(folder / "w.safetensors")}
    extract(tiny_images, folder / "x.acts", **model, layers=[1], precision="float32", dtype="float32")  # type: ignore[arg-type]
    config = TrainConfig(n_steps=60, batch_size=128, lr=3e-3)
    run = train(folder / "x.acts", folder / "run", layer=1, sae=SAEConfig(n_latents=64, k=4), config=config)
    return clip, run.path, folder / "x.acts"


def test_the_loss_is_open_clips() -> None:
    torch.manual_seed(0)
    images, texts = (F.normalize(torch.randn(7, 16, dtype=torch.double), dim=1) for _ in range(2))
    expected = open_clip.loss.SigLipLoss()(images, texts, torch.tensor(117.0, dtype=torch.double), -12.9)
    logits = 117.0 * images @ texts.T - 12.9
    assert float(sigmoid_loss(logits, torch.arange(7)).mean()) == pytest.approx(float(expected), rel=1e-12)


def test_it_sees_a_shift_of_all_cosines_which_a_softmax_cannot() -> None:
    torch.manual_seed(0)
    cosines, truth = 0.05 + 0.02 * torch.randn(40, 50, dtype=torch.double), torch.arange(40)
    cosines[truth, truth] += 0.07
    losses = {}
    for shift in (-0.05, 0.0, 0.05):
        logits = 117 * (cosines + shift) - 12.9
        losses[shift] = [float(loss(logits, truth).mean()) for loss in (softmax_loss, sigmoid_loss)]
    assert losses[-0.05][0] == pytest.approx(losses[0.0][0], abs=1e-9)
    assert losses[0.05][0] == pytest.approx(losses[0.0][0], abs=1e-9)
    assert losses[0.05][1] > 5 * losses[0.0][1]
    assert losses[-0.05][1] > 1.5 * losses[0.0][1]


def test_both_losses_are_reported_and_the_trained_one_is_named_loss(
    biased: Any, tiny_images: Path, tmp_path: Path
) -> None:
    clip, run, store = biased
    found = evaluate_fidelity(run, store, tmp_path / "f.json", model=CPU)
    assert found.judge is not None
    assert (found.judge.kind, found.judge.loss) == ("zero-shot", "sigmoid")
    from actcache import ActivationStore

    table = ActivationStore.open(store).images.to_pylist()[71:]
    transform, tokens = open_clip.image_transform(24, is_train=False), open_clip.SimpleTokenizer()
    pixels = torch.stack([transform(Image.open(tiny_images / row["uri"]).convert("RGB")) for row in table])
    texts = clip.encode_text(tokens([f"a photo of a {name}." for name in found.classes]), normalize=True)
    logits = np.asarray(clip.logit_scale.exp() * clip.encode_image(pixels, normalize=True) @ texts.T + clip.logit_bias)
    logits = logits.astype(np.float64)
    truth = np.array([found.classes.index(row["label_name"]) for row in table])
    y = np.where(np.arange(len(found.classes)) == truth[:, None], 1.0, -1.0)
    numbers = found.runs[0].variants["original"]
    assert numbers.loss == pytest.approx(np.log1p(np.exp(-y * logits)).sum(1).mean(), rel=1e-4)
    softmax = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(truth)), truth]
    assert numbers.softmax_loss == pytest.approx(softmax.mean(), rel=1e-4)
    assert numbers.accuracy == pytest.approx((logits.argmax(1) == truth).mean())
    assert Fidelity.from_json(json.loads((tmp_path / "f.json").read_text()), "f") == found
    assert {"loss", "softmax_loss"} <= set(found.tables()[0][0])
    sae, zero, original = (found.runs[0].variants[name].loss for name in ("sae", "zero", "original"))
    expected = (zero - sae) / (zero - original) if zero > original else None
    assert found.runs[0].recovered.loss_zero == (None if expected is None else pytest.approx(expected))


def test_masks_and_steering_report_both_losses_too(biased: Any) -> None:
    _, run, store = biased
    curve = mask_latents(run, store, model=CPU).curve
    assert all(row.softmax_loss is not None and row.softmax_loss != row.loss for row in curve)
    moved = set_latents(run, store, set={3: 1.0}, model=CPU)
    assert moved.before.softmax_loss is not None
    assert moved.before.softmax_loss != moved.before.loss


def test_a_model_with_the_softmax_loss_has_one_loss(
    middle_run: Path, middle_store: Path, make_images: Callable[..., Path]
) -> None:
    found = evaluate_fidelity(middle_run, middle_store, model=CPU)
    assert found.judge is not None
    assert found.judge.loss == "softmax"
    assert "softmax_loss" not in json.dumps(found.to_json())
