"""A code that is 0 in float16 is not an entry: encode() leaves it out and counts it, and readers drop stored zeros."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import sign_shard
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_codes import write_codes

from actcache.artifacts import seal_artifact
from analysis import analyze
from saetrain import CodeStore, Run, encode

SMALLEST = 2.0**-24  # of float16


@pytest.fixture
def faint_run(tmp_path: Path, tiny_run: Path, tiny_store: Path, request: pytest.FixtureRequest) -> Run:
    """The tiny run with codes scaled by `request.param`: an SAE whose encoder has a very small scale."""
    path, scale = Path(shutil.copytree(tiny_run, tmp_path / "faint")), float(request.param)
    weights = load_file(path / "sae.safetensors")
    for name in ("encoder", "b_enc"):
        weights[name] = weights[name] * scale
    save_file(weights, path / "sae.safetensors")
    summary = json.loads((path / "manifest.json").read_bytes())
    seal_artifact(path, **{name: value for name, value in summary.items() if name not in ("files", "digest")})
    return Run.open(path)


@pytest.mark.parametrize("faint_run", [1.0, 1e-8, 1e-9], indirect=True)
def test_what_rounds_to_0_is_left_out_counted_and_said(
    faint_run: Run, tiny_store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from actcache import ActivationStore

    store, sae = ActivationStore.open(tiny_store), faint_run.sae()
    x = torch.from_numpy(store.read(faint_run.hook_point, images=np.flatnonzero(store.valid)))
    values = sae.encode(x.flatten(0, 1))[2].double()
    with caplog.at_level(logging.WARNING):
        codes = encode(faint_run, store, tmp_path / "x.codes")
    n_lost = int((values < SMALLEST / 2).sum())
    n_near = int(((values - SMALLEST / 2).abs() < 0.02 * SMALLEST).sum())  # rounding of the encoder decides these
    assert codes.summary["n_underflowed"] == pytest.approx(n_lost, abs=n_near)
    assert codes.n_entries + (codes.summary["n_underflowed"] or 0) == len(values)
    for shard in range(codes.n_shards):
        part = codes.read_shard(shard)
        assert part.value.all()
        assert part.latent_value.all()
    assert ("float16" in caplog.text) == (n_lost > 0.01 * len(values))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1))
def test_readers_drop_stored_zeros(tmp_path_factory: pytest.TempPathFactory, seed: int, share: float) -> None:
    """Codes with zeros written by somebody else answer as the same codes without them."""
    folder = tmp_path_factory.mktemp("zeros")
    rng = np.random.default_rng(seed)
    dense = rng.random((6, 5, 7)).astype(np.float16) * (rng.random((6, 5, 7)) < 0.4)
    clean = write_codes(folder / "clean.codes", dense, [4, 2])
    marked = dense.copy()
    marked[(dense > 0) & (rng.random(dense.shape) < share)] = 65504  # entries that become zeros on disk
    plain = np.where(marked == 65504, np.float16(0), dense)
    zeros = write_codes(folder / "zeros.codes", marked, [4, 2])
    for shard in range(2):
        for name in ("value", "latent_value"):
            file = zeros.path / "codes.zarr" / str(shard) / name / "c" / "0"
            values = np.fromfile(file, np.float16)
            values[values == 65504] = 0
            values.tofile(file)
        sign_shard(zeros.path, shard)
    wanted = write_codes(folder / "wanted.codes", plain, [4, 2])
    zeros = CodeStore.open(zeros.path)
    rows = np.arange(6 * 5)
    for ours, theirs in ((zeros, wanted), (clean, clean)):
        for shard in range(2):
            for a, b in (
                (ours.read_shard(shard), theirs.read_shard(shard)),
                (ours.read_by_latent(shard), theirs.read_by_latent(shard)),
                (ours.read_latents(shard, 2, 6), theirs.read_latents(shard, 2, 6)),
            ):
                assert all(np.array_equal(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__)
            assert np.array_equal(ours.count_latents(shard), theirs.count_latents(shard))
        assert all(np.array_equal(a, b) for a, b in zip(ours.read_rows(rows), theirs.read_rows(rows), strict=True))


def test_statistics_do_not_count_stored_zeros(tmp_path: Path) -> None:
    dense = np.zeros((4, 3, 2), np.float16)
    dense[:, 1, 0] = 0.5
    dense[:2, 2, 1] = 0.25
    zeros = write_codes(tmp_path / "zeros.codes", dense, [4])
    for name in ("value", "latent_value"):
        file = zeros.path / "codes.zarr" / "0" / name / "c" / "0"
        values = np.fromfile(file, np.float16)
        values[values == 0.25] = 0
        values.tofile(file)
    sign_shard(zeros.path, 0)
    table = analyze(CodeStore.open(zeros.path), tmp_path / "x.concepts").table
    assert table["n_tokens"].to_pylist() == [4, 0]
    assert table["n_images"].to_pylist() == [4, 0]
