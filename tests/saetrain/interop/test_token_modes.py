"""Checkpoints that normalize each token: read, encoded, measured, written again or refused; by plain formulas."""

import json
from pathlib import Path

import pytest
import torch
from foreign_files import D, F, K, plain_tensors, write
from torch import Tensor

from actcache import ActivationStore, SettingsError
from saetrain import SAE, Run, convert, encode
from saetrain.interop.conversion import PARITY_FILE
from saetrain.interop.foreign import build_sae, fold

LAYER_NORM = "prisma layer_norm, because nothing else is said"
WRITES = ("dictionary_learning", "sparsify", "saev", "patchsae")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory, planted_store: Path) -> Run:
    """A ViT-Prisma checkpoint whose settings do not name the normalization, which means layer_norm there."""
    folder = tmp_path_factory.mktemp("prisma")
    return Run.open(convert(write(LAYER_NORM, folder / "in"), folder / "run", store=planted_store).path)


def rows_of(store: Path) -> Tensor:
    opened = ActivationStore.open(store)
    values = opened.read(images=range(8, 40))
    return torch.from_numpy(values.reshape(-1, values.shape[-1])).float()


def formulas(x: Tensor) -> tuple[Tensor, Tensor]:
    """ViT-Prisma's layer_norm and TopK, in float64."""
    w, x = {name: value.double() for name, value in plain_tensors().items()}, x.double()
    mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    z = ((x - mean) / (std + 1e-5) - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    codes = torch.zeros_like(z).scatter(1, z.topk(K).indices, z.topk(K).values).relu()
    return codes.float(), ((codes @ w["W_dec"] + w["b_dec"]) * std + mean).float()


def dense(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor]:
    rows, latents, values = sae.encode(x)
    codes = torch.zeros(len(x), F).index_put_((rows, latents), values)
    return codes if sae.norms is None else codes / sae.norms, sae.decode(rows, latents, values, len(x), like=x)


def test_what_prisma_does_not_name_is_layer_norm(imported: Run, planted_store: Path) -> None:
    assert imported.sae_config.normalize == "layer_norm"
    x = rows_of(planted_store)
    for ours, theirs in zip(dense(imported.sae(), x), formulas(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_its_quality_and_its_codes_are_those_of_the_formulas(
    tmp_path: Path, imported: Run, planted_store: Path
) -> None:
    store = ActivationStore.open(planted_store)
    held_out = torch.from_numpy(store.read(images=[i for i in range(304, 320) if store.valid[i]])).float()
    x = held_out.reshape(-1, D)
    error = (x - formulas(x)[1]).double().square().sum() / (x - x.mean(0)).double().square().sum()
    assert imported.quality["all"]["fvu"] == pytest.approx(float(error), rel=1e-3)
    codes = encode(imported, planted_store, tmp_path / "codes")
    norms, wanted = imported.sae().norms, formulas(rows_of(planted_store))[0]
    assert norms is not None
    first, found = 8 * codes.n_tokens, torch.zeros_like(wanted)
    for latent in range(F):
        rows, values = (torch.from_numpy(part) for part in codes.read_latent(latent))
        inside = (rows >= first) & (rows < first + len(wanted))
        found[rows[inside] - first, latent] = values[inside].float()
    torch.testing.assert_close(found, wanted * norms, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("to", ["saelens", "prisma"])
def test_it_goes_to_the_formats_that_hold_it_and_comes_back(
    tmp_path: Path, imported: Run, planted_store: Path, to: str
) -> None:
    made = convert(imported.path, tmp_path / "out", to=to, store=planted_store)
    assert made.parity.max_reconstruction_difference < 1e-4
    settings = json.loads((tmp_path / "out" / ("cfg.json" if to == "saelens" else "config.json")).read_bytes())
    assert settings["normalize_activations"] == "layer_norm"
    assert (tmp_path / "out" / PARITY_FILE).exists()
    assert convert(imported.path, tmp_path / "plain", to=to).parity.rows == "random"
    back = Run.open(convert(tmp_path / "out", tmp_path / "back", store=planted_store).path)
    x = rows_of(planted_store)
    for ours, theirs in zip(dense(back.sae(), x), formulas(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("to", WRITES)
def test_a_format_that_cannot_hold_it_says_so(tmp_path: Path, imported: Run, to: str) -> None:
    with pytest.raises(SettingsError, match="cannot hold"):
        convert(imported.path, tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


def test_no_format_holds_a_layer_norm_over_latents() -> None:
    t = plain_tensors()
    weights = {"encoder": t["W_enc"].T, "decoder": t["W_dec"], "b_enc": t["b_enc"], "b_dec": t["b_dec"]}
    sae = build_sae("relu", weights | {"latent_gain": torch.ones(F), "latent_shift": torch.zeros(F)})
    with pytest.raises(SettingsError, match="LayerNorm over its latents"):
        fold(sae)


def test_constants_and_a_normalization_of_tokens_exclude_each_other(tmp_path: Path, planted_store: Path) -> None:
    with pytest.raises(SettingsError, match="normalizes each token by itself"):
        convert(write(LAYER_NORM, tmp_path / "in"), tmp_path / "run", store=planted_store, input_mean=0, input_scale=1)


def test_a_unit_embedding_keeps_its_length(tmp_path: Path, planted_store: Path) -> None:
    """lasgroup's SAE reads x / ||x||, so a code ignores the length, which the reconstruction has again."""
    counters = {"feature_counts": torch.ones(F), "total_samples": torch.tensor(9)}
    path = write("lasgroup", tmp_path / "in", tensors=plain_tensors() | counters)
    made = convert(path, tmp_path / "run", store=planted_store)
    w, x = plain_tensors(), rows_of(planted_store)
    length = x.norm(dim=1, keepdim=True)
    z = x / length @ w["W_enc"] + w["b_enc"]
    codes = torch.zeros_like(z).scatter(1, z.topk(K).indices, z.topk(K).values)
    decoded = (codes @ torch.nn.functional.normalize(w["W_dec"]) + w["b_dec"]) * length
    sae = Run.open(made.path).sae()
    for ours, theirs in zip(dense(sae, x), (codes, decoded), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dense(sae, 3 * x)[1], 3 * decoded, rtol=1e-4, atol=1e-3)
