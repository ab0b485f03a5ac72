"""PatchSAE's training, written out densely from its formulas, beside `train --variant relu`: the same curves.

`PatchSAE` below shares nothing with the project: float32, dense arrays, plain autograd, no clipping, its ghost
gradients, unit rows at the start of a step, the parallel part of their gradient removed (arXiv 2412.05276, and its
published code where the two differ). As a script it makes the longer comparison of docs/results/quality.md:

    python tests/saetrain/training/test_parity.py train.acts OUT
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actcache import ActivationStore, extract, open_stores
from actcache.compiler import find_kernels
from saetrain import ActivationLoader, Run, SAEConfig, TrainConfig, train

pytestmark = pytest.mark.slow

LR, L1, WARMUP = 4e-4, 8e-5, 500
NAMES = ("reconstruction", "sparsity", "fvu", "l0")
WINDOW = 10
"""Steps over which shares of dead latents are averaged."""


class PatchSAE:
    """W_enc [D, F], b_enc [F], W_dec [F, D], b_dec [D]; dead after `window` steps of silence."""

    def __init__(self, start: dict[str, Tensor], window: int, l1: float, config: TrainConfig) -> None:
        names = ("W_enc", "b_enc", "W_dec", "b_dec")
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = (start[name].clone().requires_grad_() for name in names)
        self.optimizer = torch.optim.Adam([self.W_enc, self.b_enc, self.W_dec, self.b_dec])
        self.window, self.l1, self.config, self.step = window, l1, config, 0
        self.since_fired = torch.zeros(len(self.b_enc))

    def update(self, x: Tensor) -> dict[str, float]:
        lr, warmup = self.config.lr or 0, self.config.warmup_steps or 0
        with torch.no_grad():
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc
        z = pre.relu()
        x_hat = z @ self.W_dec + self.b_dec
        norm = x.norm(dim=1, keepdim=True)
        mse = (x_hat - x).square() / norm
        sparsity = self.l1 * z.abs().sum(1).mean()
        dead = self.since_fired > self.window
        ghost = torch.zeros(())
        if dead.any():
            residual = (x - x_hat).detach()
            g = pre[:, dead].exp() @ self.W_dec[dead]
            g = g * (residual.norm(dim=1, keepdim=True) / (1e-6 + 2 * g.norm(dim=1, keepdim=True))).detach()
            error = (g - residual).square() / residual.norm(dim=1, keepdim=True)
            ghost = (error * (mse / (error + 1e-6)).detach()).mean()
        for group in self.optimizer.param_groups:
            group["lr"] = lr * min(1.0, (self.step + 1) / warmup)
        self.optimizer.zero_grad()
        loss = mse.mean() + sparsity + ghost
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            grad = self.W_dec.grad
            assert grad is not None
            grad -= (grad * self.W_dec).sum(1, keepdim=True) * self.W_dec
        self.optimizer.step()
        self.step += 1
        fired = (z > 0).any(0)
        self.since_fired = torch.where(fired, 0.0, self.since_fired + 1)
        error = (x_hat - x).square().sum() / (x - x.mean(0)).square().sum()
        return {
            "loss": float(loss.detach()),
            "reconstruction": float(mse.detach().mean()),
            "sparsity": float(sparsity.detach()),
            "revival": float(ghost.detach()),
            "fvu": float(error.detach()),
            "l0": float((z > 0).sum(1).float().mean()),
            "dead": float((self.since_fired > self.window).float().mean()),
        }


def compare(
    store: ActivationStore, out: Path, *, n_latents: int, window: int, l1: float, config: TrainConfig, log_every: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Run]:
    """Our metrics, those of the dense training, and our run, from the same weights and batches."""
    assert config.precision == "float32"
    sae = SAEConfig("relu", n_latents, l1=l1)
    start = first_weights(store, sae, config)
    run = train(store, out, sae=sae, config=config, log_every=log_every)
    loader = ActivationLoader(
        store, batch_size=config.batch_size, seed=config.seed, pool_tokens=config.pool_tokens,
        n_streams=config.n_streams,
    )  # fmt: skip
    model, lines = PatchSAE(start, window, l1, config), []
    batches = loader.batches()
    for step in range(config.n_steps):
        line = model.update(next(batches).activations.float())
        if (step + 1) % log_every == 0:
            lines.append({"step": step + 1, **line})
    batches.close()
    return run.metrics, lines, run


def first_weights(store: ActivationStore, sae: SAEConfig, config: TrainConfig) -> dict[str, Tensor]:
    """The weights that training begins with, checked against PatchSAE's initialization."""
    from saetrain.data import TrainingData
    from saetrain.training.state import _new_sae

    resolved = sae.resolve(store.layout.d_model)
    data = TrainingData.split(open_stores(store))
    made = _new_sae(data, store.hook_point(None), resolved, config, whole_store=False)  # type: ignore[arg-type]
    made.requires_grad_(False)
    bound = (6 / resolved.n_latents) ** 0.5  # kaiming uniform over the latents
    assert float(made.encoder.abs().max()) <= bound
    assert float(made.encoder.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not made.b_enc.any()
    return {"W_enc": made.encoder.T, "b_enc": made.b_enc, "W_dec": made.decoder, "b_dec": made.b_dec}


@pytest.fixture(scope="module")
def cifar_store(tmp_path_factory: pytest.TempPathFactory, real_data: Path) -> ActivationStore:
    clip = real_data / "clip-cifar"
    return extract(
        real_data / "cifar10" / "train", tmp_path_factory.mktemp("cifar") / "x.acts",
        model=str(clip / "ViT-CIFAR-4.json"), pretrained=str(clip / "vit_cifar4.safetensors"), layers=[4], limit=320,
        precision="float32",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("l1", "lr", "warmup", "window"),
    [(L1, LR, WARMUP, 10), (1e-3, 3e-3, 20, 3)],
    ids=["as published", "with dead latents"],
)
def test_the_curves_are_those_of_a_dense_patchsae(
    tmp_path: Path, cifar_store: ActivationStore, l1: float, lr: float, warmup: int, window: int
) -> None:
    config = TrainConfig(
        n_steps=200, batch_size=1024, lr=lr, warmup_steps=warmup, decay_fraction=0.0, clip_norm=0.0,
        dead_tokens=window * 1024, precision="float32",
    )  # fmt: skip
    ours, theirs, _ = compare(
        cifar_store, tmp_path / "run", n_latents=768, window=window, l1=l1, config=config, log_every=1
    )
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    revived = False
    for mine, other in zip(ours, theirs, strict=True):
        for name in NAMES:  # exp(z) of ghost gradients enlarges what rounding differs in
            assert mine[name] == pytest.approx(other[name], rel=0.05 if revived else 5e-3), (mine["step"], name)
        if not revived or find_kernels("saetrain.model.kernels.entries") is not None:
            assert mine["dead"] == pytest.approx(other["dead"], abs=5 / 768)
        revived |= mine["revival"] > 0
    for end in range(WINDOW, len(ours) + 1):  # a latent that fires on every third step is dead or not by a last bit
        dead = [sum(line["dead"] for line in lines[end - WINDOW : end]) / WINDOW for lines in (ours, theirs)]
        assert dead[0] == pytest.approx(dead[1], abs=5 / 768)
    assert theirs[-1]["fvu"] < 0.5 * theirs[0]["fvu"]
    assert revived == (l1 > L1)


def main() -> None:
    store, out = ActivationStore.open(sys.argv[1]), Path(sys.argv[2])
    config = TrainConfig(
        n_steps=1500, batch_size=2048, lr=LR, warmup_steps=WARMUP, decay_fraction=0.0, clip_norm=0.0,
        dead_tokens=64 * 2048, precision="float32",
    )  # fmt: skip
    ours, theirs, run = compare(store, out, n_latents=3072, window=64, l1=L1, config=config, log_every=50)
    for mine, other in zip(ours, theirs, strict=True):
        print(json.dumps({"ours": {name: mine[name] for name in other}, "dense": other}))
    print(json.dumps(run.quality))


if __name__ == "__main__":
    main()
