"""The normalization of the input that lies in no file: estimated from a store, given, and folded, by plain formulas."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_files import write
from torch import Tensor

from actcache import ActivationStore, HookPoint, PipelineError, SettingsError, open_stores
from saetrain import SAE, Run, SAEConfig, convert
from saetrain.interop.constants import (
    InputConstants,
    Statistics,
    estimate_constants,
    fold_constants,
    normalize_input,
    read_constants,
)
from saetrain.interop.formats import read_foreign

VARIANTS = ("topk", "batchtopk", "relu", "jumprelu", "gated")


def patch_rows(store: Path) -> np.ndarray:
    opened = ActivationStore.open(store)
    values = opened.read(images=np.flatnonzero(opened.valid), tokens="patch")
    return values.reshape(-1, values.shape[-1]).astype(np.float64)


def first_release(path: Path) -> Path:
    """A checkpoint of the first release of saev: the tensors of another one without a schema in its first line."""
    data = (write("saev relu", path) / "sae.pt").read_bytes()
    (path / "sae.pt").write_bytes(b'{"d_vit": 32, "exp_factor": 2}' + data[data.index(b"\n") :])
    return path


def dense(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor]:
    rows, latents, values = sae.encode(x)
    codes = torch.zeros(len(x), sae.config.n_latents).index_put_((rows, latents), values)
    return codes if sae.norms is None else codes / sae.norms, sae.decode(rows, latents, values, len(x), like=x)


def test_each_statistic_is_that_of_the_rows(planted_store: Path) -> None:
    x, store = patch_rows(planted_store), open_stores(planted_store)
    mean = x.mean(0)
    wanted = {
        "norm": np.linalg.norm(x - mean, axis=1).mean() / x.shape[1] ** 0.5,
        "variance": x.var(0).mean() ** 0.5,
        "channel": x.std(0, ddof=1),
    }
    for deviation, value in wanted.items():
        made = estimate_constants(Statistics(deviation, "patch"), store, HookPoint(0))  # type: ignore[arg-type]
        np.testing.assert_allclose(made.mean, mean, rtol=1e-4)
        np.testing.assert_allclose(1 / made.scale, value, rtol=1e-3)
        assert made.origin == f"estimated from planted.acts, {len(x):,} patch rows"


def test_the_first_release_of_saev_gets_its_constants_from_the_store(tmp_path: Path, planted_store: Path) -> None:
    assert read_foreign(first_release(tmp_path / "saev")).lacks_constants
    made = convert(tmp_path / "saev", tmp_path / "run", store=planted_store)
    assert made.input is not None
    assert made.input.startswith("estimated from planted.acts, ")
    assert Run.open(tmp_path / "run").artifact.provenance["input"] == made.input

    tensors = {name: value.double() for name, value in plain_of(tmp_path / "saev").items()}
    rows = patch_rows(planted_store)
    mean, x = torch.from_numpy(rows.mean(0)), torch.from_numpy(rows[:500])
    size = float(np.linalg.norm(rows - rows.mean(0), axis=1).mean() / 32**0.5)
    codes = (((x - mean) / size - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]).relu()
    decoded = (codes @ tensors["W_dec"] + tensors["b_dec"]) * size + mean
    for ours, theirs in zip(dense(Run.open(tmp_path / "run").sae(), x.float()), (codes, decoded), strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=1e-4)


def plain_of(folder: Path) -> dict[str, Tensor]:
    data = (folder / "sae.pt").read_bytes()
    (folder / "plain.pt").write_bytes(data[data.index(b"\n") + 1 :])
    tensors: dict[str, Tensor] = torch.load(folder / "plain.pt", weights_only=True)
    return tensors


def test_what_the_user_gives_is_used_and_said(tmp_path: Path, planted_store: Path) -> None:
    first_release(tmp_path / "saev")
    np.save(tmp_path / "mean.npy", np.full(32, 2.0, dtype=np.float32))
    made = convert(
        tmp_path / "saev", tmp_path / "given", store=planted_store, input_mean=tmp_path / "mean.npy", input_scale="0.5"
    )
    assert made.input == "given with --input-mean and --input-scale"
    again = convert(tmp_path / "saev", tmp_path / "numbers", store=planted_store, input_mean=2, input_scale=[0.5] * 32)
    assert Run.open(again.path).run_id == Run.open(made.path).run_id
    raw = convert(tmp_path / "saev", tmp_path / "raw", store=planted_store, input_mean="0", input_scale="1")
    assert Run.open(raw.path).run_id != Run.open(made.path).run_id
    assert made.parity.holds
    # a format that lacks nothing takes them too
    write("prisma relu", tmp_path / "prisma")
    assert not read_foreign(tmp_path / "prisma").lacks_constants
    assert convert(tmp_path / "prisma", tmp_path / "p", store=planted_store, input_mean=1, input_scale=2).parity.holds
    assert convert(tmp_path / "prisma", tmp_path / "q", store=planted_store).input is None


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("per_channel", [False, True])
def test_folding_constants_is_normalizing_first(
    random_sae: Callable[..., SAE], variant: str, per_channel: bool
) -> None:
    sae = random_sae(SAEConfig(variant, 30, 4, normalize="center")).requires_grad_(False)
    if variant == "batchtopk":
        sae.threshold.fill_(0.4)
    rng = np.random.default_rng(3)
    x = torch.from_numpy(rng.normal(size=(200, 12)) * 4 + 1).float()
    scale = rng.uniform(0.2, 3, 12) if per_channel else np.array(0.3)
    constants = InputConstants(rng.normal(size=12), scale, "here")
    wanted = normalize_input(lambda rows: dense(sae, rows), constants)(x)
    assert (wanted[0] > 0).any()
    for ours, theirs in zip(dense(fold_constants(sae, constants), x), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_bad_constants_are_refused_in_one_line(tmp_path: Path, planted_store: Path) -> None:
    first_release(tmp_path / "saev")
    (tmp_path / "text.npy").write_text("mean")
    np.save(tmp_path / "square.npy", np.ones((2, 2)))
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    cases: dict[str, tuple[object, object]] = {
        "belong together. Give --input-scale": (1, None),
        "belong together. Give --input-mean": (None, 1),
        "missing.npy cannot be read": (tmp_path / "missing.npy", 1),
        "text.npy cannot be read": (str(tmp_path / "text.npy"), 1),
        "square.npy cannot be read: it holds no single row": (tmp_path / "square.npy", 1),
        "pickled.npy cannot be read": (tmp_path / "pickled.npy", 1),
        "must be a number or one per channel": (tmp_path / "words.npy", 1),
        "must be finite": ("nan", 1),
        "at most 1e": (0, "1e300"),
        "must be above 0": (0, 0),
        "has 31 channels, but the SAE reads 32": (np.zeros(31), 1),
    }
    for reason, (mean, scale) in cases.items():
        with pytest.raises(SettingsError, match=reason) as caught:
            convert(tmp_path / "saev", tmp_path / "run", store=planted_store, input_mean=mean, input_scale=scale)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    assert read_constants(None, None) is None


def test_a_run_takes_no_constants(tmp_path: Path, planted_run: Run) -> None:
    with pytest.raises(PipelineError, match="is a run, which has its own"):
        convert(planted_run.path, tmp_path / "out", input_mean=0, input_scale=1)
    assert not json.dumps(planted_run.artifact.provenance).count("input")
