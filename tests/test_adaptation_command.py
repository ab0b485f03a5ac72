"""`adapt`, `extract --prompts`, `compare` by command: what does not fit is one line, and nothing is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from plain_clip import State, checkpoint_tensors
from typer.testing import CliRunner, Result

import cli

TINY = {"width": 32, "text": 16, "embed": 16}
MAPLE = checkpoint_tensors("maple", **TINY, n=2, depth=2)


def ask(*arguments: str | Path) -> Result:
    """In one process: what is tested is the way from flags to errors."""
    return CliRunner().invoke(cli.app, ["--quiet", *map(str, arguments)])


def check_refused(done: Result, words: str, out: Path) -> None:
    assert done.exit_code == 1, done.output
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    left = sorted(file.name for file in out.parent.glob(f"{out.stem}*"))
    assert left == [], left


@pytest.fixture
def model(tiny_model: dict[str, str]) -> list[str]:
    return ["--model", tiny_model["model"], "--pretrained", tiny_model["pretrained"]]


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (
            checkpoint_tensors("maple", width=768, text=512, embed=512, n=2, depth=2),
            "768 wide, but that of tiny.json is 32",
        ),
        ({n: v for n, v in MAPLE.items() if n != "prompt_learner.proj.bias"}, "prompt_learner.proj.bias is missing"),
        ({"adapter.fc.0.weight": torch.zeros(4, 16)}, "are not the keys of prompts (adapter.fc.0.weight"),
        (MAPLE | {"adapter.fc.0.weight": torch.zeros(4, 16)}, "adapter.fc.0.weight are neither prompts nor weights"),
        (MAPLE | checkpoint_tensors("cocoop", **TINY, n=2, depth=1), "proj.weight does not belong to cocoop"),
    ],
    ids=["width", "missing", "another method", "a part of another method", "two methods"],
)
def test_a_checkpoint_that_does_not_fit(
    state: State, words: str, model: list[str], tiny_images: Path, tmp_path: Path
) -> None:
    torch.save({"state_dict": state}, tmp_path / "model.pth.tar-5")
    done = ask("extract", tiny_images, tmp_path / "x.acts", *model, "--layer", "2", "--prompts",
               tmp_path / "model.pth.tar-5")  # fmt: skip
    check_refused(done, words, tmp_path / "x.acts")


def test_classes_that_differ(
    model: list[str], tiny_images: Path, tiny_run: Path, make_images: Callable[..., Path], tmp_path: Path
) -> None:
    more = make_images(tmp_path / "four", 24, n_classes=4)
    quick = ["--method", "coop", "--class-specific", "--shots", "2", "--n-epochs", "1", "--n-prompts", "2"]
    done = ask("adapt", tiny_images, tmp_path / "x.prompts", *model, *quick, "--test", more)
    check_refused(done, "have different classes: only one of them has class3", tmp_path / "x.prompts")
    renamed = Path(shutil.copytree(tiny_images, tmp_path / "renamed"))
    (renamed / "class0").rename(renamed / "other")
    concepts = {}
    for name, images, trained_on in (
        ("base", renamed, None),
        ("adapted", renamed, tiny_images),
        ("wide", renamed, more),
    ):
        options: list[str | Path] = []
        if trained_on:
            assert ask("adapt", trained_on, tmp_path / f"{name}.prompts", *model, *quick).exit_code == 0
            options = ["--prompts", tmp_path / f"{name}.prompts"]
        store, codes, concepts[name] = (tmp_path / f"{name}.{kind}" for kind in ("acts", "codes", "concepts"))
        for command in (
            ["extract", images, store, *model, "--layer", "2", *options],
            ["encode", tiny_run, store, codes],
            ["analyze", codes, concepts[name], "--n-gallery", "0"],
        ):
            done = ask(*command)
            assert done.exit_code == 0, done.output
    for name, words in (("adapted", "(class0, class1, class2); you asked for 3 (class1, class2, other)"),
                        ("wide", "for 4 specific classes")):  # fmt: skip
        done = ask("compare", concepts["base"], concepts[name], tmp_path / "x.json", "--on-seen", "use")
        check_refused(done, words, tmp_path / "x.json")


def test_a_pair_of_other_images_and_a_run_that_does_not_fit(
    model: list[str], tiny_images: Path, tiny_run: Path, make_images: Callable[..., Path], tmp_path: Path
) -> None:
    torch.save({"state_dict": MAPLE}, tmp_path / "maple.tar")
    concepts = {}
    for name, images, options in (
        ("base", tiny_images, []),
        ("adapted", tiny_images, ["--prompts", tmp_path / "maple.tar"]),
        ("elsewhere", make_images(tmp_path / "more", 30, seed=9), ["--prompts", tmp_path / "maple.tar"]),
    ):
        store, codes, concepts[name] = (tmp_path / f"{name}.{kind}" for kind in ("acts", "codes", "concepts"))
        for command in (
            ["extract", images, store, *model, "--layer", "2", *options],
            ["encode", tiny_run, store, codes],
            ["analyze", codes, concepts[name], "--n-gallery", "0"],
        ):
            done = ask(*command)
            assert done.exit_code == 0, done.output
    out = tmp_path / "x.json"
    check_refused(ask("compare", concepts["base"], concepts["elsewhere"], out), "have different images", out)
    check_refused(ask("compare", concepts["adapted"], concepts["base"], out), "must belong to the base model", out)
    options = ["--second-run", tiny_run]
    check_refused(ask("compare", concepts["base"], concepts["adapted"], out, *options), "is the run of the", out)
    options = ["--second-run", tmp_path / "nowhere"]
    check_refused(ask("compare", concepts["base"], concepts["adapted"], out, *options), "does not exist", out)
    done = ask(
        "--json", "compare", concepts["base"], concepts["adapted"], out, "--k", "2", "--n-top", "2", "--n-seeds", "2",
        "--on-seen", "use",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert set(found) == {"out", "page", "conclusion", "seen"}
    (seen,) = found["seen"]
    assert (seen["n"], seen["of"], seen["used"], seen["known_by"]) == (71, 75, True, "unknown")  # who made maple.tar?
    assert json.loads(out.read_text())["settings"]["n_seeds"] == 2
    assert Path(found["page"]).read_text().startswith("<!doctype html>")
