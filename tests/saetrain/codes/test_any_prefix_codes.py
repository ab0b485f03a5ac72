"""Loader, training and codes number tokens alike, whatever comes before the patches in the model's stream.

The values name the place where they belong (any_prefix.py). A latent of the identity (place_run.py) fires at one place.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from any_prefix import D_MODEL, encode_one_hot, encode_places, write_one_hot, write_places
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from place_run import write_place_run

from actcache import SettingsError, open_stores
from saetrain import ActivationLoader, CodeStore, Run, SAEConfig, TrainConfig, encode, evaluate, train
from saetrain.training.trainer import sweep

PREFIXES = ([], ["cls"], ["reg"], ["cls", "dist"], ["cls", "reg", "reg", "reg", "reg"])
SMALL: dict[str, Any] = {"n_steps": 3, "batch_size": 8, "pool_tokens": 64}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prefix=st.sampled_from(PREFIXES), grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    n_images=st.integers(20, 60), tokens=st.sampled_from(["all", "patch", "cls"]), fits=st.booleans(),
    codec=st.sampled_from(["raw", "zstd"]),
)  # fmt: skip
def test_the_loader_names_the_place_of_every_row(
    tmp_path_factory: pytest.TempPathFactory, prefix: list[str], grid: tuple[int, int], n_images: int, tokens: str,
    fits: bool, codec: str,
) -> None:  # fmt: skip
    if tokens == "cls" and "cls" not in prefix:
        return
    path = tmp_path_factory.mktemp("loader") / "x.acts"
    write_places(path, prefix, n_images=n_images, grid=grid, failed={3: "broken"}, codec=codec)
    x = encode_places(n_images, prefix, grid)
    loader = ActivationLoader(
        path, tokens=tokens, batch_size=4, n_streams=2, pool_tokens=1 << 16 if fits else 16,  # type: ignore[arg-type]
    )  # fmt: skip
    n_patches, n_cls = grid[0] * grid[1], int("cls" in prefix)
    numbers = {"all": range(1 - n_cls, 1 + n_patches), "patch": range(1, 1 + n_patches), "cls": range(1)}[tokens]
    assert loader.n_rows % len(numbers) == 0
    batches, seen = loader.batches(), set()
    for _ in range(loader.steps_per_epoch):
        batch = next(batches)
        place = torch.where(batch.token == 0, 0, batch.token - 1 + len(prefix))
        np.testing.assert_array_equal(batch.activations.numpy(), x[batch.image.numpy(), place.numpy()])
        seen |= set(zip(batch.image.tolist(), batch.token.tolist(), strict=True))
    batches.close()
    assert {token for _, token in seen} <= set(numbers)
    assert 0 <= loader.n_rows - len(seen) < 4  # every row once, but for the last batch
    assert 3 not in {image for image, _ in seen}


@pytest.mark.parametrize("prefix", PREFIXES, ids=str)
def test_codes_hold_every_token_at_its_number(tmp_path: Path, prefix: list[str]) -> None:
    n_images, grid, failed = 50, (3, 2), 7
    write_one_hot(tmp_path / "x.acts", prefix, n_images=n_images, grid=grid, failed={failed: "broken"})
    run = write_place_run(tmp_path / "run", tmp_path / "x.acts")
    codes = encode(run, tmp_path / "x.acts", tmp_path / "x.codes")
    has_cls = "cls" in prefix
    assert codes.tokens == ("all" if has_cls else "patch")
    assert codes.n_tokens == 7
    entries = set()
    for shard in range(codes.n_shards):
        part = codes.read_shard(shard)
        row = part.first_row + np.repeat(np.arange(len(part.indptr) - 1), np.diff(part.indptr))
        entries |= set(zip(row.tolist(), part.latent.tolist(), part.value.tolist(), strict=True))
        by_latent = np.repeat(np.arange(codes.n_latents), np.diff(part.latent_indptr))
        assert sorted(zip(by_latent, part.row, part.latent_value, strict=True)) == sorted(
            zip(part.latent, row, part.value, strict=True)
        )
    numbers = range(0 if has_cls else 1, 7)
    assert entries == {
        (image * 7 + token, token, float(image + 1))
        for image in range(n_images)
        if image != failed
        for token in numbers
    }


@pytest.mark.parametrize("prefix", PREFIXES, ids=str)
@pytest.mark.parametrize("tokens", ["all", "patch"])
def test_a_run_is_recorded_with_the_kind_of_token_that_it_read(
    tmp_path: Path, prefix: list[str], tokens: str, dense_codes: Callable[[CodeStore], np.ndarray]
) -> None:
    write_one_hot(tmp_path / "x.acts", prefix)
    kind = tokens if "cls" in prefix else "patch"
    run = train(tmp_path / "x.acts", tmp_path / "run", sae=SAEConfig(n_latents=16, k=2),
                config=TrainConfig(tokens=tokens, **SMALL))  # fmt: skip
    assert run.train_config.tokens == kind
    assert set(run.quality) & {"all", "cls", "patch"} == ({"all", "cls", "patch"} if kind == "all" else {"patch"})
    assert run.quality["n_tokens"] == 2 * open_stores(tmp_path / "x.acts").n_read_tokens(kind)
    again = train(tmp_path / "x.acts", tmp_path / "run", sae=SAEConfig(n_latents=16, k=2),
                  config=TrainConfig(tokens=tokens, **SMALL))  # fmt: skip
    assert again.run_id == run.run_id
    codes = encode(run, tmp_path / "x.acts", tmp_path / "x.codes")
    assert codes.tokens == kind
    dense = dense_codes(codes)
    assert dense[:, 1:].any(axis=(1, 2)).all()
    assert dense[:, 0].any() == (kind == "all")


def test_a_sweep_records_what_it_read(tmp_path: Path) -> None:
    write_one_hot(tmp_path / "x.acts", ["reg"])
    members = [(None, SAEConfig(n_latents=16, k=k), TrainConfig(**SMALL)) for k in (1, 2)]
    assert [run.train_config.tokens for run in sweep(tmp_path / "x.acts", tmp_path / "runs", members)] == ["patch"] * 2


def test_training_on_cls_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_one_hot(tmp_path / "x.acts", ["reg", "reg"])
    with pytest.raises(SettingsError, match=r"the model of this store has none \(its special tokens: reg, reg\)"):
        train(tmp_path / "x.acts", tmp_path / "run", config=TrainConfig(tokens="cls", **SMALL))
    assert not (tmp_path / "run").exists()


def test_a_run_that_says_all_is_encoded_as_what_all_are(tmp_path: Path) -> None:
    """Another program may have recorded `all` for a model without CLS; the codes say what was read."""
    write_one_hot(tmp_path / "x.acts", [])
    run = write_place_run(tmp_path / "run", tmp_path / "x.acts", tokens="all")
    assert run.train_config.tokens == "all"
    assert encode(run, tmp_path / "x.acts", tmp_path / "x.codes").tokens == "patch"


def test_an_interrupted_encoding_is_finished_with_the_same_bytes(tmp_path: Path) -> None:
    write_one_hot(tmp_path / "x.acts", ["reg"], n_images=90)
    run = write_place_run(tmp_path / "run", tmp_path / "x.acts")
    whole = encode(run, tmp_path / "x.acts", tmp_path / "whole.codes")
    encode(run, tmp_path / "x.acts", tmp_path / "x.codes")
    (tmp_path / "x.codes" / "manifest.json").unlink()
    (tmp_path / "x.codes" / "commits" / "000001.json").unlink()
    codes = encode(run, tmp_path / "x.acts", tmp_path / "x.codes")
    assert codes.codes_id == whole.codes_id
    for file in (tmp_path / "whole.codes" / "codes.zarr").rglob("c/0"):
        assert file.read_bytes() == (tmp_path / "x.codes" / file.relative_to(tmp_path / "whole.codes")).read_bytes()


@pytest.mark.parametrize("prefix", PREFIXES, ids=str)
def test_quality_is_that_of_the_tokens_that_were_read(tmp_path: Path, prefix: list[str]) -> None:
    """By hand, from a plain copy of the stream: registers take no part."""
    write_places(tmp_path / "x.acts", prefix, n_images=30)
    x = torch.from_numpy(encode_places(30, prefix, (2, 3)))
    sae = Run.open(_train(tmp_path)).sae()
    quality = evaluate(sae, tmp_path / "x.acts", open_stores(tmp_path / "x.acts").hook_point(None), range(30))
    parts = {"cls": x[:, : int("cls" in prefix)], "patch": x[:, len(prefix) :]}
    parts = {kind: part.reshape(-1, D_MODEL) for kind, part in parts.items() if part.shape[1]}
    if len(parts) == 2:
        parts["all"] = torch.cat(list(parts.values()))
    assert set(quality) & {"all", "cls", "patch"} == set(parts)
    for kind, rows in parts.items():
        entries = sae.encode(rows)
        error = (rows - sae.decode(*entries, len(rows))).double().square().sum()
        variance = (rows.double() - rows.double().mean(0)).square().sum()
        assert quality[kind]["fvu"] == pytest.approx(float(error / variance), rel=1e-5)  # type: ignore[literal-required]
        assert quality[kind]["l0"] == pytest.approx(len(entries[0]) / len(rows))  # type: ignore[literal-required]


def _train(folder: Path) -> Path:
    return train(folder / "x.acts", folder / "run", sae=SAEConfig(n_latents=8, k=2), config=TrainConfig(**SMALL)).path


def test_one_hot_places_are_what_they_say() -> None:
    x = encode_one_hot(2, ["cls", "reg"], (1, 2))
    assert x.argmax(2).tolist() == [[0, 3, 1, 2]] * 2
    assert x.max(2).tolist() == [[1.0] * 4, [2.0] * 4]
