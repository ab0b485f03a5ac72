"""The losses against formulas written out in numpy, and their gradients against plain autograd."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from saetrain import SAE, SAEConfig
from saetrain.objective import relu_loss, topk_loss

Array = NDArray[np.float64]
MakeSAE = Callable[..., SAE]
N_LATENTS, K, D = 40, 4, 12
NONE_DEAD = torch.zeros(N_LATENTS, dtype=torch.bool)


def rows(n: int = 64, seed: int = 3) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def arrays(sae: SAE) -> tuple[Array, Array, Array, Array]:
    """encoder, b_enc, decoder, b_dec in float64."""
    parameters = (sae.encoder, sae.b_enc, sae.decoder, sae.b_dec)
    return tuple(parameter.detach().numpy().astype(np.float64) for parameter in parameters)  # type: ignore[return-value]


def strongest(z: Array, k: int) -> Array:
    """All but the k largest of each row set to 0, then ReLU."""
    cut = -np.sort(-z, axis=1)[:, k - 1 : k]
    return np.where(z >= cut, z, 0).clip(min=0)


def spread(x: Array) -> float:
    return float(((x - x.mean(0)) ** 2).sum())


def gradients(sae: SAE, total: Tensor) -> dict[str, Tensor]:
    sae.zero_grad()
    torch.autograd.backward(total)
    return {name: parameter.grad.clone() for name, parameter in sae.named_parameters() if parameter.grad is not None}


def sae_with_dead(random_sae: MakeSAE, n_dead: int) -> tuple[SAE, Tensor]:
    """The last n_dead latents are never among the strongest, yet some of their pre-activations are positive."""
    sae = random_sae(SAEConfig(n_latents=N_LATENTS, k=K))
    with torch.no_grad():
        sae.encoder[-n_dead:] *= 0.05
        sae.b_enc[-n_dead:] = 0
    return sae, torch.arange(N_LATENTS) >= N_LATENTS - n_dead


# ---------------------------------------------------------------------------------------------------------------------
# topk


def test_topk_loss_is_the_unexplained_share_of_the_batch(random_sae: MakeSAE) -> None:
    sae, x = random_sae(SAEConfig(n_latents=N_LATENTS, k=K)), rows()
    loss = topk_loss(sae, x, NONE_DEAD, aux=1 / 32, bfloat16=False)
    encoder, b_enc, decoder, b_dec = arrays(sae)
    x64 = x.numpy().astype(np.float64)
    z = strongest((x64 - b_dec) @ encoder.T + b_enc, K)
    error = ((x64 - z @ decoder - b_dec) ** 2).sum()
    assert float(loss.total.detach()) == pytest.approx(error / spread(x64), rel=1e-5)
    assert float(loss.reconstruction) == pytest.approx(error / spread(x64), rel=1e-5)
    assert float(loss.squared_error) == pytest.approx(error, rel=1e-5)
    assert float(loss.sparsity) == 0
    assert int(loss.n_active) == (z > 0).sum()
    assert np.array_equal(loss.fired.numpy(), (z > 0).any(0))


@pytest.mark.parametrize("n_dead", [3, 10], ids=["fewer than d/2", "more than d/2"])
def test_auxk_is_the_share_of_the_residual_that_the_dead_leave_unexplained(random_sae: MakeSAE, n_dead: int) -> None:
    (sae, dead), x = sae_with_dead(random_sae, n_dead), rows()
    loss = topk_loss(sae, x, dead, aux=1 / 32, bfloat16=False)
    assert not loss.fired[dead].any()
    encoder, b_enc, decoder, b_dec = arrays(sae)
    x64 = x.numpy().astype(np.float64)
    z = (x64 - b_dec) @ encoder.T + b_enc
    residual = x64 - strongest(z, K) @ decoder - b_dec
    revived = strongest(z[:, dead.numpy()], min(n_dead, D // 2))
    assert (revived > 0).any()
    aux = ((residual - revived @ decoder[dead.numpy()]) ** 2).sum() / spread(residual)
    assert float(loss.sparsity) == pytest.approx(aux / 32, rel=1e-4)
    assert float(loss.total.detach()) == pytest.approx(float(loss.reconstruction) + aux / 32, rel=1e-4)


@pytest.mark.parametrize("n_dead", [3, 10])
def test_auxk_gradients_reach_the_dead_only_and_equal_dense_autograd(random_sae: MakeSAE, n_dead: int) -> None:
    (sae, dead), x = sae_with_dead(random_sae, n_dead), rows()
    grads = [gradients(sae, topk_loss(sae, x, dead, aux=aux, bfloat16=False).total) for aux in (1.0, 0.0)]

    z = (x - sae.b_dec) @ sae.encoder.T + sae.b_enc
    top = z.topk(K)
    code = torch.zeros_like(z).scatter(1, top.indices, top.values.relu())
    residual = (x - code @ sae.decoder - sae.b_dec).detach()
    top = z[:, dead].topk(min(n_dead, D // 2))
    revived = torch.zeros(len(x), n_dead).scatter(1, top.indices, top.values.relu()) @ sae.decoder[dead]
    expected = gradients(sae, (residual - revived).square().sum() / spread(residual.numpy()))

    for name in ("encoder", "b_enc", "decoder"):
        change = grads[0][name] - grads[1][name]
        assert not change[~dead].any()
        assert change[dead].any()
        torch.testing.assert_close(change, expected[name], rtol=1e-3, atol=1e-6)


def test_without_a_dead_latent_or_a_weight_there_is_no_auxk(random_sae: MakeSAE) -> None:
    (sae, dead), x = sae_with_dead(random_sae, 10), rows()
    assert float(topk_loss(sae, x, NONE_DEAD, aux=1.0, bfloat16=False).sparsity) == 0
    assert float(topk_loss(sae, x, dead, aux=0, bfloat16=False).sparsity) == 0


# ---------------------------------------------------------------------------------------------------------------------
# relu


def test_relu_loss_is_patchsaes(random_sae: MakeSAE) -> None:
    """mean over tokens and channels of (x^ - x)^2 / ||x||_2, plus l1 * mean ||z||_1."""
    sae, x = random_sae(SAEConfig(variant="relu", n_latents=30, l1=0.01)), rows(50) + 1
    loss = relu_loss(sae, x, bfloat16=False)
    encoder, b_enc, decoder, b_dec = arrays(sae)
    x64 = x.numpy().astype(np.float64)
    z = ((x64 - b_dec) @ encoder.T + b_enc).clip(min=0)
    error = (z @ decoder + b_dec - x64) ** 2
    reconstruction = (error / np.linalg.norm(x64, axis=1, keepdims=True)).mean()
    sparsity = 0.01 * np.abs(z).sum(1).mean()
    assert float(loss.reconstruction) == pytest.approx(reconstruction, rel=1e-5)
    assert float(loss.sparsity) == pytest.approx(sparsity, rel=1e-5)
    assert float(loss.total.detach()) == pytest.approx(reconstruction + sparsity, rel=1e-5)
    assert float(loss.squared_error) == pytest.approx(error.sum(), rel=1e-5)
    assert int(loss.n_active) == (z > 0).sum()
    assert np.array_equal(loss.fired.numpy(), (z > 0).any(0))


def test_relu_gradients_equal_plain_autograd(random_sae: MakeSAE) -> None:
    sae, x = random_sae(SAEConfig(variant="relu", n_latents=30, l1=0.01)), rows(50) + 1
    got = gradients(sae, relu_loss(sae, x, bfloat16=False).total)
    z = torch.relu((x - sae.b_dec) @ sae.encoder.T + sae.b_enc)
    error = (z @ sae.decoder + sae.b_dec - x) ** 2 / x.norm(dim=1, keepdim=True)
    expected = gradients(sae, error.mean() + 0.01 * z.abs().sum(1).mean())
    assert set(got) == set(expected) == {"encoder", "decoder", "b_enc", "b_dec"}
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)


def test_a_row_of_zeros_gives_a_finite_relu_loss(random_sae: MakeSAE) -> None:
    sae = random_sae(SAEConfig(variant="relu", n_latents=30))
    assert torch.isfinite(relu_loss(sae, torch.zeros(4, D), bfloat16=False).total)


@pytest.mark.parametrize("variant", ["topk", "relu"])
def test_bfloat16_changes_a_loss_a_little(random_sae: MakeSAE, variant: str) -> None:
    sae, x = random_sae(SAEConfig(variant=variant, n_latents=N_LATENTS, k=K, l1=0.01)), rows()

    def total(bfloat16: bool) -> float:
        loss = relu_loss(sae, x, bfloat16=bfloat16)
        if variant == "topk":
            loss = topk_loss(sae, x, NONE_DEAD, aux=0, bfloat16=bfloat16)
        assert loss.total.dtype == torch.float32
        return float(loss.total.detach())

    assert total(True) == pytest.approx(total(False), rel=0.02)
    assert total(True) != total(False)
