"""Training reports its progress each second, however rarely steps are logged."""

import time
from pathlib import Path

import pytest

from saetrain import SAEConfig, TrainConfig, train
from saetrain.training import trainer


def test_progress_comes_between_logged_steps(tmp_path: Path, tiny_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "REPORT_S", 0.0)
    seen: list[tuple[int, float]] = []

    def report(done: int, total: int, metrics: object) -> None:
        assert isinstance(metrics, dict)
        assert metrics["step"] == done
        assert metrics["tokens_per_s"] > 0
        seen.append((done, time.perf_counter()))

    config = TrainConfig(n_steps=30, batch_size=128)
    run = train(tiny_store, tmp_path / "run", layer=2, sae=SAEConfig(n_latents=64, k=4), config=config,
                log_every=1000, on_progress=report)  # fmt: skip
    assert [step for step, _ in seen] == list(range(1, 31))
    assert [line["step"] for line in run.metrics] == [30]  # what is logged is what was asked for
