"""The network, its sparse step, its losses and its quality against plain formulas."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from actcache import ActivationStore, CorruptError, HookPoint, SettingsError
from saetrain import SAE, SAEConfig, TrainConfig, evaluate
from saetrain.objective import relu_loss, topk_loss
from saetrain.optimizer import apply_update, load_optimizer_tensors, make_optimizer, optimizer_tensors
from saetrain.sparse import select_topk, topk_autoencode, topk_dense


def random_sae(config: SAEConfig, d_model: int = 12, seed: int = 0) -> SAE:
    """Resolved, with every parameter and the normalization away from its initial value."""
    sae = SAE(config.resolve(d_model), d_model, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in (sae.encoder, sae.b_enc, sae.b_dec):
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    sae.set_normalization(np.linspace(-1, 1, d_model), 3.0)
    return sae


@pytest.mark.parametrize(("rows", "n_latents", "k"), [(1, 8, 1), (100, 40, 5), (256, 64, 64), (700, 300, 7)])
def test_the_sparse_step_equals_dense_autograd(rows: int, n_latents: int, k: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 12), torch.randn(rows, 12)
    parameters = [torch.randn(n_latents, 12), torch.randn(n_latents) - 0.5, torch.randn(n_latents, 12)]
    grads, outs = [], []
    for function in (topk_autoencode, topk_dense):
        leaves = [p.clone().requires_grad_() for p in parameters]
        out, code = function(x, *leaves, k)
        torch.autograd.backward((out * weight).sum())
        grads.append([leaf.grad for leaf in leaves])
        outs.append((out.detach(), torch.zeros(rows, n_latents).scatter(1, code.latents, code.values)))
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-5)
    for sparse, dense in zip(*grads, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-4)


def test_bfloat16_selects_nearly_the_same() -> None:
    torch.manual_seed(0)
    x, encoder, bias = torch.randn(500, 64), torch.randn(256, 64), torch.randn(256)
    exact = select_topk(x, encoder, bias, 8)
    rounded = select_topk(x, encoder, bias, 8, bfloat16=True)
    shared = [len(set(a) & set(b)) for a, b in zip(exact.latents.tolist(), rounded.latents.tolist(), strict=True)]
    assert sum(shared) / (500 * 8) > 0.97
    assert float((exact.values.sum() - rounded.values.sum()).abs() / exact.values.sum()) < 0.01


@pytest.mark.parametrize("variant", ["topk", "relu"])
def test_encoding_and_decoding_follow_the_formulas(variant: str) -> None:
    sae = random_sae(SAEConfig(variant=variant, n_latents=30, k=4, normalize="center"))
    x = torch.randn(300, 12, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        z = ((x - sae.mean) * sae.scale - sae.b_dec) @ sae.encoder.T + sae.b_enc
        if variant == "topk":
            z = torch.zeros_like(z).scatter(1, z.topk(4).indices, z.topk(4).values)
        z = z.relu()
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


def test_topk_loss_is_fvu_plus_auxk_on_dead_latents_only() -> None:
    sae = random_sae(SAEConfig(n_latents=40, k=4))
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(3))
    dead = torch.zeros(40, dtype=torch.bool)
    dead[30:] = True
    with torch.no_grad():  # dead latents: never among the strongest
        sae.b_enc[30:] -= 50
    alone = topk_loss(sae, x, torch.zeros(40, dtype=torch.bool), aux=1 / 32, bfloat16=False)
    both = topk_loss(sae, x, dead, aux=1 / 32, bfloat16=False)
    z = F.linear(x - sae.b_dec, sae.encoder, sae.b_enc)
    top = z.topk(4)
    reconstruction = torch.zeros_like(z).scatter(1, top.indices, top.values.relu()) @ sae.decoder + sae.b_dec
    variance = (x - x.mean(0)).square().sum()
    torch.testing.assert_close(alone.total, (x - reconstruction).square().sum() / variance)
    residual = (x - reconstruction).detach()
    k_aux = min(10, 12 // 2)
    strongest = z[:, 30:].topk(k_aux)
    revived = torch.zeros(64, 10).scatter(1, strongest.indices, strongest.values.relu()) @ sae.decoder[30:]
    aux = (residual - revived).square().sum() / (residual - residual.mean(0)).square().sum()
    torch.testing.assert_close(both.total - alone.total, aux / 32, rtol=1e-4, atol=1e-6)
    assert not alone.fired[30:].any()
    assert int(alone.n_active) == int((top.values > 0).sum())


def test_auxk_reaches_only_the_dead() -> None:
    sae = random_sae(SAEConfig(n_latents=40, k=4))
    x = torch.randn(64, 12)
    dead = torch.arange(40) >= 30
    with torch.no_grad():
        sae.b_enc[30:] -= 1.0

    def gradient(aux: float) -> torch.Tensor:
        sae.zero_grad()
        torch.autograd.backward(topk_loss(sae, x, dead, aux=aux, bfloat16=False).total)
        assert sae.decoder.grad is not None
        return sae.decoder.grad.clone()

    change = gradient(1.0) - gradient(0.0)
    assert change[30:].abs().max() > 1e-6
    assert change[:30].abs().max() == 0


def test_relu_loss_is_patchsaes() -> None:
    """mean over tokens and channels of (x^ - x)^2 / ||x||_2, plus l1 * mean ||z||_1."""
    sae = random_sae(SAEConfig(variant="relu", n_latents=30, l1=0.01))
    x = torch.randn(50, 12) + 1
    loss = relu_loss(sae, x, bfloat16=False)
    with torch.no_grad():
        z = ((x - sae.b_dec) @ sae.encoder.T + sae.b_enc).relu().numpy().astype(np.float64)
        reconstruction = z @ sae.decoder.numpy() + sae.b_dec.numpy()
    error = (reconstruction - x.numpy()) ** 2 / np.linalg.norm(x.numpy(), axis=1, keepdims=True)
    assert float(loss.total.detach()) == pytest.approx(error.mean() + 0.01 * z.sum(1).mean(), rel=1e-5)
    assert int(loss.n_active) == (z > 0).sum()


def test_an_update_keeps_the_dictionary_on_the_sphere_and_resumes_exactly() -> None:
    x = torch.randn(64, 12)

    def update(sae: SAE, optimizer: torch.optim.Adam) -> None:
        loss = topk_loss(sae, x, torch.zeros(40, dtype=torch.bool), aux=0, bfloat16=False)
        torch.autograd.backward(loss.total)
        apply_update(sae, optimizer, learning_rate=0.01, clip_norm=1.0)

    sae = random_sae(SAEConfig(n_latents=40, k=4))
    optimizer = make_optimizer(sae)
    update(sae, optimizer)
    tensors = {name: value.clone() for name, value in optimizer_tensors(sae, optimizer).items()}
    twin = random_sae(SAEConfig(n_latents=40, k=4), seed=9)
    twin.load_state_dict(sae.state_dict())
    twin_optimizer = make_optimizer(twin)
    load_optimizer_tensors(twin, twin_optimizer, tensors)
    for _ in range(3):
        update(sae, optimizer)
        update(twin, twin_optimizer)
    for a, b in zip(sae.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(40))


def test_the_parallel_part_of_a_gradient_is_removed() -> None:
    sae = random_sae(SAEConfig(n_latents=40, k=4))
    optimizer = make_optimizer(sae)
    before = sae.decoder.detach().clone()
    for parameter in sae.parameters():
        parameter.grad = torch.zeros_like(parameter)
    sae.decoder.grad = 3 * before  # wholly parallel
    apply_update(sae, optimizer, learning_rate=0.1, clip_norm=0)
    assert optimizer.state[sae.decoder]["exp_avg"].abs().max() < 1e-6  # of a gradient whose rows had norm 3


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


def test_configs_derive_and_refuse() -> None:
    sae = SAEConfig().resolve(768)
    assert (sae.size, sae.normalize) == (12_288, "center")
    assert SAEConfig(variant="relu").resolve(768).normalize == "none"
    config = TrainConfig(n_steps=1000).resolve(SAEConfig(n_latents=2**14).resolve(8), "float32")
    assert (config.lr, config.warmup_steps, config.precision) == (2e-4, 100, "float32")
    rates = [config.learning_rate(step) for step in range(1000)]
    assert max(rates) == 2e-4
    assert rates[0] == pytest.approx(2e-6)
    assert 0 < rates[-1] < 2e-6
    for wrong in (
        SAEConfig(variant="gated"), SAEConfig(k=0), SAEConfig(n_latents=8, k=9), SAEConfig(n_latents=0),
        SAEConfig(normalize="z"), SAEConfig(l1=-1.0),
    ):  # fmt: skip
        with pytest.raises(SettingsError, match="--"):
            wrong.resolve(8)
    for bad in (
        TrainConfig(n_steps=0),
        TrainConfig(batch_size=0),
        TrainConfig(precision="int8"),
        TrainConfig(decay_fraction=2),
    ):
        with pytest.raises(SettingsError):
            bad.resolve(sae, "float32")
