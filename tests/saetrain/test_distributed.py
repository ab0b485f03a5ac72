"""Two real processes under torchrun train like one process: the same batches and the same losses."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from actcache import SettingsError
from saetrain import Run, SAEConfig, train

pytestmark = pytest.mark.slow

SCRIPT = """
import sys
from pathlib import Path
import torch
from saetrain import SAEConfig, TrainConfig, train
from saetrain.distributed import all_gather, world_size
from saetrain.training.state import Training

store, out = sys.argv[1], Path(sys.argv[2])
common = dict(n_steps=20, batch_size=256, lr=1e-3, pool_tokens=2000, precision="float32", dead_tokens=600)
for name, sae in {
    "topk": SAEConfig("topk", 96, 3),
    "nested": SAEConfig("batchtopk", 96, 3, prefixes=(0.25, 1)),
    "batchtopk": SAEConfig("batchtopk", 96, 3),
    "relu": SAEConfig("relu", 96, l1=0.002),
    "steered": SAEConfig("relu", 96, target_l0=5, normalize="center"),
    "jumprelu": SAEConfig("jumprelu", 96, 3),
    "gated": SAEConfig("gated", 96, 3),
}.items():
    train(store, out / name, sae=sae, config=TrainConfig(**common), log_every=1)

finish = Training.finish

def compare(self):
    weights = [all_gather(parameter.detach().flatten()) for parameter in self.sae.parameters()]
    assert all(torch.equal(part[0], other) for part in weights for other in part[1:])
    assert len(weights[0]) == world_size()
    print("compared")
    finish(self)

Training.finish = compare
config = TrainConfig(**{**common, "dead_tokens": 1}, resample_every=5)
train(store, out / "resampled", sae=SAEConfig("topk", 96, 3), config=config)
"""
NAMES = ("topk", "nested", "batchtopk", "relu", "steered", "jumprelu", "gated")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, planted_store: Path) -> tuple[Path, Path]:
    """The runs of one process, and those of two."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "script.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for n, start, out in ((1, [sys.executable], "one"), (2, launch, "two")):
        done = subprocess.run(
            [*start, str(folder / "script.py"), str(planted_store), str(folder / out)],
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("compared") == n  # all processes hold the same weights after a resampling
    return folder / "one", folder / "two"


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_give_the_losses_of_one(runs: tuple[Path, Path], name: str) -> None:
    one, two = (Run.open(folder / name) for folder in runs)
    assert one.run_id == two.run_id
    assert [line["step"] for line in two.metrics] == list(range(1, 21))
    for field in ("loss", "reconstruction", "sparsity", "revival", "fvu", "l0"):
        a, b = (np.array([line[field] for line in run.metrics]) for run in (one, two))
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4)
    assert len({line["loss"] for line in one.metrics}) == 20
    assert any(line["revival"] for line in one.metrics) or name not in ("nested", "batchtopk")
    torch.testing.assert_close(one.sae().decoder, two.sae().decoder, rtol=1e-2, atol=1e-3)
    assert one.fvu == pytest.approx(two.fvu, rel=1e-3)


def test_processes_that_cannot_meet_are_refused(
    tmp_path: Path, planted_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("SLURM_PROCID", "1"), ("SLURM_STEP_NUM_TASKS", "2")):
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SettingsError, match="one of 2 processes, which meet at MASTER_ADDR"):
        train(planted_store, tmp_path / "run", sae=SAEConfig("topk", 96, 3))
    assert not (tmp_path / "run").exists()
