"""train(): it finds a planted dictionary and repeats from its seed, and a killed run ends like an unbroken one."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from warm_process import WarmProcess

from actcache import ActivationStore, IncompleteError, NonFiniteError, SettingsError, describe, verify
from saetrain import Run, SAEConfig, TrainConfig, sweep, train
from saetrain.data import train_images
from saetrain.run import append_metrics, read_metrics, truncate_metrics
from saetrain.training.dead_latents import init_from_rows, init_thresholds, lower_thresholds, resample

TOPK = SAEConfig(n_latents=96, k=3)
RELU = SAEConfig(variant="relu", n_latents=96, l1=0.002)
SHORT = TrainConfig(n_steps=90, batch_size=256, lr=3e-3, dead_tokens=5000, pool_tokens=2000, resample_every=30)


def test_it_finds_the_planted_dictionary(tmp_path: Path, planted_store: Path, atoms: np.ndarray) -> None:
    config = TrainConfig(n_steps=1200, batch_size=512, lr=3e-3, dead_tokens=20_000, precision="float32")
    run = train(planted_store, tmp_path / "run", sae=TOPK, config=config)
    cosine = atoms @ run.sae().decoder.numpy().T
    assert np.mean(cosine.max(1) > 0.95) > 0.9
    assert run.fvu < 0.05
    assert run.quality["all"]["l0"] <= 3
    assert run.metrics[-1]["step"] == 1200
    assert verify(run.path).ok


def test_relu_learns_and_keeps_unit_rows(tmp_path: Path, planted_store: Path) -> None:
    config = TrainConfig(n_steps=400, batch_size=512, lr=3e-3, precision="float32")
    run = train(planted_store, tmp_path / "run", sae=RELU, config=config)
    assert run.fvu < 0.3
    torch.testing.assert_close(run.sae().decoder.norm(dim=1), torch.ones(96))
    assert run.metrics[-1]["loss"] < run.metrics[0]["loss"]


EVERY = {
    "topk": TOPK,
    "batchtopk": SAEConfig("batchtopk", 96, 3),
    "nested": SAEConfig("topk", 96, 3, prefixes=(1 / 8, 1 / 2, 1)),
    "relu": RELU,
    "relu steered": SAEConfig("relu", 96, target_l0=5, normalize="center"),
    "jumprelu": SAEConfig("jumprelu", 96, 3),
    "jumprelu tanh": SAEConfig("jumprelu", 96, 3, penalty="tanh"),
    "gated": SAEConfig("gated", 96, 3),
}


@pytest.mark.parametrize("sae", EVERY.values(), ids=EVERY)
def test_interrupted_and_repeated_it_gives_the_same_bytes(tmp_path: Path, planted_store: Path, sae: SAEConfig) -> None:
    def stop(step: int, total: int, metrics: dict[str, Any]) -> None:
        if step == 50:
            raise KeyboardInterrupt

    wanted: dict[str, Any] = {"sae": sae, "config": SHORT, "log_every": 10, "checkpoint_every": 20}
    whole = train(planted_store, tmp_path / "whole", **wanted)
    with pytest.raises(KeyboardInterrupt):
        train(planted_store, tmp_path / "run", **wanted, on_progress=stop)
    with pytest.raises(IncompleteError, match="40 of 90 steps"):
        Run.open(tmp_path / "run")
    assert describe(tmp_path / "run")["complete"] is False
    seen: list[int] = []
    resumed = train(planted_store, tmp_path / "run", **wanted, on_progress=lambda step, n, m: seen.append(step))
    assert seen[0] == 50
    assert (resumed.path / "sae.safetensors").read_bytes() == (whole.path / "sae.safetensors").read_bytes()
    assert [line["step"] for line in resumed.metrics] == [10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert [line["loss"] for line in resumed.metrics] == [line["loss"] for line in whole.metrics]
    assert resumed.quality == whole.quality
    assert resumed.run_id == whole.run_id


KILLED = """
import os, signal, sys
from saetrain import SAEConfig, TrainConfig, train
config = TrainConfig(n_steps=90, batch_size=256, lr=3e-3, dead_tokens=5000, pool_tokens=2000, resample_every=30)
def stop(step, total, metrics):
    if step == 70:
        os.kill(os.getpid(), signal.SIGKILL)
train(sys.argv[1], sys.argv[2], sae=SAEConfig(n_latents=96, k=3), config=config, log_every=10, checkpoint_every=20,
      on_progress=stop)
"""


def test_killed_and_repeated_it_gives_the_same_bytes(tmp_path: Path, planted_store: Path, warm: WarmProcess) -> None:
    killed = warm.run("-c", KILLED, planted_store, tmp_path / "run", cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    wanted: dict[str, Any] = {"sae": TOPK, "config": SHORT, "log_every": 10, "checkpoint_every": 20}
    resumed = train(planted_store, tmp_path / "run", **wanted)
    whole = train(planted_store, tmp_path / "whole", **wanted)
    assert (resumed.path / "sae.safetensors").read_bytes() == (whole.path / "sae.safetensors").read_bytes()
    assert not (resumed.path / "checkpoints").exists()


def test_a_finished_run_is_returned_and_other_settings_are_refused(tmp_path: Path, planted_store: Path) -> None:
    run = train(planted_store, tmp_path / "run", sae=TOPK, config=SHORT)
    before = {file: file.stat().st_mtime_ns for file in run.path.rglob("*")}
    assert train(planted_store, tmp_path / "run", sae=TOPK, config=SHORT, log_every=7).run_id == run.run_id
    other = TrainConfig(n_steps=90, batch_size=256, lr=3e-3, dead_tokens=5000, pool_tokens=2000, resample_every=30,
                        seed=1)  # fmt: skip
    with pytest.raises(SettingsError, match=r"train\.seed: 0 there, 1 asked for"):
        train(planted_store, tmp_path / "run", sae=TOPK, config=other)
    assert {file: file.stat().st_mtime_ns for file in run.path.rglob("*")} == before


@pytest.mark.parametrize("damage", ["cut", "flipped", "no record", "record cut"])
def test_a_torn_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, planted_store: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    def stop(step: int, total: int, metrics: dict[str, Any]) -> None:
        if step == 50:
            raise KeyboardInterrupt

    wanted: dict[str, Any] = {"sae": TOPK, "config": SHORT, "log_every": 10, "checkpoint_every": 20}
    with pytest.raises(KeyboardInterrupt):
        train(planted_store, tmp_path / "run", **wanted, on_progress=stop)
    last = tmp_path / "run" / "checkpoints" / "step-00000040.safetensors"
    data, record = last.read_bytes(), last.with_suffix(".json")
    if damage == "no record":
        record.unlink()
    elif damage == "record cut":
        record.write_text(record.read_text()[:-5])
    else:
        last.write_bytes(data[:-100] if damage == "cut" else data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])
    seen: list[int] = []
    run = train(planted_store, tmp_path / "run", **wanted, on_progress=lambda step, n, m: seen.append(step))
    assert seen[0] == 30  # from step 20 on
    assert ("is damaged" in caplog.text) == (damage != "no record")
    whole = train(planted_store, tmp_path / "whole", **wanted)
    assert (run.path / "sae.safetensors").read_bytes() == (whole.path / "sae.safetensors").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_of_the_step_under_way(tmp_path: Path, planted_store: Path, number: int) -> None:
    import os

    def stop(step: int, total: int, metrics: dict[str, Any]) -> None:
        if step == 50:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    wanted: dict[str, Any] = {"sae": TOPK, "config": SHORT, "log_every": 10}
    with pytest.raises(KeyboardInterrupt):
        train(planted_store, tmp_path / "run", **wanted, on_progress=stop)
    assert signal.getsignal(number) == before
    with pytest.raises(IncompleteError, match=r"5[01] of 90 steps"):
        Run.open(tmp_path / "run")
    run, whole = (train(planted_store, tmp_path / name, **wanted) for name in ("run", "whole"))
    assert (run.path / "sae.safetensors").read_bytes() == (whole.path / "sae.safetensors").read_bytes()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(
    tmp_path: Path, planted_store: Path
) -> None:
    config = TrainConfig(n_steps=200, batch_size=256, lr=1e30, clip_norm=0, warmup_steps=1)
    with pytest.raises(NonFiniteError, match=r"at batch \d+.*lower --lr"):
        train(planted_store, tmp_path / "run", sae=RELU, config=config)
    assert list((tmp_path / "run" / "checkpoints").glob("step-*.json"))


# ---------------------------------------------------------------------------------------------------------------------
# What it starts from, which images, how many latents are active


def test_where_chooses_images_to_train_on_and_to_judge_by(tmp_path: Path, planted_store: Path) -> None:
    store = ActivationStore.open(planted_store)
    config = TrainConfig(n_steps=5, batch_size=64, where="source_index % 2 == 0")
    with pytest.raises(SettingsError, match="cannot contain"):
        train(store, tmp_path / "run", sae=TOPK, config=config)
    with pytest.raises(SettingsError, match=r"'bytes < 100' holds for .* but for none of those that are held out"):
        train(store, tmp_path / "run", sae=TOPK, config=replace(config, where="bytes < 100"))
    assert not (tmp_path / "run").exists()
    run = train(store, tmp_path / "run", sae=TOPK, config=replace(config, where="bytes >= 200"))
    whole = train(store, tmp_path / "all", sae=TOPK, config=replace(config, where=None))
    assert run.run_id != whole.run_id
    assert run.quality["n_tokens"] == whole.quality["n_tokens"]  # held-out images come last


def test_data_as_initial_dictionary_is_the_rows_directions(planted_store: Path, random_sae: Any) -> None:
    sae, rows = random_sae(SAEConfig(n_latents=40, k=3), d_model=32), torch.randn(30, 32)
    init_from_rows(sae, rows, seed=0)
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(40))
    assert torch.equal(sae.encoder, sae.decoder)
    cosine = torch.cosine_similarity(sae.decoder[:30], rows - sae.b_dec)
    assert cosine.min() > 0.9
    torch.testing.assert_close(sae.decoder[30:].mm(rows[:10].T - sae.b_dec[:, None]).diag().sign(), torch.ones(10))


@pytest.mark.parametrize("variant", ["jumprelu", "gated"])
def test_thresholds_start_where_the_target_is_met(random_sae: Any, variant: str) -> None:
    sae = random_sae(SAEConfig(variant, 400, target_l0=9), d_model=32)
    rows = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    init_thresholds(sae, rows)
    z = (rows - sae.b_dec) @ sae.encoder.T + sae.b_enc
    l0 = (z > (sae.threshold if variant == "jumprelu" else 0)).sum(1).float().mean()
    assert float(l0) == pytest.approx(9, abs=0.1)


def test_dead_latents_are_replaced_by_what_is_badly_reconstructed(random_sae: Any) -> None:
    sae = random_sae(SAEConfig(n_latents=40, k=3), d_model=32)
    rows, dead = torch.randn(100, 32, generator=torch.Generator().manual_seed(0)), torch.arange(40) >= 35
    before = sae.decoder.clone()
    code = sae.encode(sae.denormalize(rows))
    residual = rows - sae.normalize(sae.decode(*code, len(rows)))
    index = resample(sae, rows, dead, seed=0, step=10)
    assert index.tolist() == [35, 36, 37, 38, 39]
    assert torch.equal(sae.decoder[:35], before[:35])
    cosine = torch.nn.functional.normalize(residual) @ sae.decoder[35:].T
    assert cosine.max(0).values.min() > 0.999
    assert not sae.b_enc[35:].any()
    norms = sae.encoder.norm(dim=1)
    torch.testing.assert_close(norms[35:], 0.2 * norms[:35].mean().expand(5))


def test_dead_latents_of_jumprelu_and_gated_fire_more_easily(random_sae: Any) -> None:
    dead = torch.arange(40) >= 35
    for variant, name, sign in (("jumprelu", "threshold", -1), ("gated", "b_enc", 1)):
        sae = random_sae(SAEConfig(variant, 40, 3), d_model=32)
        before = getattr(sae, name).detach().clone()
        lower_thresholds(sae, dead)
        change = getattr(sae, name).detach() - before
        assert not change[~dead].any()
        torch.testing.assert_close(change[dead], torch.full((5,), sign * 0.005))
        for _ in range(100):
            lower_thresholds(sae, dead)
        if variant == "jumprelu":
            assert sae.threshold.min() == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["relu steered", "jumprelu", "jumprelu tanh", "gated"])
def test_l0_comes_near_its_target(tmp_path: Path, planted_store: Path, name: str) -> None:
    config = TrainConfig(n_steps=1500, batch_size=512, lr=3e-3, dead_tokens=20_000, precision="float32")
    run = train(planted_store, tmp_path / "run", sae=EVERY[name], config=config)
    target = run.sae_config.target_l0
    assert run.quality["all"]["l0"] == pytest.approx(target, rel=0.15)
    assert run.fvu < 0.3


def test_metrics_are_readable_lines(tmp_path: Path, planted_store: Path) -> None:
    run = train(planted_store, tmp_path / "run", sae=TOPK, config=SHORT)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [50, 90]
    assert set(lines[0]) >= {"loss", "fvu", "l0", "dead", "lr", "tokens_per_s", "seconds"}
    assert set(lines[0]["seconds"]) >= {"wait", "encode", "select", "decode", "backward", "optimizer"}


def test_a_finished_run_has_one_line_a_step_whoever_else_wrote_some(tmp_path: Path) -> None:
    for step in (2, 2, 4, 1, 4, 6):
        append_metrics(tmp_path, {"step": step, "loss": 1.0})
    truncate_metrics(tmp_path, 4)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 4]


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path: Path, planted_store: Path) -> None:
    refused: list[str] = []

    def train_it_twice(*_: object) -> None:
        with pytest.raises(
            SettingsError, match=f"being written by process {os.getpid()} on .*, which started at "
        ) as error:
            train(planted_store, tmp_path / "run", sae=TOPK, config=SHORT)
        refused.append(str(error.value))

    run = train(planted_store, tmp_path / "run", sae=TOPK, config=SHORT, on_progress=train_it_twice)
    assert len(refused) == 2
    assert str(run.path) in refused[0]
    assert train(planted_store, tmp_path / "run", sae=TOPK, config=SHORT).run_id == run.run_id


def test_steps_that_read_a_small_store_very_often_are_warned_of(
    tiny_store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A line, with a number of steps that is not too large; and none when the run goes on or is there."""
    sae, config = SAEConfig("topk", 16, 2), TrainConfig(n_steps=300, batch_size=512, precision="float32")
    n_tokens = len(train_images(75)) * 10
    advised = 200 * n_tokens // 512
    train(tiny_store, tmp_path / "often", layer=2, sae=sae, config=config)
    (message,) = caplog.messages
    assert f"{n_tokens:,} training tokens {300 * 512 / n_tokens:,.0f} times" in message
    assert f"--n-steps {advised} reads them 200 times" in message
    caplog.clear()
    train(tiny_store, tmp_path / "often", layer=2, sae=sae, config=config)
    train(tiny_store, tmp_path / "seldom", layer=2, sae=sae, config=replace(config, n_steps=advised))
    assert caplog.messages == []


def test_several_streams_are_warned_of_once(tiny_store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By the one that reads its tokens most often, and not again when there are more steps to go."""
    sae, config = SAEConfig("topk", 16, 2), TrainConfig(n_steps=300, batch_size=64, precision="float32")
    members = [(2, sae, config), (2, sae, replace(config, seed=1)), (2, sae, replace(config, tokens="cls"))]
    n_images = len(train_images(75))
    sweep(tiny_store, tmp_path / "runs", members)
    (message,) = caplog.messages
    assert message.startswith(f"300 steps read each of the {n_images} training tokens {300 * 64 / n_images:,.0f} times")
    caplog.clear()
    sweep(tiny_store, tmp_path / "runs", members)
    assert caplog.messages == []
