"""The house: imports point one way, one library has one room, front doors list exactly what they give, and the
command line starts without the heavy libraries."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("actcache", "saetrain", "analysis")
RANK = {"actcache": 0, "saetrain": 1, "analysis": 2, "cli": 3}

ROOMS = {
    "open_clip": {
        "actcache/clip_model", "actcache/vision_tower", "actcache/text_tower", "actcache/plan",
        "actcache/demo/training",
    },
    "PIL": {"actcache/images", "actcache/demo/dataset", "analysis/gallery", "analysis/sheet"},
    "zarr": {
        "actcache/writer", "actcache/leftovers", "actcache/zarr_arrays", "actcache/codecs", "saetrain/code_writer",
    },
    "numcodecs": {"actcache/codecs"},
    "torch": {
        "actcache/clip_model", "actcache/vision_tower", "actcache/text_tower", "actcache/extraction", "actcache/plan",
        "actcache/demo/training",
        "actcache/prompts", "actcache/prompted_towers", "actcache/prompt_checkpoints",
        "actcache/prompt_training", "actcache/adaptation",
        "actcache/origin",
        "analysis/crossover", "analysis/two_dictionaries",
        "analysis/attribution", "analysis/dictionary", "analysis/embeddings", "analysis/fidelity",
        "analysis/intervention", "analysis/masking", "analysis/naming", "analysis/outcomes", "analysis/predictions",
        "analysis/sparse_coding",
        "analysis/splicing", "analysis/steering", "analysis/zero_shot",
        "saetrain/conversion", "saetrain/encoding", "saetrain/preselection",
        "saetrain/interop/dictionary_learning", "saetrain/interop/files",
        "saetrain/interop/foreign", "saetrain/interop/patchsae", "saetrain/interop/prisma", "saetrain/interop/saelens",
        "saetrain/interop/saev", "saetrain/interop/sparsify", "saetrain/loader", "saetrain/metrics",
        "saetrain/objective", "saetrain/optimizer",
        "saetrain/processes", "saetrain/revival", "saetrain/run", "saetrain/sae", "saetrain/selection",
        "saetrain/sparse", "saetrain/trainer", "saetrain/trackers", "saetrain/training",
    },
    "wandb": {"saetrain/trackers"},
    "scipy": {"analysis/dictionary", "analysis/rule_learning"},
    "sklearn": {"analysis/rules"},
    "torchvision": {"actcache/plan"},
    "safetensors": {
        "analysis/geometry",
        "actcache/demo/training", "actcache/prompt_artifact", "actcache/prompt_training",
        "saetrain/conversion", "saetrain/interop/files", "saetrain/interop/saelens",
        "saetrain/interop/sparsify", "saetrain/run", "saetrain/sae", "saetrain/training",
    },
    "dask": {
        "analysis/entries", "analysis/geometry", "analysis/join", "analysis/monosemanticity", "analysis/reduction",
    },
    "distributed": {"analysis/join"},
    "bokeh": {"analysis/overview", "analysis/page"},
    "jinja2": {"analysis/page"},
    "datasets": {"actcache/sources/hugging_face"},
    "upath": {"actcache/files"},
    "typer": {"cli"},
    "rich": {"cli"},
}  # fmt: skip


def modules() -> dict[str, Path]:
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    return {str(file.relative_to(ROOT).with_suffix("")): file for file in [*files, ROOT / "cli.py"]}


def imported(file: Path) -> set[str]:
    """Dotted names a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return names


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_left_and_go_through_the_front_door(name: str) -> None:
    home = name.split("/")[0]
    for target in imported(modules()[name]):
        package = target.split(".")[0]
        if package not in RANK or package == home:
            continue
        assert RANK[package] < RANK[home], f"{name} imports {target}, to its right"
        light = home == "cli" and target in (
            "actcache.errors",
            "actcache.prompt_config",
            "saetrain.config",
        )  # before any verb is chosen
        assert "." not in target or target == "actcache.demo" or light, f"{name} goes past {package}'s front door"


@pytest.mark.parametrize("library", sorted(ROOMS))
def test_a_library_is_imported_in_its_rooms_only(library: str) -> None:
    users = {name for name, file in modules().items() if any(t.split(".")[0] == library for t in imported(file))}
    assert users == ROOMS[library]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_front_door_gives_exactly_what_it_lists(package: str) -> None:
    door = importlib.import_module(package)
    listed = ast.literal_eval(
        next(
            node.value
            for node in ast.parse((ROOT / package / "__init__.pyi").read_text()).body
            if isinstance(node, ast.Assign)
        )
    )
    assert sorted(door.__all__) == sorted(listed)
    for name in listed:
        value = getattr(door, name)
        assert not isinstance(value, type(sys)), f"{package}.{name} is a module"


def test_modules_stay_small() -> None:
    sizes = {name: len(file.read_text().splitlines()) for name, file in modules().items() if name != "cli"}
    assert {name: n for name, n in sizes.items() if n > 400} == {}


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout


HEAVY = "{'torch', 'zarr', 'dask', 'open_clip', 'pyarrow', 'bokeh'} & set(sys.modules)"


def test_the_command_line_starts_without_heavy_libraries() -> None:
    assert run_python(f"import sys, cli; print({HEAVY})").strip() == "set()"


def test_reading_needs_no_torch() -> None:
    code = (
        "import sys; from actcache import ActivationStore, verify, describe; from saetrain import CodeStore, Run; "
        "from analysis import ConceptTable, analyze, query_latent, write_report; print('torch' in sys.modules)"
    )
    assert run_python(code).strip() == "False"
