"""What version 0.1.0 wrote before its modules moved is opened, verified, resumed and shown by the code of today.

tests/golden/pipeline holds every kind of artifact and of result (see tests/golden/README.md). Complete artifacts must
not change by a byte when the command that made them is given again: that holds settings, ids and parents. Answers must
be the numbers that were printed then; they may differ in the last digits, as processors do.
"""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import cli

GOLDEN = Path(__file__).parent / "golden" / "pipeline"
SPEC = importlib.util.spec_from_file_location("make_pipeline", GOLDEN.parent / "make_pipeline.py")
assert SPEC is not None
assert SPEC.loader is not None
MADE = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(MADE)

ARTIFACTS = [
    "a.acts", "b.acts", "adapted.acts", "a.prompts", "run", "long", "a.codes", "adapted.codes", "a.concepts",
    "adapted.concepts", *(f"runs/variant{name}" for name in ("batchtopk", "relu", "jumprelu", "gated")),
]  # fmt: skip
RESULTS = {
    "evaluate.json": "Fidelity", "evaluate-runs.json": "Fidelity", "intervene.json": "Masking latents",
    "attribute.json": "Which latents decide", "steer.json": "Steering", "rules.json": "Rules",
    "compare.json": "What maple changed", "intervene-set.json": "Setting latents", "a.prompts": "Adaptation by maple",
}  # fmt: skip
REWRITES = ("name", "report", "compare")
"""Verbs that write people's names, or a page for looking at, each time."""


def ask(folder: Path, command: str) -> Result:
    """A command given in a folder, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return CliRunner().invoke(cli.app, ["--quiet", "--json", *command.split()])


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, so that no test can change what is kept."""
    return Path(shutil.copytree(GOLDEN, tmp_path_factory.mktemp("golden") / "pipeline"))


def check_close(found: Any, kept: Any, place: str = "") -> None:
    """Equal but for the last digits of floats."""
    if isinstance(kept, dict):
        assert isinstance(found, dict), place
        assert found.keys() >= kept.keys(), place
        for name in kept:
            check_close(found[name], kept[name], f"{place}/{name}")
    elif isinstance(kept, list):
        assert len(found) == len(kept), place
        for i, (one, other) in enumerate(zip(found, kept, strict=True)):
            check_close(one, other, f"{place}/{i}")
    elif isinstance(kept, float):
        assert found == pytest.approx(kept, rel=2e-3, abs=1e-5, nan_ok=True), place
    else:
        assert found == kept, place


@pytest.mark.parametrize("name", ARTIFACTS)
def test_an_artifact_is_whole(golden: Path, name: str) -> None:
    done = ask(golden, f"verify {name}")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["ok"]


MORE_FLAGS = {"class": " --rank frequent"}
"""What asks for the answer of then, where the usual answer is another one now."""


def as_it_was(answer: dict[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
    """An answer, with the fields that were texts then, and with the pairs that were there twice."""
    if "shards" in kept:
        answer["shards"] = "{done} of {total}".format(**answer["shards"])
    for name, parent in answer["parents"].items() if "complete" in kept else ():
        answer[f"made from {name}"] = "{id} ({path}, {state})".format(**parent)
    if any("rank" in row and "partner" in row for row in kept.get("rows", [])):
        pairs = {(row["latent"], row["partner"]): row for row in answer["rows"]}
        assert len(pairs) == len({(min(pair), max(pair)) for pair in pairs})  # each once
        rows = []
        for row in kept["rows"]:
            pair = row["latent"], row["partner"]
            once = pairs[min(pair), max(pair)]
            share = once["share" if pair in pairs else "partner_share"]
            rows.append({**once, "latent": pair[0], "partner": pair[1], "rank": row["rank"], "share": share})
        assert len(pairs) == len({(min(p), max(p)) for p in ((r["latent"], r["partner"]) for r in rows)})
        answer["rows"] = rows
    return answer


@pytest.mark.parametrize("name", MADE.ANSWERS)
def test_an_answer_is_what_it_was(golden: Path, name: str) -> None:
    done = ask(golden, MADE.ANSWERS[name] + MORE_FLAGS.get(name, ""))
    assert done.exit_code == 0, done.output
    kept = json.loads((GOLDEN / "answers" / f"{name}.json").read_text())
    answer = as_it_was(json.loads(done.stdout), kept)
    if name == "inspect":  # a pursuit may since take the SAE's own latents for a token, if they are better
        for run, before in zip(answer["runs"], kept["runs"], strict=True):
            for number in ("fvu_pursuit", "gap", "l0_pursuit"):
                now, then = run["gap"].pop(number), before["gap"].pop(number)
                assert now >= then if number == "gap" else number == "l0_pursuit" or now <= then
    check_close(answer, kept)


@pytest.mark.parametrize("command", MADE.COMMANDS, ids=lambda command: " ".join(command.split()[:3]))
def test_the_command_that_made_it_changes_nothing(golden: Path, command: str) -> None:
    before = {file: file.read_bytes() for file in golden.rglob("*") if file.is_file()}
    done = ask(golden, command)
    assert done.exit_code == 0, done.output
    if command.split()[0] not in REWRITES:
        assert {file: file.read_bytes() for file in golden.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_reported_on(golden: Path, tmp_path: Path, name: str) -> None:
    done = ask(golden, f"report a.concepts {tmp_path / 'page.html'} --result {name}")
    assert done.exit_code == 0, done.output
    assert RESULTS[name] in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("command", "title"), [(MADE.ANSWERS["inspect"], "Dictionaries"), (MADE.ANSWERS["localize"], "Localization")]
)
def test_what_inspect_and_localize_write_is_reported_on(golden: Path, tmp_path: Path, command: str, title: str) -> None:
    result = tmp_path / "result.json"
    for _ in range(2):  # the second time it returns what is there
        done = ask(golden, f"{command} --out {result}")
        assert done.exit_code == 0, done.output
    done = ask(golden, f"report a.concepts {tmp_path / 'page.html'} --result {result}")
    assert done.exit_code == 0, done.output
    assert f">{title}<" in (tmp_path / "page.html").read_text()


def test_an_interrupted_extraction_is_finished(golden: Path) -> None:
    from actcache import ActivationStore

    done = ask(golden, MADE.COMMANDS[0].replace("a.acts", "interrupted-a.acts"))
    assert done.exit_code == 0, done.output
    finished, whole = (ActivationStore.open(golden / name) for name in ("interrupted-a.acts", "a.acts"))
    assert finished.store_id == whole.store_id
    np.testing.assert_allclose(
        finished.read(1, check=True).astype(np.float32), whole.read(1).astype(np.float32), rtol=2e-3, atol=1e-4
    )


def test_interrupted_codes_are_finished(golden: Path) -> None:
    from saetrain import CodeStore

    done = ask(golden, "encode run a.acts interrupted-a.codes --device cpu")
    assert done.exit_code == 0, done.output
    finished, whole = (CodeStore.open(golden / name) for name in ("interrupted-a.codes", "a.codes"))
    assert finished.codes_id == whole.codes_id
    for shard in range(whole.n_shards):
        one, other = finished.read_shard(shard), whole.read_shard(shard)
        np.testing.assert_array_equal(one.indptr, other.indptr)
        np.testing.assert_allclose(one.value.astype(np.float32), other.value.astype(np.float32), rtol=2e-3, atol=1e-4)


@pytest.mark.slow
def test_a_killed_training_is_finished(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its checkpoint at step 1000; its twin was never killed. Both began with torch's operations. With the last
    bits of kernels one of the 64 latents ends elsewhere with this seed, which costs 6 % of the error; see quality.md.
    """
    from actcache.compiler import find_kernels
    from saetrain import Run

    monkeypatch.setenv("PATCHSAE_COMPILER", "off")
    find_kernels.cache_clear()
    checkpoints = golden / "interrupted-run" / "checkpoints"
    assert sorted(file.name for file in checkpoints.glob("*.json")) == ["step-00001000.json"]
    done = ask(golden, f"train a.acts interrupted-run {MADE.LONG} --checkpoint-every 1000")
    find_kernels.cache_clear()
    assert done.exit_code == 0, done.output
    finished, whole = (Run.open(golden / name) for name in ("interrupted-run", "long"))
    assert finished.run_id == whole.run_id
    assert finished.quality["all"]["fvu"] == pytest.approx(whole.quality["all"]["fvu"], rel=0.05)
    steps = [
        json.loads(line)["step"] for line in (golden / "interrupted-run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(set(steps))
    assert steps[-1] == 4000
