"""A run that is taken away from the process that trains it: one line, and the same command trains it."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from actcache import PipelineError, verify
from saetrain import Run, SAEConfig, TrainConfig, train

ROOT = Path(__file__).parents[3]
TOPK = SAEConfig(n_latents=96, k=3)
SHORT = TrainConfig(n_steps=60, batch_size=256, lr=3e-3, pool_tokens=2000)


def delete(run: Path) -> None:
    shutil.rmtree(run)


def delete_and_begin_again(run: Path) -> None:
    shutil.rmtree(run)
    run.mkdir()


def put_a_folder_for_the_metrics(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()


def put_a_file_for_the_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    (run / "checkpoints").write_text("")


def delete_the_artifact_file(run: Path) -> None:
    shutil.rmtree(run / "commits")
    (run / "artifact.json").unlink()


@pytest.mark.parametrize("at", [20, 40])
@pytest.mark.parametrize(
    "harm",
    [
        delete,
        delete_and_begin_again,
        put_a_folder_for_the_metrics,
        put_a_file_for_the_checkpoints,
        delete_the_artifact_file,
    ],
)
def test_what_is_done_to_a_run_while_it_is_trained(
    tmp_path: Path, planted_store: Path, harm: Callable[[Path], None], at: int
) -> None:
    path, harmed = tmp_path / "run", []

    def disturb(done: int, *_: object) -> None:
        if done == at and not harmed:
            harmed.append(harm(path))

    def train_it() -> Run:
        return train(
            planted_store, path, sae=TOPK, config=SHORT, log_every=10, checkpoint_every=15, on_progress=disturb
        )

    with pytest.raises(PipelineError) as error:
        train_it()
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert "Repair the disk" not in str(error.value)
    assert not (tmp_path / ".run.lock").exists()
    for name in ("metrics.jsonl", "checkpoints"):  # what the message asks for
        if (path / name).exists() and (path / name).is_dir() != (name == "checkpoints"):
            shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink()
    assert train_it().fvu < 1
    assert verify(path).ok
    assert os.listdir(tmp_path) == ["run"]


SCRIPT = """
import sys, time
from saetrain import SAEConfig, TrainConfig, train
from actcache import PipelineError
try:
    train(
        sys.argv[1], sys.argv[2], sae=SAEConfig(n_latents=96, k=3), log_every=1, checkpoint_every=5,
        config=TrainConfig(n_steps=60, batch_size=256, lr=3e-3, pool_tokens=2000),
        on_progress=lambda *_: time.sleep(float(sys.argv[3])),
    )
except PipelineError as error:
    print(error, file=sys.stderr)
    sys.exit(1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0])
def test_when_one_of_two_processes_is_killed_the_other_says_so_and_both_resume(
    tmp_path: Path, planted_store: Path, killed: int
) -> None:
    def start(pause_s: float) -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        common["PYTHONPATH"] = str(ROOT)
        words = [sys.executable, "-c", SCRIPT, str(planted_store), str(tmp_path / "run"), str(pause_s)]
        return [
            subprocess.Popen(
                words, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True
            )
            for rank in range(2)
        ]

    processes = start(0.1)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("run/checkpoints/*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    processes[killed].kill()
    _, text = processes[1 - killed].communicate(timeout=60)
    processes[killed].communicate()
    assert processes[1 - killed].returncode == 1
    (line,) = [line for line in text.splitlines() if not line.startswith("[")]  # torch writes lines of its own
    assert "Run the same command again: it resumes" in line
    for process in (resumed := start(0)):
        process.communicate(timeout=90)
    assert [process.returncode for process in resumed] == [0, 0]
    assert verify(tmp_path / "run").ok
    assert os.listdir(tmp_path) == ["run"]
