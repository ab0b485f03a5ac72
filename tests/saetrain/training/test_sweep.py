"""sweep(): several SAEs on one stream, each of which becomes the run that train() alone would make."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actcache import IncompleteError, NonFiniteError, SettingsError
from saetrain import ActivationLoader, Run, SAEConfig, TrainConfig, sweep, train
from saetrain.training.trainer import name_runs

CONFIG = TrainConfig(n_steps=40, batch_size=256, lr=3e-3, dead_tokens=3000, pool_tokens=2000)
SHORT = TrainConfig(n_steps=25, batch_size=256, lr=1e-3, dead_tokens=3000, pool_tokens=2000)
OTHER_SEED = TrainConfig(n_steps=40, batch_size=256, lr=3e-3, dead_tokens=3000, pool_tokens=2000, seed=1)
MEMBERS: list[Any] = [
    (0, SAEConfig("topk", 96, 3), CONFIG),
    (1, SAEConfig("topk", 96, 3), CONFIG),
    (1, SAEConfig("jumprelu", 64, 5), SHORT),
    (0, SAEConfig("relu", 48, l1=0.002), CONFIG),
    (0, SAEConfig("topk", 96, 3), OTHER_SEED),
]


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory, make_store: Callable[..., Path]) -> Path:
    return make_store(tmp_path_factory.mktemp("layers") / "x.acts", layers=(0, 1))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, two_layers: Path) -> list[Run]:
    folder = tmp_path_factory.mktemp("alone")
    return [
        train(two_layers, folder / str(i), layer=layer, sae=sae, config=config)
        for i, (layer, sae, config) in enumerate(MEMBERS)
    ]


def same(one: Run, other: Run) -> bool:
    files = [(run.path / "sae.safetensors").read_bytes() for run in (one, other)]
    return files[0] == files[1] and one.run_id == other.run_id and one.quality == other.quality


def test_every_member_is_the_run_that_it_would_be_alone(tmp_path: Path, two_layers: Path, alone: list[Run]) -> None:
    runs = sweep(two_layers, tmp_path / "runs", MEMBERS)
    assert all(same(one, other) for one, other in zip(runs, alone, strict=True))
    assert len({run.path for run in runs}) == 5
    again = sweep(two_layers, tmp_path / "runs", MEMBERS)
    assert [run.path for run in again] == [run.path for run in runs]


def test_what_was_interrupted_or_is_new_joins_at_its_own_step(
    tmp_path: Path, two_layers: Path, alone: list[Run]
) -> None:
    names = name_runs(MEMBERS)

    def stop(done: int, total: int, metrics: dict[str, Any]) -> None:
        if done >= 30:
            raise KeyboardInterrupt

    for i in (0, 3):  # two members get to step 30 of 40, and have a checkpoint of 20
        layer, sae, config = MEMBERS[i]
        with pytest.raises(KeyboardInterrupt):
            train(
                two_layers, tmp_path / "runs" / names[i], layer=layer, sae=sae, config=config, log_every=10,
                checkpoint_every=10, on_progress=stop,
            )  # fmt: skip
    runs = sweep(two_layers, tmp_path / "runs", MEMBERS)
    assert all(same(one, other) for one, other in zip(runs, alone, strict=True))


def test_one_stream_is_read_once(tmp_path: Path, two_layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = ActivationLoader.batches

    def batches(self: ActivationLoader, step: int = 0) -> Any:
        made.append(len(self.hook_points))
        return real(self, step)

    monkeypatch.setattr(ActivationLoader, "batches", batches)
    sweep(two_layers, tmp_path / "runs", MEMBERS)
    assert made == [2, 1]  # both layers of the first seed together, then the other seed


def test_progress_counts_all_steps(tmp_path: Path, two_layers: Path) -> None:
    seen: list[tuple[int, int]] = []
    sweep(two_layers, tmp_path / "runs", MEMBERS, log_every=5, on_progress=lambda n, of, line: seen.append((n, of)))
    assert {total for _, total in seen} == {185}
    assert seen[-1] == (185, 185)
    assert [n for n, _ in seen] == sorted(n for n, _ in seen)


def test_one_that_diverges_does_not_stop_the_others(tmp_path: Path, two_layers: Path, alone: list[Run]) -> None:
    broken = TrainConfig(n_steps=40, batch_size=256, lr=1e30, clip_norm=0, warmup_steps=1, pool_tokens=2000)
    members = [*MEMBERS[:2], (0, SAEConfig("relu", 48), broken)]
    for _ in range(2):  # the second time what is finished is left alone
        with pytest.raises(NonFiniteError, match=r"1 of 3 SAEs diverged; the others are finished\. The loss is"):
            sweep(two_layers, tmp_path / "runs", members)
    for name, other in zip(name_runs(members)[:2], alone, strict=False):
        assert same(Run.open(tmp_path / "runs" / name), other)


def test_a_member_is_sealed_as_soon_as_it_is_done(tmp_path: Path, two_layers: Path) -> None:
    def stop(done: int, total: int, metrics: dict[str, Any]) -> None:
        if metrics["step"] == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(two_layers, tmp_path / "runs", MEMBERS[1:3], log_every=10, on_progress=stop)
    names = name_runs(MEMBERS[1:3])
    assert Run.open(tmp_path / "runs" / names[1]).metrics[-1]["step"] == 25
    with pytest.raises(IncompleteError):
        Run.open(tmp_path / "runs" / names[0])
    seen: list[tuple[int, int]] = []
    sweep(two_layers, tmp_path / "runs", MEMBERS[1:3], on_progress=lambda n, of, line: seen.append((n, of)))
    assert seen[-1] == (65, 65)


def test_names_say_what_differs() -> None:
    topk = SAEConfig("topk", 96, 3)
    assert name_runs([(0, topk, CONFIG), (5, topk, CONFIG)]) == ["layer0", "layer5"]
    assert name_runs([(0, topk, CONFIG), (0, SAEConfig("topk", 96, 4), OTHER_SEED)]) == ["k3-seed0", "k4-seed1"]
    assert name_runs([(None, topk, CONFIG)]) == ["run"]
    with pytest.raises(SettingsError, match="have the same settings"):
        name_runs([(0, topk, CONFIG), (0, topk, CONFIG), (1, topk, CONFIG)])
