"""The learning rate of every step: it warms up, stays, and decays to almost 0."""

import pytest

from saetrain import SAEConfig, TrainConfig
from saetrain.training.schedule import learning_rate


def test_the_rate_warms_up_stays_and_decays() -> None:
    config = TrainConfig(n_steps=1000).resolve(SAEConfig(n_latents=2**14).resolve(8), "float32")
    rates = [learning_rate(config, step) for step in range(1000)]
    assert max(rates) == 2e-4
    assert rates[0] == pytest.approx(2e-6)
    assert rates[100:800] == [2e-4] * 700
    assert rates[900] == pytest.approx(1e-4)
    assert 0 < rates[-1] < 2e-6


def test_without_decay_the_rate_stays_to_the_end() -> None:
    config = TrainConfig(n_steps=10, warmup_steps=0, decay_fraction=0, lr=0.5)
    resolved = config.resolve(SAEConfig(n_latents=8, k=2).resolve(8), "float32")
    assert [learning_rate(resolved, step) for step in range(10)] == [0.5] * 10
