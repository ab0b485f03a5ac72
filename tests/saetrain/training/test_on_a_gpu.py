"""Training on a pretend GPU: the numbers of the CPU, no tensor of the CPU among those of the device, and a known number
of times at which the host waits for the device.

A step may wait to know these, and nothing else: whether the loss is finite; whether a latent is dead, and which; which
entries are active (once a block of rows); of batchtopk also the old threshold, which entries it keeps and the smallest
of them; and the l0, where the weight of the penalty is steered by it. A forgotten `.to(device)`, an `.item()` in the
loop or an operation that only a CPU has fails here: `test_pretend_device.py` shows that each of them is seen.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import pytest
import torch
from pretend_device import Event, PretendDevice, tell
from torch import Tensor

from actcache.compiler import find_kernels
from saetrain import SAE, Run, SAEConfig, TrainConfig, train
from saetrain.config import ResolvedTrainConfig
from saetrain.model import gradient
from saetrain.training import objective
from saetrain.training.dead_latents import lower_thresholds, resample
from saetrain.training.objective import Loss, add_gradients
from saetrain.training.optimizer import Adam, apply_update, reset_latents
from saetrain.training.state import Laps, Training

MakeSAE = Callable[..., SAE]
F, K, D = 40, 4, 12
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
REVIVALS = {"aux": TrainConfig(aux=1 / 32, ghost=False), "ghost": TrainConfig(aux=0.0, ghost=True)}
CASES = [*((name, "aux") for name in VARIANTS), ("relu", "ghost"), ("relu centered", "ghost")]
ONE_EACH = ["topk nested", "batchtopk", "relu", "jumprelu quadratic", "gated"]
SOME_DEAD = torch.arange(F) % 3 == 0


@pytest.fixture(autouse=True)
def operations_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU computes with torch's operations, too: ghost gradients multiply the last bits of a residual by 1000."""
    monkeypatch.setenv("PATCHSAE_COMPILER", "off")
    find_kernels.cache_clear()
    yield
    find_kernels.cache_clear()


@pytest.fixture(params=["sparse", "dense"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Force one of the two ways of computing, on each device."""
    share = 1.0 if request.param == "sparse" else -1.0
    monkeypatch.setattr(objective, "DENSE_SHARE", {"float32": share, "bfloat16": share})
    monkeypatch.setattr(objective, "DENSE_SHARE_CUDA", share)
    monkeypatch.setattr(objective, "DENSE_ROWS", 100)  # several blocks
    return str(request.param)


def rows(n: int = 200, seed: int = 3) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def make(random_sae: MakeSAE, name: str) -> SAE:
    sae = random_sae(VARIANTS[name], d_model=D)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        if sae.config.variant == "jumprelu":
            sae.threshold.uniform_(0.5, 2.0, generator=generator)
        if sae.config.variant == "gated":
            sae.b_enc.sub_(0.8)
            sae.log_scale.normal_(0, 0.3, generator=generator)
            sae.b_mag.normal_(0.5, 0.3, generator=generator)
    return sae


def settings(name: str, revival: str = "aux", precision: str = "float32") -> ResolvedTrainConfig:
    return REVIVALS[revival].resolve(VARIANTS[name].resolve(D), precision)


Numbers = dict[str, Tensor]


def take_steps(sae: SAE, config: ResolvedTrainConfig, device: str, n_steps: int = 2) -> list[Numbers]:
    """Losses, gradients and weights of some steps, some latents being dead; then dead latents are replaced."""
    sae.to(device)
    optimizer, made, dead = Adam(sae), list[Numbers](), SOME_DEAD.to(device)

    def keep(loss: Loss | None) -> None:
        numbers = {} if loss is None else {name: value.cpu() for name, value in loss._asdict().items()}
        numbers |= {f"gradient of {name}": gradient(p).cpu().clone() for name, p in sae.named_parameters()}
        made.append(numbers)

    for number in range(n_steps):
        keep(add_gradients(sae, rows(seed=number).to(device), dead, config))
        apply_update(sae, optimizer, learning_rate=1e-3, clip_norm=0.1)
        lower_thresholds(sae, dead)
        made[-1] |= {name: value.detach().cpu().clone() for name, value in sae.state_dict().items()}
    reset_latents(sae, optimizer, resample(sae, rows().to(device), dead, seed=0, step=n_steps))
    keep(None)
    made[-1] |= {name: value.detach().cpu().clone() for name, value in sae.state_dict().items()}
    for name, parameter in sae.named_parameters():
        made[-1] |= {f"{key} of {name}": optimizer.state[parameter][key].cpu() for key in ("exp_avg", "exp_avg_sq")}
    return made


def compare(found: list[Numbers], expected: list[Numbers], *, rtol: float, atol: float) -> None:
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            ours_there = ours[name].to(value.dtype)  # a loss is float64 where the device has it
            torch.testing.assert_close(
                ours_there, value, rtol=rtol, atol=atol, msg=lambda m, n=name, s=step: f"step {s}, {n}: {m}"
            )


@pytest.mark.parametrize(("name", "revival"), CASES)
def test_steps_on_a_gpu_compute_what_the_cpu_computes(random_sae: MakeSAE, path: str, name: str, revival: str) -> None:
    expected = take_steps(make(random_sae, name), settings(name, revival), "cpu")
    with PretendDevice() as gpu:
        found = take_steps(make(random_sae, name), settings(name, revival), "cuda")
    compare(found, expected, rtol=1e-5, atol=1e-6)
    assert (gpu.kernels["sparse_sampled_addmm"] > 0) == (path == "sparse")


@pytest.mark.parametrize("name", ONE_EACH)
def test_steps_on_mps_compute_what_the_cpu_computes(random_sae: MakeSAE, name: str) -> None:
    """Without float64 and without sparse matrices. The sums are float32."""
    expected = take_steps(make(random_sae, name), settings(name), "cpu")
    with PretendDevice("mps"):
        found = take_steps(make(random_sae, name), settings(name), "mps")
    compare(found, expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_step_in_bfloat16_is_near_the_one_in_float32(random_sae: MakeSAE, name: str) -> None:
    """No product of a bfloat16 with a float32 tensor is left; the values are rounded to 8 bits."""
    losses = []
    for kind, precision in (("cuda", "float32"), ("cuda", "bfloat16"), ("mps", "bfloat16")):
        with PretendDevice(kind):
            sae, dead = make(random_sae, name).to(kind), SOME_DEAD.to(kind)
            losses.append(add_gradients(sae, rows().to(kind), dead, settings(name, precision=precision)))
            assert all(gradient(p).dtype == torch.float32 for p in sae.parameters())
    reference, *rounded = [(float(loss.reconstruction), float(loss.n_active)) for loss in losses]
    for found in rounded:
        assert found == pytest.approx(reference, rel=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# How often the host waits


MAY_WAIT = {
    "topk": 1,
    "topk nested": 1,
    "batchtopk": 4,
    "batchtopk nested": 4,
    "relu": 1,
    "relu centered": 1,
    "jumprelu quadratic": 1,
    "jumprelu tanh": 1,
    "gated": 1,
}
"""To select the active entries of one block of rows, as the module describes."""
DENSE_TOPK = 1
"""For the places of the blocks of rows, where a selection is applied to dense values."""
IS_ONE_DEAD, WHICH_ARE_DEAD, DEAD_ACTIVE = 1, 1, 1
"""The last for AuxK by sparse products."""
IS_FINITE, STEERS = 1, 1


@pytest.mark.parametrize(("name", "revival"), CASES)
def test_a_step_waits_for_the_gpu_only_as_often_as_it_must(
    random_sae: MakeSAE, path: str, name: str, revival: str
) -> None:
    """The first step has no dead latents; in the second one some are."""
    steps = []
    with PretendDevice() as gpu:
        sae, x = make(random_sae, name).to("cuda"), rows().to("cuda")
        optimizer = Adam(sae)
        if name.startswith("batchtopk"):
            sae.threshold.fill_(0.5)  # it would guess its first threshold
        for dead in (torch.zeros(F, dtype=torch.bool, device="cuda"), SOME_DEAD.to("cuda")):
            with gpu.watch() as waits:
                add_gradients(sae, x, dead, settings(name, revival))
                apply_update(sae, optimizer, learning_rate=1e-3, clip_norm=0.1)
                lower_thresholds(sae, dead)
            steps.append(waits)
    allowed = MAY_WAIT[name] + IS_ONE_DEAD + (DENSE_TOPK if path == "dense" and "topk" in name else 0)
    revived = WHICH_ARE_DEAD + (DEAD_ACTIVE if path == "sparse" and revival == "aux" else 0)
    assert len(steps[0]) <= allowed, tell(steps[0])
    assert len(steps[1]) <= allowed + revived, tell(steps[1])


# ---------------------------------------------------------------------------------------------------------------------
# The whole training


TRAIN = TrainConfig(n_steps=6, batch_size=300, lr=2e-3, pool_tokens=1500, precision="float32")


@contextmanager
def watched(gpu: PretendDevice) -> Iterator[tuple[list[list[Event]], list[list[Event]]]]:
    """The waits within each step, and those between one step and the next."""
    within, between = list[list[Event]](), list[list[Event]]()
    update, ended = Training.update, [0]

    def watch(training: Training, x: Tensor, laps: Laps) -> Loss:
        if within:
            between.append(gpu.waits[ended[0] :])
        with gpu.watch() as waits:
            loss = update(training, x, laps)
        within.append(waits)
        ended[0] = len(gpu.waits)
        return loss

    with mock.patch.object(Training, "update", watch):
        yield within, between


@pytest.mark.parametrize("name", ["topk nested", "batchtopk", "gated"])
def test_a_training_waits_in_its_steps_and_never_between_them(tmp_path: Path, planted_store: Path, name: str) -> None:
    """Batches arrive in passing."""
    with PretendDevice() as gpu, watched(gpu) as (within, between):
        train(planted_store, tmp_path / "run", sae=VARIANTS[name], config=TRAIN, device="cuda", log_every=100)
    allowed = MAY_WAIT[name] + IS_ONE_DEAD + IS_FINITE + (STEERS if name == "gated" else DENSE_TOPK)
    assert len(within) == TRAIN.n_steps
    for waits in within[1:]:
        assert len(waits) <= allowed, tell(waits)
    for waits in between:
        assert not waits, tell(waits)
    assert any(event.kind == "to device, in passing" for event in gpu.events)


@pytest.mark.parametrize(
    ("name", "kind"), [("batchtopk nested", "cuda"), ("gated", "cuda"), ("topk", "mps"), ("jumprelu tanh", "mps")]
)
def test_a_training_on_a_device_ends_where_that_of_the_cpu_ends(
    tmp_path: Path, planted_store: Path, name: str, kind: str
) -> None:
    config = TrainConfig(
        n_steps=8, batch_size=300, lr=2e-3, pool_tokens=1500, precision="float32", resample_every=5, dead_tokens=400,
        init="data", clip_norm=0.5,
    )  # fmt: skip
    expected = train(planted_store, tmp_path / "cpu", sae=VARIANTS[name], config=config, device="cpu")
    with PretendDevice(kind):
        found = train(planted_store, tmp_path / kind, sae=VARIANTS[name], config=config, device=kind)
    assert found.fvu == pytest.approx(expected.fvu, rel=1e-4)
    weights = expected.sae().state_dict()
    for key, value in found.sae().state_dict().items():
        torch.testing.assert_close(value, weights[key], rtol=1e-3, atol=1e-5)


def test_an_interrupted_training_on_a_gpu_goes_on_bit_for_bit(tmp_path: Path, planted_store: Path) -> None:
    def run(path: Path, stop_at: int | None) -> Run:
        def stop(done: int, total: int, line: object) -> None:
            if done == stop_at:
                raise KeyboardInterrupt

        return train(
            planted_store, path, sae=VARIANTS["batchtopk"], config=TRAIN, device="cuda", log_every=1, on_progress=stop
        )

    with PretendDevice():
        whole = run(tmp_path / "whole", None)
        with suppress(KeyboardInterrupt):
            run(tmp_path / "stopped", 3)
        resumed = run(tmp_path / "stopped", None)
    weights = whole.sae().state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in resumed.sae().state_dict().items())


@pytest.mark.parametrize("planted", ["a forgotten move", "an item", "only on a CPU"])
def test_a_fault_in_a_step_is_seen(
    tmp_path: Path, planted_store: Path, planted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What these tests are for, put into the loss."""
    honest = objective.add_gradients

    def faulty(sae: SAE, x: Tensor, dead: Tensor, config: ResolvedTrainConfig, **options: object) -> Loss:
        if planted == "a forgotten move":
            x = x * torch.ones(x.shape[1])
        elif planted == "an item":
            assert x.mean().item() < 1e9
        else:
            x.numpy()
        return honest(sae, x, dead, config, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("saetrain.training.state.add_gradients", faulty)
    with PretendDevice() as gpu, watched(gpu) as (within, _):
        run = tmp_path / "run"
        if planted == "an item":
            train(planted_store, run, sae=VARIANTS["topk"], config=TRAIN, device="cuda", log_every=100)
            n_faulty = list(map(len, within))
            within.clear()
            monkeypatch.setattr("saetrain.training.state.add_gradients", honest)
            train(planted_store, tmp_path / "honest", sae=VARIANTS["topk"], config=TRAIN, device="cuda", log_every=100)
            assert n_faulty == [len(waits) + 1 for waits in within]
        else:
            with pytest.raises((RuntimeError, TypeError), match=r"two devices|to numpy"):
                train(planted_store, run, sae=VARIANTS["topk"], config=TRAIN, device="cuda")
