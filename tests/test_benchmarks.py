"""Every benchmark runs, tiny, and prints one JSON object with its settings."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from warm_process import WarmProcess

ROOT = Path(__file__).parents[1]

TINY: dict[str, list[str]] = {
    "bench_write": ["--images", "32", "--grid", "2", "--d-model", "32", "--pairs", "1"],
    "bench_read": ["--images", "64", "--grid", "2", "--d-model", "32", "--shards", "3", "--hook-points", "2",
                   "--repeat", "1"],
    "bench_loader": ["--images", "64", "--grid", "2", "--d-model", "32", "--batch-size", "32", "--pool-tokens", "200",
                     "--seconds", "0.1", "--rounds", "1"],
    "bench_feed": ["--n-latents", "64", "--k", "4", "--images", "64", "--grid", "2", "--d-model", "32", "--batch-size",
                   "32", "--pool-tokens", "200", "--steps", "2", "--rounds", "1"],
    "bench_sweep": ["--members", "2", "--n-latents", "128", "--steps", "2", "--batch-size", "32", "--images", "64",
                    "--grid", "2", "--d-model", "32", "--rounds", "1"],
    "bench_query": ["--images", "40", "--grid", "2", "--n-latents", "64", "--l0", "4", "--shards", "3", "--repeat", "1",
                    "--slow"],
    "bench_analyze": ["--images", "40", "--grid", "2", "--n-latents", "64", "--l0", "4", "--shard-images", "16"],
    "bench_cold": ["--images", "64", "--grid", "2", "--d-model", "32", "--passes", "1"],
}  # fmt: skip


Run = Callable[..., dict[str, object]]


@pytest.fixture
def run(warm: WarmProcess, tmp_path: Path) -> Run:
    def run(name: str, *arguments: str) -> dict[str, object]:
        done = warm.run(f"benchmarks/{name}.py", *arguments, "--json", cwd=tmp_path, PYTHONPATH=str(ROOT))
        assert done.returncode == 0, done.stderr[-2000:]
        assert len(done.stdout.splitlines()) == 1
        found: dict[str, object] = json.loads(done.stdout)
        assert {"machine", "settings"} <= set(found)
        return found

    return run


@pytest.mark.parametrize("name", sorted(TINY))
def test_a_benchmark_runs_and_prints_one_object(name: str, tmp_path: Path, run: Run) -> None:
    found = run(name, *TINY[name], "--folder", str(tmp_path))
    numbers = [value for value in found.values() if isinstance(value, float)]
    assert numbers
    assert all(number >= 0 for number in numbers)


@pytest.mark.parametrize("variant", ["topk", "matryoshka", "relu", "jumprelu", "gated"])
def test_a_training_step_is_measured_beside_its_encoder_product(variant: str, run: Run) -> None:
    found = run("bench_train", "--variant", variant, "--n-latents", "256", "--k", "4", "--l0", "9", "--batch-size",
                "300", "--d-model", "32", "--rounds", "2", "--warmup", "1", "--dead-share", "0.1")  # fmt: skip
    assert {"share_of_limit", "limit_gemm_tokens_per_s", "tokens_per_s", "seconds", "peak_gb"} <= set(found)
    assert 3 <= float(str(found["l0"])) <= 12


def test_encoding_is_measured_beside_the_product(run: Run) -> None:
    found = run("bench_encode", "--n-latents", "256", "--k", "4", "--rows", "300", "--d-model", "32", "--rounds", "2")
    assert {"share_of_limit", "share_of_float32", "limit_bfloat16_tokens_per_s", "tokens_per_s"} <= set(found)
    assert 3 <= float(str(found["l0"])) <= 4


def test_extraction_is_measured_beside_the_bare_forward(
    tmp_path: Path, tiny_images: Path, tiny_model: dict[str, str], run: Run
) -> None:
    model = [f"--{name}={value}" for name, value in tiny_model.items()]
    found = run("bench_extract", "--images", str(tiny_images), *model, "--layer", "1", "--stop-layer", "0",
                "--limit", "32", "--pairs", "1", "--folder", str(tmp_path))  # fmt: skip
    assert {"share_of_limit", "limit_bare_forward_images_s", "stop_speedup", "images_per_s"} <= set(found)


def test_quality_is_compared_over_seeds(tiny_store: Path, run: Run) -> None:
    found = run("quality", "--store", str(tiny_store), "--held-out", str(tiny_store), "--layer", "2", "--n-latents",
                "64", "--k", "4", "--steps", "3", "--batch-size", "64", "--seeds", "2")  # fmt: skip
    table = found["table"]
    assert isinstance(table, dict)
    assert set(table) == {"topk", "batchtopk", "matryoshka", "relu", "jumprelu", "gated"}
    assert all(abs(line["difference"]) < 0.1 for line in table.values())


def test_masks_are_measured_beside_whole_forward_passes(tmp_path: Path, tiny_model: dict[str, str], run: Run) -> None:
    model = [f"--{name}={value}" for name, value in tiny_model.items()]
    found = run("bench_intervene", *model, "--layer", "1", "--n-latents", "64", "--k", "4", "--images", "24",
                "--pixels", "24", "--rounds", "1", "--folder", str(tmp_path))  # fmt: skip
    assert found["n_masks"] == 21
    assert {"speedup", "share_of_limit", "masks_s", "whole_forwards_s"} <= set(found)


@pytest.mark.slow
def test_the_metrics_of_visaebench_are_measured_at_several_sizes(run: Run) -> None:
    found = run("bench_benchmark", "--n-images", "60", "--n-ood", "40", "--grid", "4", "--d-model", "32", "--n-latents",
                "128", "--k", "4", "--classes", "5", "--growth", "30", "--threads", "1")  # fmt: skip
    assert isinstance(found["values"], dict)
    assert len(found["values"]) == 7
    assert isinstance(found["memory"], dict)
    assert set(found["memory"]) == {"30", "60"}
    assert {"share_of_limit", "limit_bfloat16_product_s", "seconds", "cpu_s", "tokens_per_s"} <= set(found)


@pytest.mark.slow
def test_the_explorer_is_measured_in_a_browser(tmp_path: Path, tiny_model: dict[str, str], run: Run) -> None:
    pytest.importorskip("playwright", reason="the package playwright is not installed")
    if not any(map(shutil.which, ("chromium", "google-chrome"))):
        pytest.skip("there is no chromium")
    model = [f"--{name}={value}" for name, value in tiny_model.items()]
    found = run("bench_explore", *model, "--layers", "1", "--images", "40", "--grid", "4", "--n-latents", "64",
                "--l0", "4", "--shards", "3", "--classes", "4", "--pixels", "24", "--d-model", "32", "--clicks", "3",
                "--repeat", "1", "--parts", "server", "site", "edit", "--folder", str(tmp_path))  # fmt: skip
    rows = found["rows"]
    assert isinstance(rows, list)
    assert {row["part"] for row in rows} == {"server", "site", "edit"}
    assert all(0 < row["seconds"] < 60 for row in rows)
    clicks = [row for row in rows if row["what"].startswith("click on a")]
    assert len(clicks) == 6
    for row in clicks:
        if "patch" not in row["what"]:
            assert 500 < row["n_bytes"] < row["limit_bytes"]
            assert 0 < row["record_s"] <= row["seconds"]


@pytest.mark.slow
def test_a_device_is_checked_against_the_processor_and_every_stage_is_measured(run: Run) -> None:
    found = run("gpu", "--device", "cpu", "--small")
    checks, stages = found["checks"], found["stages"]
    assert isinstance(checks, list)
    assert isinstance(stages, dict)
    assert found["ok"] is True
    assert [check["what"] for check in checks if not check["ok"]] == found["failed"] == []
    assert {check["what"].split(",")[0].split(":")[0] for check in checks} == {
        "tower", "extract", "train", "encode", "evaluate", "intervene", "adapt",
    }  # fmt: skip
    assert [what for what, stage in stages.items() if "error" in stage] == []
    assert all(stage["share_of_limit"] > 0 for stage in stages.values())


def test_a_device_that_is_not_there_is_one_line(warm: WarmProcess, tmp_path: Path) -> None:
    done = warm.run("benchmarks/gpu.py", "--device", "cuda:99", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: --device cuda:99 cannot be used here")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "options", [["--steps", "2"], ["--steps", "0"], ["--steps", "6", "--warmup", "5"], ["--quality", "--steps", "9"]]
)
def test_too_few_steps_for_a_median_are_refused(options: list[str], warm: WarmProcess) -> None:
    done = warm.run("benchmarks/peers.py", "--peers-python", sys.executable, *options, cwd=ROOT)
    assert done.returncode == 2
    assert "error: --steps must be at least" in done.stderr.splitlines()[-1]
