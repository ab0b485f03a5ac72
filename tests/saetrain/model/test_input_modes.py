"""Tokens that an SAE normalizes by their own size, and a LayerNorm over its latents, against plain dense formulas."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from actcache import CorruptError, SettingsError
from saetrain import SAE, SAEConfig, TrainConfig
from saetrain.config import TOKEN_NORMALIZATIONS
from saetrain.interop.foreign import build_sae
from saetrain.model.exact_encoder import CoarseEncoder
from saetrain.model.latent_norm import LatentNorm

D, F, K = 16, 60, 4


def weights_of(seed: int = 0, *, norm: bool = False) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    more = {"latent_gain": 1 + 0.3 * draw(F), "latent_shift": 0.3 * draw(F)} if norm else {}
    # decoder rows of many lengths, so that the scale and the norms of the SAE are in use
    decoder = draw(F, D) * (1 + draw(F, 1).abs())
    return {"encoder": draw(F, D), "b_enc": draw(F), "decoder": decoder, "b_dec": 0.3 * draw(D), **more}


def tokens(n: int = 200, seed: int = 5) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=g) * (1 + 19 * torch.rand(n, 1, generator=g)) + torch.randn(n, 1, generator=g)


def top(z: Tensor) -> Tensor:
    return torch.zeros_like(z).scatter(1, z.topk(K).indices, z.topk(K).values).relu()


def plain(name: str, w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, reconstruction) by the formulas of ViT-Prisma and SAELens, in float64."""
    x, w = x.double(), {key: value.double() for key, value in w.items()}
    if name == "layer_norm":
        shift, factor = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        inner = (x - shift) / (factor + 1e-5)
    else:
        shift, factor = 0, x.norm(dim=1, keepdim=True) / D**0.5
        inner = x * (D**0.5 / x.norm(dim=1, keepdim=True))
    codes = top((inner - w["b_dec"]) @ w["encoder"].T + w["b_enc"])
    return codes.float(), ((codes @ w["decoder"] + w["b_dec"]) * factor + shift).float()


def dense(sae: SAE, x: Tensor) -> Tensor:
    rows, latents, values = sae.encode(x)
    codes = torch.zeros(len(x), F).index_put_((rows, latents), values)
    return codes if sae.norms is None else codes / sae.norms


def reconstruct(sae: SAE, x: Tensor) -> Tensor:
    return sae.decode(*sae.encode(x), len(x), like=x)


@pytest.mark.parametrize("name", TOKEN_NORMALIZATIONS)
def test_each_token_is_normalized_and_restored_by_its_size(name: str) -> None:
    w, x = weights_of(), tokens()
    sae = build_sae("topk", w, k=K, normalize=name)
    codes, decoded = plain(name, w, x)
    torch.testing.assert_close(dense(sae, x), codes, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reconstruct(sae, x), decoded, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.denormalize(sae.normalize(x), like=x), x, rtol=1e-3, atol=1e-3)
    rows, latents, values = CoarseEncoder(sae)(x)
    torch.testing.assert_close(torch.zeros(len(x), F).index_put_((rows, latents), values) / sae.norms, codes)


@pytest.mark.parametrize("name", TOKEN_NORMALIZATIONS)
@given(size=st.floats(0.25, 64), shift=st.floats(-4, 4), seed=st.integers(0, 99))
def test_codes_ignore_the_size_of_a_token_and_the_reconstruction_has_it(
    name: str, size: float, shift: float, seed: int
) -> None:
    """SAE(a x + c) = a SAE(x) + c, where c moves all channels alike and only layer_norm ignores it."""
    w, x = weights_of(seed), tokens(20, seed)
    sae = build_sae("relu", w, normalize=name)
    shift = shift if name == "layer_norm" else 0.0
    moved = size * x + shift
    torch.testing.assert_close(dense(sae, moved), dense(sae, x), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(reconstruct(sae, moved), size * reconstruct(sae, x) + shift, rtol=2e-2, atol=2e-2 * size)


@pytest.mark.parametrize("name", TOKEN_NORMALIZATIONS)
def test_the_units_say_how_far_a_code_moves_a_token(name: str) -> None:
    sae, x = build_sae("topk", weights_of(), k=K, normalize=name), tokens(1)
    entry, latent = torch.zeros(1, dtype=torch.int64), torch.tensor([7])
    moved = sae.decode(entry, latent, torch.tensor([2.5]), 1, like=x) - sae.decode(
        entry, latent, torch.tensor([1.0]), 1, like=x
    )
    torch.testing.assert_close(moved, 1.5 * sae.decoder[latent] / sae.units(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TOKEN_NORMALIZATIONS)
def test_a_token_of_zeros_stays_one(name: str) -> None:
    """It is what stands for CLS where a tower has none, and for an image that could not be read."""
    sae, x = build_sae("relu", weights_of(), normalize=name), torch.zeros(3, D)
    assert all(part.isfinite().all() for part in sae.encode(x))
    assert torch.equal(reconstruct(sae, x), x)
    assert torch.equal(sae.decoder[:3] / sae.units(x), x)


@pytest.mark.parametrize("name", TOKEN_NORMALIZATIONS)
def test_a_forgotten_token_is_an_error(name: str) -> None:
    sae, x = build_sae("relu", weights_of(), normalize=name), tokens(5)
    for forget in (lambda: sae.decode(*sae.encode(x), 5), lambda: sae.denormalize(x)):
        with pytest.raises(SettingsError, match="needs the activations that were encoded"):
            forget()
    with pytest.raises(SettingsError, match="got 4 rows"):
        sae.decode(*sae.encode(x), 5, like=x[:4])


@pytest.mark.parametrize("name", TOKEN_NORMALIZATIONS)
def test_only_an_imported_sae_normalizes_tokens(name: str) -> None:
    with pytest.raises(SettingsError, match="--normalize must be one of center, none"):
        SAEConfig(normalize=name)
    resolved = replace(SAEConfig("topk", F, K).resolve(D), normalize=name)
    with pytest.raises(SettingsError, match="only SAEs of other packages"):
        TrainConfig().resolve(resolved, "float32")


# ---------------------------------------------------------------------------------------------------------------------
# LayerNorm over the latents


def plain_norm(w: dict[str, Tensor], x: Tensor) -> Tensor:
    z = linear(x - w["b_dec"], w["encoder"], w["b_enc"])
    return layer_norm(z, (F,), w["latent_gain"], w["latent_shift"])


@pytest.mark.parametrize("variant", ["relu", "topk", "batchtopk"])
def test_a_layer_norm_over_latents_is_that_of_torch(variant: str, tmp_path: Path) -> None:
    w, x = weights_of(norm=True), tokens()
    if variant == "batchtopk":
        w["threshold"] = torch.tensor(0.829)
    sae = build_sae(variant, w, k=K)
    z = plain_norm(w, x)
    wanted = {"relu": z.relu(), "topk": top(z), "batchtopk": z * (z > 0.829)}[variant]
    torch.testing.assert_close(dense(sae, x), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reconstruct(sae, x), wanted @ w["decoder"] + w["b_dec"], rtol=1e-3, atol=1e-3)
    rows, latents, values = CoarseEncoder(sae)(x)
    coarse = torch.zeros(len(x), F).index_put_((rows, latents), values)
    torch.testing.assert_close(coarse / sae.norms, wanted, rtol=1e-4, atol=1e-4)

    save_file(sae.state_dict(), tmp_path / "sae.safetensors")
    again = SAE.load(tmp_path / "sae.safetensors", sae.config)
    assert torch.equal(dense(again, x), dense(sae, x))
    half = {name: value for name, value in sae.state_dict().items() if name != "latent_shift"}
    save_file(half, tmp_path / "half.safetensors")
    with pytest.raises(CorruptError, match="belong together"):
        SAE.load(tmp_path / "half.safetensors", sae.config)


def test_the_deviation_survives_pre_activations_with_a_large_common_part() -> None:
    """Its variance is a sum of squares of what is centered, so nothing cancels."""
    w = weights_of(norm=True)
    w["encoder"] += 50 * torch.ones(F, 1) * torch.randn(D, generator=torch.Generator().manual_seed(1))
    x = tokens()
    norm = LatentNorm.of(w["encoder"], w["b_enc"], w["latent_gain"], w["latent_shift"])
    z = norm.scale_rows(x) @ norm.weight.T + norm.bias
    exact = {name: value.double() for name, value in w.items()}
    wanted = layer_norm(
        linear(x.double(), exact["encoder"], exact["b_enc"]), (F,), exact["latent_gain"], exact["latent_shift"]
    )
    torch.testing.assert_close(z, wanted.float(), rtol=1e-3, atol=1e-3)


def test_an_sae_without_them_has_the_tensors_it_always_had() -> None:
    names = set(SAE(SAEConfig("topk", F, K).resolve(D), D).state_dict())
    assert names == {"encoder", "decoder", "b_enc", "b_dec", "mean", "scale"}
