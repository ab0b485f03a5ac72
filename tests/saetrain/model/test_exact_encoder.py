"""The coarse encoder misses nothing: it finds the same entries as a float64 product, for every variant and scale."""

import numpy as np
import pytest
import torch

from saetrain import SAE, SAEConfig
from saetrain.model.exact_encoder import BATCH_ROWS, CoarseEncoder


def make_sae(variant: str, seed: int, scale: float) -> SAE:
    """Norms, biases and thresholds differ from latent to latent, as after training."""
    torch.manual_seed(seed)
    sae = SAE(SAEConfig(variant, 512, 8).resolve(96), 96, seed=seed).requires_grad_(False)
    sae.encoder.mul_(0.5 + torch.rand(512, 1))
    sae.b_enc.copy_(0.3 * torch.randn(512) - (1.5 if variant in ("relu", "gated") else 0.0))
    sae.b_dec.copy_(0.1 * torch.randn(96))
    sae.mean.copy_(torch.randn(96))
    sae.scale.fill_(scale)
    if variant == "jumprelu":
        sae.threshold.copy_(1 + torch.rand(512))
    if variant == "batchtopk":
        sae.threshold.fill_(1.8)
    if variant == "gated":
        sae.b_mag.copy_(0.1 * torch.randn(512))
    return sae


def exact(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    """[B, F] in float64; NaN where float32 cannot tell whether the latent is active."""
    c, variant = (sae.normalize(x) - sae.b_dec).double(), sae.config.variant
    z = c @ sae.encoder.double().T + sae.b_enc.double()
    threshold = sae.threshold.double() if variant in ("batchtopk", "jumprelu") else torch.zeros(())
    if variant == "topk":
        top = z.topk(9, dim=1).values
        threshold = top[:, 7:8].clamp(min=0) - 1e-12
        close = (top[:, 7] - top[:, 8] < 1e-5)[:, None] & ((z - threshold).abs() < 2e-5)
    else:
        close = (z - threshold).abs() < 1e-5
    dense = torch.where(z > threshold, sae.activate(z.float(), slice(None)).double(), 0.0)
    return torch.where(close | (z.abs() < 1e-5), torch.nan, dense)


@pytest.mark.parametrize("variant", ["topk", "batchtopk", "relu", "jumprelu", "gated"])
@pytest.mark.parametrize("scale", [0.05, 1.0, 12.0])
def test_it_finds_what_float64_finds(variant: str, scale: float) -> None:
    sae = make_sae(variant, 3, scale)
    x = torch.randn(BATCH_ROWS + 300, 96) / scale + sae.mean
    x[5] = sae.mean  # nothing but biases
    x[7] *= 40
    encoder = CoarseEncoder(sae)
    rows, latents, values = encoder(x.half())
    assert (np.diff(rows.numpy() * 512 + latents.numpy()) > 0).all()
    computed = torch.zeros(len(x), 512, dtype=torch.float64)
    computed[rows, latents] = values.double()
    expected = exact(sae, x.half())
    known = ~torch.isnan(expected)
    assert known.float().mean() > 0.99
    torch.testing.assert_close(computed[known], expected[known], rtol=2e-5, atol=2e-5)
    if variant == "topk":
        assert not encoder.dense  # the coarse way was taken
        assert torch.bincount(rows).max() <= 8


@pytest.mark.parametrize("variant", ["topk", "batchtopk", "jumprelu"])
def test_it_gives_what_the_sae_gives(variant: str) -> None:
    sae = make_sae(variant, 1, 1.0)
    x = (torch.randn(500, 96) + sae.mean).half()
    mine, theirs = CoarseEncoder(sae)(x), sae.encode(x)
    assert torch.equal(mine[0], theirs[0])
    assert torch.equal(mine[1], theirs[1])
    torch.testing.assert_close(mine[2], theirs[2], rtol=1e-5, atol=1e-5)


def test_a_value_does_not_depend_on_its_batch() -> None:
    sae = make_sae("topk", 2, 1.0)
    x = torch.randn(600, 96)
    whole, parts = CoarseEncoder(sae)(x), [CoarseEncoder(sae)(part) for part in x.split(77)]
    assert torch.equal(whole[2], torch.cat([part[2] for part in parts]))


def test_many_active_latents_take_the_dense_way() -> None:
    sae = make_sae("relu", 0, 1.0)
    sae.b_enc.fill_(0.5)
    x = torch.randn(300, 96)
    encoder = CoarseEncoder(sae)
    assert torch.equal(encoder(x)[1], sae.encode(x)[1])
    assert encoder.dense
