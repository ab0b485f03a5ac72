"""The network, its sparse step, its losses and its quality against plain formulas."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actcache import ActivationStore, CorruptError, HookPoint, SettingsError
from saetrain import SAE, SAEConfig, TrainConfig, evaluate
from saetrain.config import VARIANTS
from saetrain.model import variants
from saetrain.model.variants import find_variant
from saetrain.model.variants.variant import Variant


def random_sae(config: SAEConfig, d_model: int = 12, seed: int = 0) -> SAE:
    """A random SAE, with every parameter and the normalization away from its initial value."""
    sae = SAE(config.resolve(d_model), d_model, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in (sae.encoder, sae.b_enc, sae.b_dec):
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    sae.set_normalization(np.linspace(-1, 1, d_model), 3.0)
    return sae


@pytest.mark.parametrize("variant", ["topk", "batchtopk", "relu", "jumprelu", "gated"])
def test_encoding_and_decoding_follow_the_formulas(variant: str) -> None:
    sae = random_sae(SAEConfig(variant=variant, n_latents=30, k=4, normalize="center"))
    x = torch.randn(300, 12, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        if variant == "batchtopk":
            sae.threshold.fill_(0.7)
        if variant == "jumprelu":
            sae.threshold.uniform_(0.2, 1.5)
        if variant == "gated":
            sae.log_scale.normal_(0, 0.3)
            sae.b_mag.normal_(0, 0.5)
        z = ((x - sae.mean) * sae.scale - sae.b_dec) @ sae.encoder.T + sae.b_enc
        if variant == "topk":
            z = torch.zeros_like(z).scatter(1, z.topk(4).indices, z.topk(4).values)
        if variant in ("batchtopk", "jumprelu"):
            z = z * (z > sae.threshold)
        if variant == "gated":
            inside = ((x - sae.mean) * sae.scale - sae.b_dec) @ (sae.encoder * sae.log_scale.exp()[:, None]).T
            z = (inside + sae.b_mag).relu() * (z > 0)
        z = z.relu()
        assert z.any()
        rows, latents, values = sae.encode(x)
        torch.testing.assert_close(torch.zeros_like(z).index_put((rows, latents), values), z, rtol=1e-4, atol=1e-4)
        key = rows * 30 + latents
        assert torch.equal(key, key.sort().values)
        expected = (z @ sae.decoder + sae.b_dec) / sae.scale + sae.mean
        torch.testing.assert_close(sae.decode(rows, latents, values, 300), expected, rtol=1e-4, atol=1e-4)


def test_centering_gives_unit_mean_square() -> None:
    sae = SAE(SAEConfig(n_latents=4, k=1).resolve(6), 6)
    x = torch.randn(5000, 6) * torch.arange(1, 7) + 9
    sae.set_normalization(x.mean(0).double().numpy(), float(x.var(0, correction=0).sum()))
    normalized = sae.normalize(x)
    assert float(normalized.square().sum(1).mean()) == pytest.approx(6, rel=1e-3)
    torch.testing.assert_close(sae.denormalize(normalized), x, rtol=1e-3, atol=1e-3)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save

    sae = SAE(SAEConfig(n_latents=20, k=2).resolve(6), 6)
    data = save(sae.state_dict())
    (tmp_path / "good").write_bytes(data)
    assert torch.equal(SAE.load(tmp_path / "good", sae.config).encoder, sae.encoder)
    for broken in (data[:-9], b"", b"{}"):
        (tmp_path / "bad").write_bytes(broken)
        with pytest.raises(CorruptError, match="Train it again"):
            SAE.load(tmp_path / "bad", sae.config)
    with pytest.raises(CorruptError):
        SAE.load(tmp_path / "good", SAEConfig(n_latents=21, k=2).resolve(6))


@pytest.mark.parametrize("tokens", ["all", "patch", "cls"])
def test_quality_equals_plain_numpy(planted_store: Path, tokens: str) -> None:
    store = ActivationStore.open(planted_store)
    sae = random_sae(SAEConfig(n_latents=60, k=3), d_model=32)
    images = range(0, 320, 3)
    quality = evaluate(sae, store, HookPoint(0), images, tokens=tokens)
    good = [i for i in images if store.valid[i]]
    for kind in {"all": ("all", "cls", "patch"), "patch": ("patch",), "cls": ("cls",)}[tokens]:
        part = {"all": slice(None), "cls": slice(0, 1), "patch": slice(1, None)}[kind]
        x = store.read(images=good)[:, part].reshape(-1, 32).astype(np.float64)
        rows, latents, values = sae.encode(torch.from_numpy(x))
        r = sae.decode(rows, latents, values, len(x)).numpy().astype(np.float64)
        fvu = ((x - r) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
        cosine = ((x * r).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(r, axis=1)).mean()
        assert quality[kind]["fvu"] == pytest.approx(fvu, rel=1e-5)
        assert quality[kind]["l0"] == pytest.approx(len(rows) / len(x))
        assert quality[kind]["cosine"] == pytest.approx(cosine, rel=1e-6)
        if kind == tokens:
            density = np.bincount(latents, minlength=60) / len(x)
            assert 0 < (density > 0.1).sum() < 60
            assert quality["dense"] == pytest.approx((density > 0.1).mean())
            assert quality["silent"] == pytest.approx((density == 0).mean())
    with pytest.raises(SettingsError, match="No readable image"):
        evaluate(sae, store, HookPoint(0), [5, 77])


def test_predicting_the_mean_explains_nothing(planted_store: Path) -> None:
    store = ActivationStore.open(planted_store)
    sae = SAE(SAEConfig(n_latents=4, k=1).resolve(32), 32)
    valid = np.flatnonzero(store.valid)
    mean = store.read(images=valid).astype(np.float64).mean((0, 1))
    sae.set_normalization(mean, 1.0)
    with torch.no_grad():
        sae.b_enc.fill_(-1e9)
    quality = evaluate(sae, store, HookPoint(0), range(320))
    assert quality["all"]["fvu"] == pytest.approx(1, rel=1e-4)
    assert quality["all"]["l0"] == 0
    assert quality["silent"] == 1


def test_configs_derive_what_is_left_open() -> None:
    sae = SAEConfig().resolve(768)
    assert (sae.n_latents, sae.normalize) == (12_288, "center")
    assert SAEConfig(variant="relu").resolve(768).normalize == "none"
    config = TrainConfig(n_steps=1000).resolve(SAEConfig(n_latents=2**14).resolve(8), "float32")
    assert (config.lr, config.warmup_steps, config.precision) == (2e-4, 100, "float32")
    assert (config.aux, config.ghost) == (1 / 32, False)
    relu = TrainConfig().resolve(SAEConfig("relu").resolve(768), "float32")
    assert (relu.lr, relu.aux, relu.ghost) == (4e-4, 0.0, True)
    assert SAEConfig("jumprelu", k=20).resolve(768).target_l0 == 20
    assert SAEConfig("topk", 8, 2, prefixes=[0.5, 1]).resolve(8).nested == (4, 8)  # type: ignore[arg-type]


def test_every_variant_has_its_module_and_its_line() -> None:
    modules = {file.stem for file in Path(variants.__file__).parent.glob("*.py")} - {"__init__", "variant"}
    assert modules == set(VARIANTS)
    assert all(isinstance(find_variant(name), Variant) for name in VARIANTS)


def test_numpy_numbers_become_plain_ones() -> None:
    config = SAEConfig(n_latents=np.int64(64), k=np.int32(4), l1=np.float32(0.5)).resolve(8)  # type: ignore[arg-type]
    assert json.loads(json.dumps(asdict(config)))["n_latents"] == 64
    assert [type(value) for value in (config.n_latents, config.k, config.l1)] == [int, int, float]
    assert type(TrainConfig(seed=np.int64(3)).seed) is int  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields",
    [
        {"variant": "crosscoder"}, {"n_latents": 0}, {"normalize": "z"}, {"l1": -1.0},
        {"variant": "jumprelu", "bandwidth": 0}, {"variant": "jumprelu", "penalty": "l2"},
    ],
)  # fmt: skip
def test_an_impossible_sae_is_refused_at_construction(fields: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="--"):
        SAEConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"k": 0}, {"n_latents": 8, "k": 9}, {"prefixes": (0.5, 1, 1.1), "n_latents": 8, "k": 2}, {"k": 129},
        {"prefixes": (0.5, 0.51, 1), "n_latents": 8, "k": 2}, {"variant": "relu", "n_latents": 8, "prefixes": (0.5, 1)},
        {"variant": "gated", "n_latents": 8, "k": 2, "target_l0": 9}, {"variant": "gated", "target_l0": 129},
        {"variant": "relu", "n_latents": 8, "target_l0": 0},
    ],
)  # fmt: skip
def test_an_sae_that_does_not_fit_its_number_of_latents_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="--"):
        SAEConfig(**fields).resolve(8)


@pytest.mark.parametrize(
    "fields",
    [
        {"n_steps": 0}, {"batch_size": 0}, {"precision": "int8"}, {"decay_fraction": 2}, {"init": "zeros"},
        {"aux": -1}, {"lr": 0.0}, {"ghost": True, "aux": 0.1},
    ],
)  # fmt: skip
def test_an_impossible_training_is_refused_at_construction(fields: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="--"):
        TrainConfig(**fields)


def test_ghost_gradients_are_refused_for_a_variant_without_them() -> None:
    with pytest.raises(SettingsError, match="--ghost works with relu only"):
        TrainConfig(ghost=True).resolve(SAEConfig("topk", 64).resolve(8), "float32")
