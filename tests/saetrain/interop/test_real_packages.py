"""The packages themselves compute what our converted SAEs compute, of the files that they wrote and of ours.

They run in an environment of their own (benchmarks/peers-env.sh), by the scripts in `peers/`. Packages that are not on
PyPI, or whose release there is older than their SAEs, are compared with formulas in the other modules here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from actcache import ActivationStore
from saetrain import SAE, Run, SAEConfig, TrainConfig, convert, train

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parent / "peers"
SAELENS_6 = (
    "standard", "standard-uncentered", "gated", "topk", "topk-unscaled", "jumprelu", "batchtopk", "matryoshka",
    "layer_norm", "constant_norm_rescale",
)  # fmt: skip
WRITTEN: dict[str, tuple[str, ...]] = {
    "saelens": (
        *SAELENS_6, *(f"{name}-training" for name in SAELENS_6), "standard-scaled", "2024-05", "3-standard",
        "3-uncentered", "3-gated", "3-jumprelu", "5-topk", "5-topk-named",
    ),
    "dictionary_learning": (
        "AutoEncoder", "AutoEncoder-april", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE",
        "BatchTopKSAE-normalized", "MatryoshkaBatchTopKSAE", "MatroyshkaBatchTopKSAE", "JumpReluAutoEncoder",
        "GatedAutoEncoder",
    ),
    "overcomplete": ("relu", "topk", "topk-multiplied", "topk-norm", "batchtopk", "jumprelu", "ra_sae"),
    "saev": ("relu",),
    "sparsify": ("factor", "latents", "multi"),
    "visaebench": ("topk", "topk-safetensors", "batchtopk", "batchtopk-running", "jumprelu", "published"),
    "clipscope": ("topk",),
}  # fmt: skip
"""Package -> the SAEs that its script makes."""
RAW = {"input_mean": 0, "input_scale": 1}
GIVEN: dict[str, dict[str, Any]] = {"saev": RAW, "visaebench": RAW, "clipscope": RAW}
"""The packages compute codes of activations as they are, although their training normalized them."""
FORMATS = {"published": "overcomplete", "ra_sae": "ra_sae"}
"""Name -> its format, where that is not called as the package."""
OURS = {
    "topk": SAEConfig("topk", 48, 3),
    "batchtopk": SAEConfig("batchtopk", 48, 3),
    "relu": SAEConfig("relu", 48, l1=0.002),
    "jumprelu": SAEConfig("jumprelu", 48, 3),
    "gated": SAEConfig("gated", 48, 3),
}
READ = {"saelens": tuple(OURS), "dictionary_learning": tuple(OURS), "sparsify": ("topk",)}
"""Package -> the variants that it loads from what we write."""
TOLERANCE = 1e-5
"""Largest difference, relative to the largest value."""


def rows_of(store: Path) -> Tensor:
    values = ActivationStore.open(store).read(images=range(8, 40))
    return torch.from_numpy(values.reshape(-1, values.shape[-1])).float()


def compute(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes [N, F] in the units of the package that they came from, reconstructions [N, D])."""
    rows, latents, values = sae.encode(x)
    codes = torch.zeros(len(x), sae.config.n_latents).index_put_((rows, latents), values)
    return codes if sae.norms is None else codes / sae.norms, sae.decode(rows, latents, values, len(x), like=x)


def check(ours: tuple[Tensor, Tensor], file: Path) -> None:
    with np.load(file) as theirs:
        for mine, wanted in zip(ours, (theirs["codes"], theirs["decoded"]), strict=True):
            assert np.abs(wanted).max() > 0.1
            np.testing.assert_allclose(mine.numpy(), wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max())
        assert 0.01 < (theirs["codes"] != 0).mean() < 0.99  # some latents are active, and not all
        np.testing.assert_array_equal(ours[0].numpy() != 0, theirs["codes"] != 0)


@pytest.fixture(scope="module")
def rows_file(planted_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.npy"
    np.save(file, rows_of(planted_store).numpy())
    return file


@pytest.fixture(scope="module")
def written(
    run_peers: Callable[..., str], rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """written(package) -> the folder of what its script made. The script runs once, also where it fails."""
    folders: dict[str, Path] = {}

    def make(package: str) -> Path:
        if package not in folders:
            folders[package] = tmp_path_factory.mktemp(package)
            run_peers(SCRIPTS / f"write_{package}.py", rows_file, folders[package])
        assert {path.stem for path in folders[package].glob("*.npz")} == set(WRITTEN[package])
        return folders[package]

    return make


@pytest.mark.parametrize(("package", "name"), [(package, name) for package in WRITTEN for name in WRITTEN[package]])
def test_what_a_package_wrote_computes_the_same_here(
    tmp_path: Path, written: Callable[[str], Path], planted_store: Path, package: str, name: str
) -> None:
    folder = written(package)
    made = convert(
        folder / name, tmp_path / "run", store=planted_store, layer=0, any_model=True, **GIVEN.get(package, {})
    )
    assert made.format == FORMATS.get(name, package)
    check(compute(Run.open(tmp_path / "run").sae(), rows_of(planted_store)), folder / f"{name}.npz")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, planted_store: Path) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    config = TrainConfig(n_steps=60, batch_size=256, lr=3e-3, pool_tokens=2000, precision="float32")
    return {name: train(planted_store, folder / name, sae=sae, config=config) for name, sae in OURS.items()}


@pytest.mark.parametrize("package", READ)
def test_what_we_write_computes_the_same_in_its_package(
    tmp_path: Path, run_peers: Callable[..., str], written: Callable[[str], Path], rows_file: Path,
    runs: dict[str, Run], planted_store: Path, package: str,
) -> None:  # fmt: skip
    given = {variant: runs[variant] for variant in READ[package]}
    if package == "saelens":  # which also holds an SAE that normalizes each token
        convert(written(package) / "layer_norm", tmp_path / "read", store=planted_store)
        given["layer_norm"] = Run.open(tmp_path / "read")
    for name, run in given.items():
        convert(run.path, tmp_path / "out" / name, to=package, store=planted_store)
    run_peers(SCRIPTS / "read_exports.py", rows_file, tmp_path / "out", package)
    for name, run in given.items():
        check(compute(run.sae(), rows_of(planted_store)), tmp_path / "out" / f"{name}.npz")
