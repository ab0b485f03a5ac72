"""The same numbers on threads, on a cluster whose worker is killed, and on a scheduler that was started elsewhere."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
from small_codes import dawdle, keep, which_process, write_codes
from typer.testing import CliRunner

import cli
from actcache import CorruptError, SettingsError
from analysis import AnalyzeConfig, Statistic, analyze, map_shards, open_scheduler, reduce_shards
from analysis.concepts.statistics import class_counts_statistic, top_images_statistic, totals_statistic
from analysis.reduce.reduction import cut_latents, reduce_latents
from saetrain import CodeStore

ROOT = Path(__file__).parents[3]
N_SHARDS = 12


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> CodeStore:
    rng = np.random.default_rng(0)
    dense = (rng.random((96, 10, 40)) * (rng.random((96, 10, 40)) < 0.1)).astype(np.float16)
    labels = rng.integers(0, 4, 96).astype(np.int32)
    return write_codes(tmp_path_factory.mktemp("codes") / "x.codes", dense, [8] * N_SHARDS, labels, grid=(3, 3))


def statistics(codes: CodeStore) -> dict[str, Statistic]:
    labels = np.asarray(codes.images["label"])
    return {
        "totals": totals_statistic(),
        "top": top_images_statistic(5, "mean"),
        "classes": class_counts_statistic(labels),
    }


def columns(result: dict[str, Any]) -> dict[str, Any]:
    """Every result of a reduction, bit for bit."""
    totals = {name: np.asarray(value).tobytes() for name, value in vars(result["totals"]).items()}
    return {**totals, **{name: [part.tobytes() for part in result[name]] for name in ("top", "classes")}}


@pytest.fixture(scope="module")
def expected(codes: CodeStore) -> dict[str, Any]:
    return columns(reduce_shards(codes, statistics(codes), tau=0.2))


def wait_for(path: Path) -> str:
    for _ in range(300):
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")


def test_two_commands_may_have_workers_at_the_same_time(codes: CodeStore, expected: dict[str, Any]) -> None:
    """A warning about a port that is taken would be an error here."""
    with open_scheduler(n_workers=1), open_scheduler(n_workers=1):
        assert columns(reduce_shards(codes, statistics(codes), tau=0.2)) == expected


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the worker that dies
def test_a_killed_worker_changes_nothing(codes: CodeStore, expected: dict[str, Any], tmp_path: Path) -> None:
    killed: list[int] = []

    def kill() -> None:
        killed.append(int(wait_for(tmp_path / "first")))
        os.kill(killed[0], signal.SIGKILL)

    seen: list[tuple[int, int]] = []
    chosen = {
        **statistics(codes),
        "n": Statistic(partial(dawdle, folder=str(tmp_path)), combine=sum, finalize=int),
    }
    with open_scheduler(n_workers=2):
        killer = threading.Thread(target=kill)
        killer.start()
        result = reduce_shards(codes, chosen, tau=0.2, on_progress=lambda done, total: seen.append((done, total)))
        killer.join()
    assert killed
    assert killed[0] != os.getpid()
    assert result.pop("n") == N_SHARDS
    assert columns(result) == expected
    assert seen == [(done, N_SHARDS) for done in range(1, N_SHARDS + 1)]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the worker that dies
def test_a_worker_killed_within_a_range_of_latents_changes_nothing(codes: CodeStore, tmp_path: Path) -> None:
    ranges = cut_latents(codes, codes.n_entries // 6)
    assert len(ranges) >= 6
    chosen = {**statistics(codes), "n": Statistic(partial(dawdle, folder=str(tmp_path)), combine=sum, finalize=int)}
    (tmp_path / "first").write_text("0")  # on threads, it does not wait
    expected = reduce_latents(codes, ranges, chosen, keep, tau=0.2)
    (tmp_path / "first").unlink()
    table = analyze(codes, tmp_path / "threads.concepts", config=AnalyzeConfig(n_gallery=0))
    killer = threading.Thread(target=lambda: os.kill(int(wait_for(tmp_path / "first")), signal.SIGKILL))
    seen: list[int] = []
    with open_scheduler(n_workers=2):
        killer.start()
        reduced = reduce_latents(
            codes, ranges, chosen, keep, tau=0.2, on_progress=lambda done, total: seen.append(done)
        )
        killer.join()
        other = analyze(codes, tmp_path / "workers.concepts", config=AnalyzeConfig(n_gallery=0))
    assert [part.pop("n") for part in reduced] == [part.pop("n") for part in expected] == [N_SHARDS] * len(ranges)
    assert [columns(part) for part in reduced] == [columns(part) for part in expected]
    assert seen == list(range(1, len(ranges) + 1))
    for name in ("concepts.parquet", "top_images.parquet", "class_counts.parquet", "histogram.npy", "position_map.npy"):
        assert (other.path / name).read_bytes() == (table.path / name).read_bytes(), name


@pytest.fixture
def running(tmp_path: Path) -> Iterator[str]:
    """The address of a `dask scheduler` with two `dask worker` processes."""
    file = tmp_path / "scheduler.json"
    command = str(Path(sys.executable).parent / "dask")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parents[1])])}
    common: dict[str, Any] = {
        "cwd": tmp_path,
        "env": environment,
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
    }
    place = ["--host", "127.0.0.1", "--no-dashboard"]
    started = [subprocess.Popen([command, "scheduler", "--port", "0", "--scheduler-file", str(file), *place], **common)]
    address = json.loads(wait_for(file))["address"]
    worker = [command, "worker", address, "--nthreads", "1", "--no-nanny", *place]
    started += [subprocess.Popen(worker, **common) for _ in range(2)]  # type: ignore[call-overload]
    yield address
    for process in reversed(started):
        process.kill()
        process.wait()


def test_a_scheduler_that_runs_elsewhere(
    codes: CodeStore, expected: dict[str, Any], running: str, tmp_path: Path
) -> None:
    seen: list[int] = []
    with open_scheduler(scheduler=running):
        result = reduce_shards(codes, statistics(codes), tau=0.2, on_progress=lambda done, total: seen.append(done))
        processes = set(dask.compute(*map_shards(codes, which_process)))
    assert columns(result) == expected
    assert seen == list(range(1, N_SHARDS + 1))
    assert os.getpid() not in processes


def test_workers_and_a_scheduler_give_the_same_answers(table_codes: CodeStore) -> None:
    """Both run on one small cluster; `--n-workers` starts its own."""
    from distributed import LocalCluster

    def ask(*arguments: str) -> list[dict[str, Any]]:
        done = CliRunner().invoke(cli.app, ["--json", *arguments])
        assert done.exit_code == 0, done.output
        rows: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
        assert rows
        return rows

    codes = str(table_codes.path)
    questions = [
        ["query", codes, "--group", "domain == 'photo'"],
        ["query", codes, "--class", "class1"],
        ["query", codes, "--sample", "50"],
        ["localize", codes, "--on-seen", "use"],
    ]
    expected = [ask(*question) for question in questions]
    cluster = LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None, protocol="tcp")
    with cluster:
        where = ["--scheduler", cluster.scheduler_address]
        assert [ask(*question, *where) for question in questions] == expected
    assert ask(*questions[0], "--n-workers", "1") == expected[0]
    assert ask(*questions[3], "--n-workers", "1") == expected[3]
    both = CliRunner().invoke(
        cli.app, ["query", codes, "--latent", "1", "--n-workers", "1", "--scheduler", "tcp://x:1"]
    )
    assert both.exit_code == 1


def test_progress_on_threads_counts_every_shard(codes: CodeStore) -> None:
    seen: list[tuple[int, int]] = []
    reduce_shards(codes, {"n": totals_statistic()}, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, N_SHARDS) for done in range(1, N_SHARDS + 1)]


def test_a_task_carries_no_array(codes: CodeStore) -> None:
    labels = np.arange(1_000_000, dtype=np.int32)
    tasks = map_shards(codes, which_process, {"classes": class_counts_statistic(labels)})
    graph = dict(tasks[0].dask)
    for task in tasks[1:]:
        graph.update(task.dask)
    sizes = sorted(len(pickle.dumps(value)) for value in graph.values())
    assert sizes[-1] > labels.nbytes  # once
    assert sum(sizes[:-1]) < 1000 * len(graph)
    assert len(graph) == N_SHARDS + 2


def fail(codes: CodeStore, shard: int) -> None:
    raise CorruptError(f"Shard {shard} is inconsistent.")


def test_an_error_of_a_task_is_passed_on(codes: CodeStore) -> None:
    with pytest.raises(CorruptError, match="Shard 0"):
        dask.compute(map_shards(codes, fail)[0])


def test_wrong_schedulers_are_refused() -> None:
    with pytest.raises(SettingsError, match="--n-workers must be at least 1"), open_scheduler(0):
        pass
    with pytest.raises(SettingsError, match="Give only one of them"), open_scheduler(2, "tcp://127.0.0.1:1"):
        pass
    with (
        pytest.raises(SettingsError, match="No dask scheduler answers at nonsense://x"),
        open_scheduler(None, "nonsense://x"),
    ):
        pass


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense://x"])
def test_a_scheduler_that_does_not_answer_leaves_nothing_behind(address: str, codes: CodeStore) -> None:
    """distributed makes a client the default before it connects; whatever is computed next would wait for it."""
    import dask.base
    from distributed.client import default_client

    with pytest.raises(SettingsError, match="No dask scheduler answers") as kept, open_scheduler(scheduler=address):
        pass
    assert kept.value.__cause__ is not None  # its traceback keeps the client that failed alive
    with pytest.raises(ValueError, match="No clients found"):
        default_client()
    assert dask.base.get_scheduler() is None


def test_threads_need_no_distributed() -> None:
    """dask would import it to look for a client, which takes 0.3 s of every question."""
    code = "import sys, dask; from analysis.reduce import compute; print(compute(dask.delayed(abs)(-3)), sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.startswith("3 ")
    assert "'dask.threaded'" in done.stdout
    assert "'distributed'" not in done.stdout


def test_the_scheduler_that_dask_is_set_to_is_taken(codes: CodeStore) -> None:
    threads = Statistic(chunk=lambda piece: {threading.get_ident()}, combine=lambda parts: set().union(*parts))
    with dask.config.set(scheduler="synchronous"):
        assert reduce_shards(codes, {"threads": threads})["threads"] == {threading.get_ident()}
