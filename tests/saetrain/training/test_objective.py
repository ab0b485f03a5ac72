"""The losses of every variant and their gradients against plain autograd on formulas written out here."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from saetrain import SAE, SAEConfig, TrainConfig
from saetrain.training import objective as module
from saetrain.training.objective import Loss, add_gradients
from saetrain.training.state import steer

MakeSAE = Callable[..., SAE]
F, K, D = 40, 4, 12
NONE_DEAD = torch.zeros(F, dtype=torch.bool)
VARIANTS = {
    "topk": SAEConfig("topk", F, K),
    "topk nested": SAEConfig("topk", F, K, prefixes=(5 / F, 20 / F, 1)),
    "batchtopk": SAEConfig("batchtopk", F, K),
    "batchtopk nested": SAEConfig("batchtopk", F, K, prefixes=(7 / F, 1)),
    "relu": SAEConfig("relu", F, l1=0.01),
    "relu centered": SAEConfig("relu", F, l1=0.3, normalize="center"),
    "jumprelu quadratic": SAEConfig("jumprelu", F, K, bandwidth=0.5),
    "jumprelu tanh": SAEConfig("jumprelu", F, K, penalty="tanh", l1=0.01, bandwidth=0.5),
    "gated": SAEConfig("gated", F, K, l1=0.02),
}
TRAIN = TrainConfig(aux=1 / 32, ghost=False).resolve(VARIANTS["topk"].resolve(D), "float32")


@pytest.fixture(params=["sparse", "dense"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Force one of the two ways of computing."""
    share = 1.0 if request.param == "sparse" else -1.0
    monkeypatch.setattr(module, "DENSE_SHARE", {"float32": share, "bfloat16": share})
    monkeypatch.setattr(module, "DENSE_ROWS", 100)  # several blocks
    return str(request.param)


def rows(n: int = 300, seed: int = 3) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def make(random_sae: MakeSAE, config: SAEConfig) -> SAE:
    sae = random_sae(config, d_model=D)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        if config.variant == "jumprelu":
            sae.threshold.uniform_(0.5, 2.0, generator=generator)
        if config.variant == "gated":
            sae.b_enc.sub_(0.8)
            sae.log_scale.normal_(0, 0.3, generator=generator)
            sae.b_mag.normal_(0.5, 0.3, generator=generator)
    return sae


def window(z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Rectangle kernel of the straight-through estimator, integral 1."""
    return ((z - threshold).abs() <= bandwidth / 2).float() / bandwidth


class Step(torch.autograd.Function):
    """H(z - threshold) with the pseudo-derivative of Rajamanoharan et al. 2024, eq. 12."""

    @staticmethod
    def forward(ctx, z, threshold, bandwidth):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).float()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        z, threshold = ctx.saved_tensors
        return None, -(window(z, threshold, ctx.bandwidth) * grad).sum(0), None


class Jump(torch.autograd.Function):
    """z H(z - threshold), eq. 11."""

    @staticmethod
    def forward(ctx, z, threshold, bandwidth):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return z * (z > threshold)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        z, threshold = ctx.saved_tensors
        return grad * (z > threshold), -(window(z, threshold, ctx.bandwidth) * threshold * grad).sum(0), None


def reference(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dense values [B, F], residual) by plain dense autograd."""
    config, z = sae.config, (x - sae.b_dec) @ sae.encoder.T + sae.b_enc
    share = 1 / (x - x.mean(0)).square().sum()
    penalty = torch.zeros(())
    if config.variant == "topk":
        values = torch.zeros_like(z).scatter(1, z.topk(K).indices, z.topk(K).values.relu())
    elif config.variant == "batchtopk":
        values = z.relu() * (z >= z.flatten().topk(K * len(x)).values[-1])
    elif config.variant == "relu":
        values = z.relu()
        penalty = config.l1 * values.sum(1).mean()
        share = 1 / (x.norm(dim=1, keepdim=True) * x.numel())
    elif config.variant == "jumprelu":
        values = Jump.apply(z, sae.threshold, config.bandwidth)
        if config.penalty == "tanh":
            penalty = config.l1 * torch.tanh(4 * values).sum(1).mean()
        else:
            l0 = Step.apply(z, sae.threshold, config.bandwidth).sum(1).mean()
            penalty = config.l1 * (l0 / config.target_l0 - 1) ** 2
    else:
        magnitude = (x - sae.b_dec) @ (sae.encoder * sae.log_scale.exp()[:, None]).T + sae.b_mag
        values = (z > 0) * magnitude.relu()
        aside = x - z.relu() @ sae.decoder.detach() - sae.b_dec.detach()
        penalty = config.l1 * z.relu().sum(1).mean() + share * aside.square().sum()
    prefixes = config.nested or (F,)
    errors = [(share * (x - values[:, :n] @ sae.decoder[:n] - sae.b_dec).square()).sum() for n in prefixes]
    residual = x - values @ sae.decoder - sae.b_dec
    return sum(errors) / len(prefixes) + penalty, values.detach(), residual.detach()  # type: ignore[operator]


def gradients(sae: SAE, work: Callable[[], object]) -> dict[str, Tensor]:
    sae.zero_grad()
    work()
    return {
        name: parameter.grad.clone() if parameter.grad is not None else torch.zeros_like(parameter)
        for name, parameter in sae.named_parameters()
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_gradients_equal_plain_autograd(random_sae: MakeSAE, path: str, name: str) -> None:
    sae, x = make(random_sae, VARIANTS[name]), rows()
    losses: list[Loss] = []
    got = gradients(sae, lambda: losses.append(add_gradients(sae, x, NONE_DEAD, TRAIN)))
    loss = losses[0]
    total, values, residual = reference(sae, x)
    expected = gradients(sae, lambda: torch.autograd.backward(total))
    for parameter in expected:
        torch.testing.assert_close(got[parameter], expected[parameter], rtol=1e-3, atol=2e-5)
        assert expected[parameter].any()
    assert float(loss.total) == pytest.approx(float(total.detach()), rel=1e-4)
    assert float(loss.squared_error) == pytest.approx(float(residual.square().sum()), rel=1e-4)
    assert float(loss.variance) == pytest.approx(float((x - x.mean(0)).square().sum()), rel=1e-5)
    assert float(loss.reconstruction + loss.sparsity) == pytest.approx(float(loss.total))
    assert int(loss.n_active) == int((values > 0).sum()) > 0
    assert int(loss.n_rows) == len(x)
    assert torch.equal(loss.fired, (values > 0).any(0))
    assert float(loss.revival) == 0


@pytest.mark.parametrize("name", VARIANTS)
def test_bfloat16_points_the_same_way(random_sae: MakeSAE, path: str, name: str) -> None:
    sae, x = make(random_sae, VARIANTS[name]), rows()
    exact = gradients(sae, lambda: add_gradients(sae, x, NONE_DEAD, TRAIN))
    rounded = gradients(sae, lambda: add_gradients(sae, x, NONE_DEAD, replace(TRAIN, precision="bfloat16")))
    for parameter in ("encoder", "decoder", "b_dec"):
        a, b = exact[parameter].flatten(), rounded[parameter].flatten()
        assert float(torch.cosine_similarity(a, b, dim=0)) > 0.97
        assert not torch.equal(a, b)


# ---------------------------------------------------------------------------------------------------------------------
# Revival


def sae_with_dead(random_sae: MakeSAE, n_dead: int, config: SAEConfig) -> tuple[SAE, Tensor]:
    """The last n_dead latents are never active, yet some of their pre-activations are positive."""
    sae = make(random_sae, config)
    with torch.no_grad():
        sae.encoder[-n_dead:] *= 0.05
        sae.b_enc[-n_dead:] = -0.02 if config.variant == "relu" else 0
        if config.variant == "relu":
            sae.encoder[-n_dead:] *= 0.01
    return sae, torch.arange(F) >= F - n_dead


@pytest.mark.parametrize("n_dead", [3, 10], ids=["fewer than d/2", "more than d/2"])
def test_auxk_is_the_share_of_the_residual_that_the_dead_leave_unexplained(
    random_sae: MakeSAE, path: str, n_dead: int
) -> None:
    (sae, dead), x = sae_with_dead(random_sae, n_dead, VARIANTS["topk"]), rows()
    losses: list[Loss] = []
    config = replace(TRAIN, aux=0.5)
    with_aux = gradients(sae, lambda: losses.append(add_gradients(sae, x, dead, config)))
    without = gradients(sae, lambda: add_gradients(sae, x, NONE_DEAD, config))
    assert not losses[0].fired[dead].any()

    _, _, residual = reference(sae, x)
    encoder, b_enc, decoder = (p.detach()[dead].requires_grad_() for p in (sae.encoder, sae.b_enc, sae.decoder))
    z = (x - sae.b_dec.detach()) @ encoder.T + b_enc
    top = z.topk(min(n_dead, D // 2))
    revived = torch.zeros(len(x), n_dead).scatter(1, top.indices, top.values.relu()) @ decoder
    aux = 0.5 * (residual - revived).square().sum() / (residual - residual.mean(0)).square().sum()
    torch.autograd.backward(aux)
    assert float(losses[0].revival) == pytest.approx(float(aux.detach()), rel=1e-4)
    assert float(losses[0].total) == pytest.approx(float(losses[0].reconstruction + aux.detach()), rel=1e-4)
    for name, part in (("encoder", encoder), ("b_enc", b_enc), ("decoder", decoder)):
        change = with_aux[name] - without[name]
        assert not change[~dead].any()
        torch.testing.assert_close(change[dead], part.grad, rtol=1e-3, atol=1e-6)
    assert torch.equal(with_aux["b_dec"], without["b_dec"])


def test_ghost_gradients_are_patchsaes(random_sae: MakeSAE, path: str) -> None:
    """Its code, on dense arrays: residual and both scales are constants."""
    (sae, dead), x = sae_with_dead(random_sae, 6, VARIANTS["relu"]), rows()
    config, losses = replace(TRAIN, ghost=True, aux=0.0), []
    with_ghost = gradients(sae, lambda: losses.append(add_gradients(sae, x, dead, config)))
    without = gradients(sae, lambda: add_gradients(sae, x, NONE_DEAD, config))

    _, _, residual = reference(sae, x)
    mse = residual.square() / x.norm(dim=1, keepdim=True)
    encoder, b_enc, decoder = (p.detach()[dead].requires_grad_() for p in (sae.encoder, sae.b_enc, sae.decoder))
    b_dec = sae.b_dec.detach().requires_grad_()
    ghost = ((x - b_dec) @ encoder.T + b_enc).exp() @ decoder
    ghost = ghost * (residual.norm(dim=1, keepdim=True) / (1e-6 + 2 * ghost.norm(dim=1, keepdim=True))).detach()
    error = (ghost - residual).square() / residual.norm(dim=1, keepdim=True)
    loss = (error * (mse / (error + 1e-6)).detach()).mean()
    torch.autograd.backward(loss)
    assert float(losses[0].revival) == pytest.approx(float(loss.detach()), rel=1e-4)
    for name, part in (("encoder", encoder), ("b_enc", b_enc), ("decoder", decoder)):
        change = with_ghost[name] - without[name]
        assert not change[~dead].any()
        torch.testing.assert_close(change[dead], part.grad, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(with_ghost["b_dec"] - without["b_dec"], b_dec.grad, rtol=1e-3, atol=1e-7)


def test_without_a_dead_latent_or_a_weight_nothing_is_revived(random_sae: MakeSAE) -> None:
    (sae, dead), x = sae_with_dead(random_sae, 10, VARIANTS["topk"]), rows()
    assert float(add_gradients(sae, x, NONE_DEAD, TRAIN).revival) == 0
    assert float(add_gradients(sae, x, dead, replace(TRAIN, aux=0.0)).revival) == 0
    assert float(add_gradients(sae, x, dead, TRAIN).revival) > 0


# ---------------------------------------------------------------------------------------------------------------------
# The rest


def test_the_way_of_computing_follows_the_share_of_active_entries(
    random_sae: MakeSAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways: list[str] = []
    for name in ("_add_sparse", "_add_dense"):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name, **k: (ways.append(name), real(*a, **k))[1])
    sae, x = make(random_sae, VARIANTS["relu"]), rows()
    add_gradients(sae, x, NONE_DEAD, TRAIN)
    with torch.no_grad():
        sae.b_enc.sub_(3)
    add_gradients(sae, x, NONE_DEAD, TRAIN)
    assert ways == ["_add_dense", "_add_sparse"]


def test_a_row_of_zeros_gives_a_finite_relu_loss(random_sae: MakeSAE, path: str) -> None:
    sae = random_sae(SAEConfig(variant="relu", n_latents=F))
    assert torch.isfinite(add_gradients(sae, torch.zeros(4, D), NONE_DEAD, TRAIN).total)


def test_the_penalty_can_be_given_another_weight(random_sae: MakeSAE, path: str) -> None:
    sae, x = make(random_sae, VARIANTS["relu"]), rows()
    one, three = (add_gradients(sae, x, NONE_DEAD, TRAIN, weight=w).sparsity for w in (0.1, 0.3))
    assert float(three) == pytest.approx(3 * float(one), rel=1e-5)


def test_steering_raises_the_weight_of_too_many_and_lowers_that_of_too_few() -> None:
    assert steer(1.0, 64, 32) == pytest.approx(math.exp(0.01 * math.log(2)))
    assert steer(1.0, 16, 32) == pytest.approx(math.exp(-0.01 * math.log(2)))
    assert steer(2.0, 32, 32) == 2.0
    assert steer(1.0, 10_000, 1) == pytest.approx(math.exp(0.01))
    assert steer(1.0, 0, 32) == pytest.approx(math.exp(-0.01))
