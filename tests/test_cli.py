"""The command line: flags equal the library's keywords, results on stdout, exit codes, and real kills."""

import inspect as signatures
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner
from warm_process import WarmProcess

import actcache
import analysis
import cli
import saetrain
from actcache.options import JudgingConfig

ROOT = Path(__file__).parents[1]


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(warm: WarmProcess, tmp_path: Path) -> Run:
    """run(WORDS...): a real process of the real command line in tmp_path, warnings as errors. It must succeed."""

    def run(*words: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = warm.run("cli.py", *words, cwd=tmp_path)
        assert not check or done.returncode == 0, done.stderr
        return done

    return run


def run_cold(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same in a new Python, which has imported nothing."""
    command = [sys.executable, "-W", "error", str(ROOT / "cli.py"), *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


VERBS = get_command(cli.app).commands  # type: ignore[attr-defined]

CONFIGS: dict[str, tuple[Any, ...]] = {
    "extract": (actcache.ExtractConfig,),
    "import": (actcache.ImportConfig,),
    "train": (saetrain.SAEConfig, saetrain.TrainConfig),
    "analyze": (analysis.AnalyzeConfig,),
    "query": (analysis.Question,),
    "look": (analysis.TowerOptions,),
    "evaluate": (analysis.StudyConfig, analysis.ModelOptions),
    "benchmark": (analysis.BenchmarkConfig, analysis.StudyConfig, analysis.ModelOptions),
    "intervene": (analysis.MaskingConfig, analysis.StudyConfig, analysis.ModelOptions),
    "attribute": (analysis.DeletionConfig, analysis.StudyConfig, analysis.ModelOptions),
    "steer": (analysis.SteerabilityConfig, analysis.StudyConfig, analysis.ModelOptions),
    "rules": (analysis.RulesConfig,),
    "probe": (analysis.ProbingConfig,),
    "adapt": (actcache.PromptConfig,),
    "compare": (analysis.ComparisonConfig,),
    "name": (analysis.ModelOptions,),
    "inspect": (JudgingConfig,),
    "localize": (JudgingConfig,),
}
"""The configuration classes whose fields are flags of a verb."""

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "quickstart": analysis.quickstart, "extract": actcache.extract, "train": saetrain.train, "encode": saetrain.encode,
    "analyze": analysis.analyze, "evaluate": analysis.evaluate_fidelity, "attribute": analysis.delete_latents,
    "steer": analysis.measure_steerability, "inspect": analysis.inspect_dictionaries, "rules": analysis.learn_rules,
    "probe": analysis.probe_latents,
    "compare": analysis.compare, "adapt": actcache.adapt, "report": analysis.write_report,
    "import": actcache.import_activations, "benchmark": analysis.benchmark_runs,
}  # fmt: skip
"""The functions whose own keywords are the other flags."""

OWN = {"on_progress", "on_step", "on_plan", "on_wait", "config", "sae", "study", "model", "judging", "batch_size"}
"""Keywords that are not flags themselves: callbacks, and configurations, whose fields are flags."""


def flags_of(verb: str) -> dict[str, Any]:
    return {parameter.name: parameter for parameter in VERBS[verb].params if parameter.name != "help"}


def default_of(parameter: Any) -> Any:
    return tuple(parameter.default) if isinstance(parameter.default, list) else parameter.default


@pytest.mark.parametrize("verb", sorted(CONFIGS))
def test_every_option_of_a_configuration_is_a_flag_with_its_default_and_its_help(verb: str) -> None:
    flags = flags_of(verb)
    for config in CONFIGS[verb]:
        for field in fields(config):
            if "help" not in field.metadata:
                continue
            flag = flags[field.name]
            assert flag.help == field.metadata["help"], field.name
            assert flag.help.endswith("."), field.name
            if field.default is MISSING:
                assert flag.required, field.name
                continue
            expected = field.default
            if verb == "train" and field.metadata["sweep"]:  # several values make a sweep
                assert flag.multiple
                expected = None if expected is None else (expected,)
            assert (default_of(flag) or None) == (expected or None), field.name


@pytest.mark.parametrize("verb", sorted(FUNCTIONS))
def test_the_other_flags_and_defaults_equal_the_librarys_keywords(verb: str) -> None:
    of_configs = {field.name for config in CONFIGS.get(verb, ()) for field in fields(config)}
    if verb == "adapt":
        of_configs -= {"model", "pretrained"}
    flags = {name: flag for name, flag in flags_of(verb).items() if name not in of_configs | OWN}
    # estimate(); with --layer one hook point; write_tables()
    extra = {"extract": {"dry_run"}, "train": {"site"}, "benchmark": {"table"}}.get(verb, set())
    parameters = signatures.signature(FUNCTIONS[verb]).parameters.values()
    keywords = {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in of_configs | OWN}
    assert flags.keys() - extra == keywords.keys()
    for name, expected in keywords.items():
        if not flags[name].required and expected is not signatures.Parameter.empty:
            assert (default_of(flags[name]) or None) == (expected or None), name


def test_every_verb_has_help_and_an_example() -> None:
    for name, verb in VERBS.items():
        assert verb.help, name
        assert f"patchsae {name}" in (verb.epilog or ""), name


@pytest.mark.parametrize("verb", ["", *sorted(VERBS)])
def test_help_is_shown(verb: str, run: Run) -> None:
    assert "Usage" in run(*filter(None, [verb]), "--help").stdout


def test_the_whole_path(tmp_path: Path, tiny_images: Path, tiny_model: dict[str, str], run: Run) -> None:
    """`extract` and `train` load most, and start cold: whatever they import gives no warning."""
    model = ["--model", tiny_model["model"], "--pretrained", tiny_model["pretrained"]]
    layers = ["--layer", "2", "--layer", "0", "--shard-images", "32"]
    run_cold("extract", tiny_images, "a.acts", *model, *layers, cwd=tmp_path)
    small = ["--n-latents", "64", "--k", "4", "--n-steps", "40", "--batch-size", "128", "--lr", "0.003"]
    run_cold("train", "a.acts", "r", "--layer", "2", *small, cwd=tmp_path)
    run("encode", "r", "a.acts", "a.codes")
    run("analyze", "a.codes", "a.concepts")
    run("report", "a.concepts", "a.html")
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    for path in ("a.acts", "r", "a.codes", "a.concepts"):  # in this process: each of their own takes two seconds
        facts, checked = (
            json.loads(CliRunner().invoke(cli.app, ["-q", "--json", verb, str(tmp_path / path)]).stdout)
            for verb in ("info", "verify")
        )
        assert facts["complete"] is True
        assert checked["ok"] is True
        assert checked["problems"] == []
    rows = json.loads(run("--json", "query", "a.codes", "--class", "class1").stdout)["rows"]
    top = json.loads(run("--json", "query", "a.codes", "--latent", str(rows[0]["latent"])).stdout)["rows"]
    assert top[0]["uri"].endswith(".png")
    assert "nothing" not in run("query", "a.codes", "--image", top[0]["uri"]).stdout
    again = run("extract", tiny_images, "a.acts", *model, "--layer", "0", "--layer", "2", "--shard-images", "32")
    assert "75 images x 10 tokens" in again.stdout


def test_an_error_is_one_line_and_exit_1(run: Run) -> None:
    done = run("info", "nothing.acts", check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.strip().splitlines() == [
        "error: nothing.acts does not exist. Expected an artifact; check the path."
    ]


def test_global_flags_stand_before_or_after_the_verb(tmp_path: Path, tiny_codes: Path, run: Run) -> None:
    before = run("--json", "-q", "info", tiny_codes)
    after = run("info", tiny_codes, "--json", "--quiet")
    assert json.loads(before.stdout) == json.loads(after.stdout)
    done = run("info", "--traceback", "nothing", check=False)
    assert "Traceback" in done.stderr
    assert "--json does not exist" in run("info", "--", "--json", check=False).stderr


def test_an_error_before_the_first_progress_is_the_only_line(run: Run) -> None:
    done = run("train", "nothing.acts", "run", check=False)
    assert done.stderr.startswith("error: ")


def test_the_page_of_a_comparison_cannot_replace_its_json(run: Run) -> None:
    done = run("compare", "a.concepts", "b.concepts", "c.html", check=False)
    assert done.returncode == 2
    assert "c.json" in done.stderr


def test_usage_is_exit_2(tmp_path: Path, tiny_codes: Path, run: Run) -> None:
    assert run("extract", ".", "x.acts", check=False).returncode == 2
    done = run("query", tiny_codes, check=False)
    assert done.returncode == 2
    assert "No question was asked" in done.stderr


def test_damage_is_exit_1_and_named(tmp_path: Path, tiny_codes: Path, run: Run) -> None:
    import shutil

    copy = shutil.copytree(tiny_codes, tmp_path / "c.codes")
    victim = copy / "codes.zarr" / "1" / "value" / "c" / "0"
    data = bytearray(victim.read_bytes())
    data[7] ^= 4
    victim.write_bytes(data)
    done = run("--json", "verify", "c.codes", check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout)["problems"][0].startswith("codes.zarr/1/value/c/0: differs")


def start_and_kill(arguments: list[str], cwd: Path, ready: Callable[[], bool], how: int) -> int:
    """Start the command, wait until `ready`, kill it, and return its exit code."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), "--quiet", *arguments],
        cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert ready(), "the command ended before it could be killed"
    os.kill(process.pid, how)
    return process.wait(30)


def contents(path: Path) -> dict[str, bytes]:
    """Everything but artifact.json, whose provenance may differ."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file.name not in ("artifact.json", "manifest.json", "metrics.jsonl")
    }


CROWD = 800
"""Images that take long enough to be extracted that a process can be killed in the middle."""


@pytest.fixture(scope="module")
def crowd(
    tmp_path_factory: pytest.TempPathFactory, make_images: Callable[..., Path], tiny_model: dict[str, str],
    warm: WarmProcess,
) -> tuple[list[str], Path]:  # fmt: skip
    """A command that extracts many images into STORE, and the store that it writes when nobody interrupts it."""
    folder = tmp_path_factory.mktemp("crowd")
    images = make_images(folder / "images", CROWD)
    model = ["--model", tiny_model["model"], "--pretrained", tiny_model["pretrained"]]
    command = ["extract", str(images), "STORE", *model, "--layer", "2", "--shard-images", "16", "--batch-size", "4"]
    done = warm.run("cli.py", *command, cwd=folder)
    assert done.returncode == 0, done.stderr
    return command, folder / "STORE"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_extract_killed_in_the_middle_ends_well_when_repeated(
    tmp_path: Path, crowd: tuple[list[str], Path], how: int, run: Run
) -> None:
    command, whole = crowd
    commits = tmp_path / "STORE" / "commits"
    code = start_and_kill(command, tmp_path, lambda: len(list(commits.glob("0*.json"))) >= 3, how)
    assert code == (130 if how == signal.SIGINT else -signal.SIGKILL)
    assert not (tmp_path / "STORE" / "manifest.json").exists()
    refused = run("train", "STORE", "r", check=False)
    assert refused.returncode == 1
    assert f"of {CROWD // 16} shards are missing" in refused.stderr
    run(*command)
    assert json.loads(run("--json", "verify", "STORE").stdout)["ok"] is True
    assert contents(tmp_path / "STORE") == contents(whole)


def test_train_killed_in_the_middle_ends_as_if_it_had_not_been(tmp_path: Path, tiny_store: Path, run: Run) -> None:
    small = ["--n-latents", "256", "--k", "4", "--n-steps", "400", "--batch-size", "256", "--checkpoint-every", "20"]
    command = ["train", str(tiny_store), "r", "--layer", "2", *small]
    checkpoints = tmp_path / "r" / "checkpoints"
    start_and_kill(command, tmp_path, lambda: len(list(checkpoints.glob("step-*"))) >= 2, signal.SIGKILL)
    assert not (tmp_path / "r" / "manifest.json").exists()
    run(*command)
    run(*["s" if word == "r" else word for word in command])
    assert contents(tmp_path / "r") == contents(tmp_path / "s")
    steps = [json.loads(line)["step"] for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert steps[-1] == 400
