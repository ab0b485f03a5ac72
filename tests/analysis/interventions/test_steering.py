"""Steering equals whole forward passes with dense codes set by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actcache import ActivationStore, SettingsError
from analysis import ModelOptions, SteerabilityConfig, measure_steerability, set_latents

CPU = ModelOptions(device="cpu")
HELD_OUT = slice(71, 75)


def softmax(logits: Any) -> Any:
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("keep_error", [True, False])
def test_the_shift_is_that_of_whole_forward_passes(
    middle_run: Path, middle_store: Path, plain_sae: Any, plain_clip: Any, full_forward: Callable[..., Any],
    class_texts: Any, keep_error: bool,
) -> None:  # fmt: skip
    found = set_latents(middle_run, middle_store, set={7: 5.0}, add={9: -1.5}, keep_error=keep_error, model=CPU)
    store = ActivationStore.open(middle_store)
    uris = store.images["uri"].to_pylist()[HELD_OUT]
    names = sorted(set(store.images["label_name"].to_pylist()[HELD_OUT]))
    texts, scale = class_texts[[int(name[-1]) for name in names]], float(plain_clip.logit_scale.exp())

    def edit(x: torch.Tensor) -> torch.Tensor:
        z = plain_sae.encode(x)
        steered = z.clone()
        steered[..., 7] = 5.0
        steered[..., 9] = (z[..., 9] - 1.5).clamp(min=0)
        error = x - plain_sae.decode(z) if keep_error else 0.0
        return (plain_sae.decode(steered) + error).float()  # type: ignore[no-any-return]

    before, after = (softmax(scale * full_forward(uris, e).astype(np.float64) @ texts.T) for e in (lambda x: x, edit))
    for i, name in enumerate(names):
        assert found.shift[name] == pytest.approx((after - before)[:, i].mean(), abs=2e-5)
        assert found.predicted[name] == tuple(int((p.argmax(1) == i).sum()) for p in (before, after))


def test_steerability_is_the_formula(
    tmp_path: Path, middle_run: Path, middle_store: Path, plain_sae: Any, plain_clip: Any,
    full_forward: Callable[..., Any],
) -> None:  # fmt: skip
    import open_clip
    from torch.nn import functional as F

    words = ("red", "a dog", "sky", "wood")
    (tmp_path / "words.txt").write_text("\n".join(words))
    steered_words = measure_steerability(
        middle_run, middle_store, tmp_path / "s.json", SteerabilityConfig(latents=(3, 60), strengths=(2.0, 40.0)),
        vocabulary=tmp_path / "words.txt", model=CPU,
    )  # fmt: skip
    tokens = open_clip.SimpleTokenizer()([f"a photo of a {word}." for word in words])
    texts = np.asarray(F.normalize(plain_clip.encode_text(tokens), dim=1).detach())
    uris = ActivationStore.open(middle_store).images["uri"].to_pylist()[HELD_OUT]
    scale = float(plain_clip.logit_scale.exp())
    before = softmax(scale * full_forward(uris).astype(np.float64) @ texts.T)
    rows = {(row.kind, row.unit, row.strength): row for row in steered_words.rows}
    for latent in (3, 60):
        for strength in (2.0, 40.0):

            def edit(x: torch.Tensor, latent: int = latent, strength: float = strength) -> torch.Tensor:
                z = plain_sae.encode(x)
                steered = z.clone()
                steered[..., latent] = strength
                return (x + plain_sae.decode(steered) - plain_sae.decode(z)).float()

            d = (softmax(scale * full_forward(uris, edit).astype(np.float64) @ texts.T) - before).mean(0)
            row = rows["latent", latent, strength]
            assert row.steerability == pytest.approx(np.square(d).sum(), rel=1e-3, abs=1e-9)
            assert row.power == pytest.approx(d.max(), rel=1e-3, abs=1e-7)
    mean, scale_x = np.asarray(plain_sae.w["mean"]), float(plain_sae.w["scale"])
    dimension = next(unit for kind, unit, _ in rows if kind == "dimension")

    def set_dimension(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[..., dimension] = 40.0 / scale_x + mean[dimension]
        return x

    d = (softmax(scale * full_forward(uris, set_dimension).astype(np.float64) @ texts.T) - before).mean(0)
    assert rows["dimension", dimension, 40.0].steerability == pytest.approx(np.square(d).sum(), rel=1e-3, abs=1e-9)
    assert {(row.kind, row.strength) for row in steered_words.summary} == {
        (kind, strength) for kind in ("latent", "dimension") for strength in (2.0, 40.0)
    }


def test_bad_latents_are_refused(middle_run: Path, middle_store: Path) -> None:
    with pytest.raises(SettingsError, match="got 64"):
        set_latents(middle_run, middle_store, set={64: 1.0})
    with pytest.raises(SettingsError, match="names a latent twice"):
        set_latents(middle_run, middle_store, set={6: 1.0}, add={6: 1.0})
    with pytest.raises(SettingsError, match="got -1"):
        measure_steerability(middle_run, middle_store, None, SteerabilityConfig(latents=(-1,)))
