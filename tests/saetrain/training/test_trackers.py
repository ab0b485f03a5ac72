"""--log-to: TensorBoard's event files and wandb's offline runs hold what metrics.jsonl holds, no step twice.

Both are read back: the former by TensorBoard's own reader, the latter record by record with wandb's own types.
"""

import contextlib
import importlib.util
import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from warm_process import WarmProcess

from actcache import SettingsError
from saetrain import Run, SAEConfig, TrainConfig, sweep, train

SAE = SAEConfig("topk", 96, 3)
CONFIG = TrainConfig(n_steps=60, batch_size=256, lr=3e-3, pool_tokens=2000, precision="float32")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_PROJECT", "WANDB_DIR", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def flat(line: dict[str, Any]) -> dict[str, float]:
    numbers = {name: value for name, value in line.items() if not isinstance(value, dict)}
    return numbers | {f"seconds/{name}": value for name, value in line["seconds"].items()}


def event_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def wandb_log(path: Path) -> Iterator[bytes]:
    """Records of a .wandb file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    data, place, record = path.read_bytes(), 7, b""
    assert data[:4] in (b":W&B", b"")
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def whole_log(path: Path) -> list[bytes]:
    """Records up to the last one: wandb's own process may still be writing when the run is finished."""
    from wandb.proto import wandb_internal_pb2

    for _ in range(300):
        records = list(wandb_log(path))
        last = wandb_internal_pb2.Record()
        with contextlib.suppress(DecodeError, IndexError):
            last.ParseFromString(records[-1])
        if last.WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.1)
    pytest.fail(f"{path} has no end")


def wandb_records(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any], Any]:
    """(history, summary, the run's record) of an offline run."""
    from wandb.proto import wandb_internal_pb2

    history, summary, described = [], {}, None
    for data in whole_log(next(folder.glob("*.wandb"))):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        if record.WhichOneof("record_type") == "summary":
            for item in record.summary.update:
                summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        if record.WhichOneof("record_type") == "run":
            described = record.run
    return history, summary, described


def check_against_metrics(run: Run, curves: dict[str, list[tuple[int, float]]]) -> None:
    lines = [flat(line) for line in run.metrics]
    for tag in {name for line in lines for name in line}:
        wanted = [(line["step"], line[tag]) for line in lines if tag in line]
        assert [step for step, _ in curves[tag]] == [step for step, _ in wanted], tag
        assert all(math.isclose(a, b, rel_tol=1e-6) for (_, a), (_, b) in zip(curves[tag], wanted, strict=True)), tag


def written(folder: Path) -> dict[Path, int]:
    """When each file was last written, without the logs of wandb's own process, which may outlast the run."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.suffix != ".log"}


COMMAND = """
import os, signal, sys
from saetrain import SAEConfig, TrainConfig, train

def kill_later(step, total, metrics):
    if step == 45:  # after the checkpoint of 40, and a line that a resumed run writes again
        os.kill(os.getpid(), signal.SIGKILL)

config = TrainConfig(n_steps=60, batch_size=256, lr=3e-3, pool_tokens=2000, precision="float32")
train(sys.argv[1], sys.argv[2], sae=SAEConfig("topk", 96, 3), config=config, log_every=5, checkpoint_every=20,
      log_to=["tensorboard", "wandb"], on_progress=kill_later)
"""


def test_a_killed_run_goes_on_with_the_same_curve(tmp_path: Path, planted_store: Path, warm: WarmProcess) -> None:
    run, events = tmp_path / "runs" / "a", tmp_path / "runs" / "tensorboard" / "a"
    done = warm.run("-c", COMMAND, planted_store, run, cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert [step for step, _ in event_curves(events)["fvu"]][-1] == 45
    trained = train(
        planted_store, run, sae=SAE, config=CONFIG, log_every=5, checkpoint_every=20, log_to=["tensorboard", "wandb"],
        wandb_project="planted",
    )  # fmt: skip
    assert [line["step"] for line in trained.metrics] == list(range(5, 61, 5))

    curves = event_curves(events)
    check_against_metrics(trained, curves)
    assert curves["held_out/all/fvu"] == [(60, pytest.approx(trained.fvu))]

    folders = list((tmp_path / "runs" / "wandb").glob("offline-run-*"))
    assert len(folders) == 1, folders
    history, summary, described = wandb_records(folders[0])
    assert (described.display_name, described.project) == ("a", "planted")
    assert [line["_step"] for line in history] == list(range(5, 61, 5))
    for line, wanted in zip(history, trained.metrics, strict=True):
        assert {name: line[name] for name in flat(wanted) if name != "step"} == pytest.approx(
            {name: value for name, value in flat(wanted).items() if name != "step"}
        )
    assert summary["held_out/all/fvu"] == pytest.approx(trained.fvu)
    settings = {item.key: json.loads(item.value_json) for item in described.config.update}
    assert settings["k"] == 3

    before = written(tmp_path)
    train(planted_store, run, sae=SAE, config=CONFIG, log_to=["tensorboard", "wandb"])  # complete: nothing is written
    assert written(tmp_path) == before


def test_each_run_of_a_sweep_has_its_own(tmp_path: Path, planted_store: Path) -> None:
    members = [(None, SAEConfig("topk", 96, k), CONFIG) for k in (2, 4)]
    runs = sweep(planted_store, tmp_path / "runs", members, log_every=20, log_to=["tensorboard", "wandb"])
    for run in runs:
        check_against_metrics(run, event_curves(tmp_path / "runs" / "tensorboard" / run.path.name))
    named = {wandb_records(folder)[2].display_name for folder in (tmp_path / "runs" / "wandb").glob("offline-run-*")}
    assert named == {"k2", "k4"} == {run.path.name for run in runs}


def test_what_cannot_be_tracked_is_found_out_first(
    tmp_path: Path, planted_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(**how: Any) -> None:
        train(planted_store, tmp_path / "run", sae=SAE, config=CONFIG, **how)

    with pytest.raises(SettingsError, match="--log-to must be tensorboard or wandb, got 'mlflow'"):
        begin(log_to=["mlflow"])
    with pytest.raises(SettingsError, match="only together with --log-to wandb"):
        begin(log_to=["tensorboard"], wandb_project="x")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # as where it is not installed
    with pytest.raises(SettingsError, match=r"needs the package wandb: pip install 'patchsae\[wandb\]'"):
        begin(log_to=["wandb"])
    assert not (tmp_path / "run").exists()


def test_wandb_without_a_key_is_one_line(tmp_path: Path, planted_store: Path) -> None:
    command = ["train", planted_store, tmp_path / "run", "--n-latents", 96, "--n-steps", 20, "--batch-size", 64]
    done = subprocess.run(
        [sys.executable, "cli.py", *map(str, command), "--log-to", "wandb"], check=False, capture_output=True,
        text=True, stdin=subprocess.DEVNULL, env={**os.environ, "WANDB_MODE": "online", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: wandb could not be started")
    assert "WANDB_MODE=offline" in done.stderr
