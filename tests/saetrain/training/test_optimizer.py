"""One update: Adam on the unit sphere, with a state that survives a file."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from actcache.compiler import find_kernels
from saetrain import SAE, SAEConfig, TrainConfig
from saetrain.training.objective import add_gradients
from saetrain.training.optimizer import (
    Adam,
    apply_update,
    load_optimizer_tensors,
    optimizer_tensors,
    reset_latents,
)

ROOT = Path(__file__).parents[3]
MakeSAE = Callable[..., SAE]
N_LATENTS, D = 40, 12
TOPK = SAEConfig(n_latents=N_LATENTS, k=4)
RELU = SAEConfig(variant="relu", n_latents=N_LATENTS)
X = torch.randn(64, D, generator=torch.Generator().manual_seed(0))


def compute_gradients(sae: SAE) -> None:
    config = TrainConfig(precision="float32", aux=0.0, ghost=False)
    add_gradients(sae, X, torch.zeros(N_LATENTS, dtype=torch.bool), config)


def update(sae: SAE, optimizer: Adam, learning_rate: float = 0.01, clip_norm: float = 1.0) -> None:
    compute_gradients(sae)
    apply_update(sae, optimizer, learning_rate=learning_rate, clip_norm=clip_norm)


@pytest.mark.parametrize("config", [TOPK, RELU], ids=["topk", "relu"])
def test_decoder_rows_keep_unit_norm(random_sae: MakeSAE, config: SAEConfig) -> None:
    sae = random_sae(config)
    optimizer, before = Adam(sae), sae.decoder.detach().clone()
    for _ in range(5):
        update(sae, optimizer, learning_rate=0.1)
        torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(N_LATENTS))
    assert (sae.decoder - before).abs().max() > 0.05


def test_the_parallel_part_of_a_gradient_is_removed(random_sae: MakeSAE) -> None:
    """Adam sees only the component of a gradient that turns a dictionary row, not the one that lengthens it."""
    sae = random_sae(TOPK)
    optimizer = Adam(sae)
    unit = sae.decoder.detach().clone()
    turn = torch.randn(N_LATENTS, D, generator=torch.Generator().manual_seed(1))
    turn -= (turn * unit).sum(1, keepdim=True) * unit
    for parameter in sae.parameters():
        parameter.grad = torch.zeros_like(parameter)
    sae.decoder.grad = 3 * unit + turn
    apply_update(sae, optimizer, learning_rate=0.1, clip_norm=0)
    torch.testing.assert_close(optimizer.state[sae.decoder]["exp_avg"], 0.1 * turn, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_together_and_only_when_they_are_too_long(random_sae: MakeSAE) -> None:
    """Adam's first moment after one step is a tenth of the gradient that it saw."""

    def seen(clip_norm: float) -> torch.Tensor:
        sae = random_sae(TOPK)
        optimizer = Adam(sae)
        update(sae, optimizer, clip_norm=clip_norm)
        return torch.cat([10 * optimizer.state[parameter]["exp_avg"].flatten() for parameter in sae.parameters()])

    free = seen(0)
    norm = float(free.norm())
    torch.testing.assert_close(seen(norm * 2), free)
    assert float(seen(norm / 8).norm()) == pytest.approx(norm / 8, rel=1e-4)
    torch.testing.assert_close(seen(norm / 8), free / 8, rtol=1e-4, atol=1e-8)


def test_an_update_is_adams(random_sae: MakeSAE) -> None:
    """Kingma and Ba 2015, algorithm 1, on the encoder bias in numpy."""
    sae = random_sae(TOPK)
    optimizer = Adam(sae)
    expected = sae.b_enc.detach().numpy().astype(np.float64)
    mean, square = np.zeros(N_LATENTS), np.zeros(N_LATENTS)
    for step, rate in enumerate((0.01, 0.02, 0.005), start=1):
        compute_gradients(sae)
        assert sae.b_enc.grad is not None
        grad = sae.b_enc.grad.numpy().astype(np.float64)
        apply_update(sae, optimizer, learning_rate=rate, clip_norm=0)
        mean, square = 0.9 * mean + 0.1 * grad, 0.999 * square + 0.001 * grad**2
        expected -= rate * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
        np.testing.assert_allclose(sae.b_enc.detach().numpy(), expected, rtol=1e-4, atol=1e-6)
    assert not any(parameter.grad.any() for parameter in sae.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("config", [TOPK, RELU], ids=["topk", "relu"])
def test_the_state_survives_a_file_and_the_next_updates_are_bit_equal(
    tmp_path: Path, random_sae: MakeSAE, config: SAEConfig
) -> None:
    sae = random_sae(config)
    optimizer = Adam(sae)
    for _ in range(3):
        update(sae, optimizer)
    save_file({**sae.state_dict(), **optimizer_tensors(sae, optimizer)}, tmp_path / "state")
    tensors = load_file(tmp_path / "state")
    twin = random_sae(config, seed=9)
    twin.load_state_dict({name: value for name, value in tensors.items() if not name.startswith("adam.")})
    twin_optimizer = Adam(twin)
    load_optimizer_tensors(twin, twin_optimizer, tensors)
    for _ in range(3):
        update(sae, optimizer)
        update(twin, twin_optimizer)
        for a, b in zip(sae.parameters(), twin.parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_state_without_its_moments_would_not_be_bit_equal(random_sae: MakeSAE) -> None:
    """The test above can fail: a fresh Adam makes a different step."""
    sae = random_sae(TOPK)
    optimizer = Adam(sae)
    for _ in range(3):
        update(sae, optimizer)
    twin = random_sae(TOPK, seed=9)
    twin.load_state_dict(sae.state_dict())
    update(sae, optimizer)
    update(twin, Adam(twin))
    assert not torch.equal(sae.encoder, twin.encoder)


def test_a_replaced_latent_starts_with_no_moments(random_sae: MakeSAE) -> None:
    sae = random_sae(TOPK)
    optimizer = Adam(sae)
    for _ in range(3):
        update(sae, optimizer)
    before = {name: value.clone() for name, value in optimizer_tensors(sae, optimizer).items()}
    reset_latents(sae, optimizer, torch.tensor([3, 7]))
    kept = torch.ones(N_LATENTS, dtype=torch.bool)
    kept[[3, 7]] = False
    for name, value in optimizer_tensors(sae, optimizer).items():
        if name.endswith("step") or "b_dec" in name:
            assert torch.equal(value, before[name])
        else:
            assert not value[~kept].any()
            assert torch.equal(value[kept], before[name][kept])


def test_a_state_before_the_first_update_is_restored(random_sae: MakeSAE) -> None:
    """As a training leaves it whose first loss is not finite."""
    sae, twin = random_sae(TOPK), random_sae(TOPK)
    saved, restored = optimizer_tensors(sae, Adam(sae)), Adam(twin)
    load_optimizer_tensors(twin, restored, saved)
    update(sae, Adam(sae))
    update(twin, restored)
    for one, other in zip(sae.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("compiler", ["on", "off"])
def test_a_gradient_that_is_nan_reaches_all_weights(
    random_sae: MakeSAE, compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next loss is then not finite, and the run ends, whether gradients are clipped or not."""
    if compiler == "off":
        monkeypatch.setattr("saetrain.training.optimizer.find_kernels", lambda name: None)
    sae = random_sae(TOPK)
    compute_gradients(sae)
    assert sae.encoder.grad is not None
    sae.encoder.grad[5, 0] = torch.inf - torch.inf
    apply_update(sae, Adam(sae), learning_rate=0.1, clip_norm=1.0)
    assert all(parameter.isnan().all() for parameter in (sae.encoder, sae.decoder, sae.b_enc))


def test_a_first_step_on_a_cpu_does_not_load_torchs_compiler() -> None:
    """torch's optimizers load it when they are made, which takes 1.7 s."""
    if find_kernels("saetrain.training.update_kernels") is None:
        pytest.skip("there is no compiler, so torch's optimizer is taken")
    code = """
import sys, torch
from saetrain import SAE, SAEConfig, TrainConfig
from saetrain.training.objective import add_gradients
from saetrain.training.optimizer import Adam, apply_update
sae = SAE(SAEConfig("topk", 16, 2).resolve(8), 8)
add_gradients(sae, torch.randn(32, 8), torch.zeros(16, dtype=torch.bool), TrainConfig(precision="float32"))
before = sae.decoder.detach().clone()
apply_update(sae, Adam(sae), learning_rate=0.1, clip_norm=1.0)
print(bool((sae.decoder != before).any()), "torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["True", "False"]
