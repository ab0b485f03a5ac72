"""The house: imports point one way, between packages and between sub-packages; a sub-package is entered by its door; a
library has its rooms; doors list exactly what they give; and the command line starts without the heavy libraries.

A *room* is a sub-package, or a module that lies directly in a package.
"""

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

ORDER = {
    "actcache": "errors interrupts machine cache_lines compiler options seen schema text progress notebook preprocess "
    "workers hook_point artifacts hub models sources store prompts extraction importing demo",
    "saetrain": "distributed config quality model metrics run data lineage training codes interop",
    "analysis": "config cosines intervals results lineage pictures heat_maps entry_kernels reduce classifier concepts "
    "query localization naming dictionary rules interventions probing benchmark comparison report views publication "
    "explore terminal arguments tour",
}
"""The rooms of each package. A room imports from rooms before it, and from packages before its own; never back."""

LIBRARIES = {
    "actcache/compiler": "numba",
    "actcache/notebook": "IPython",
    "actcache/artifacts": "fsspec google_crc32c s3fs upath",
    "actcache/hub": "huggingface_hub",
    "actcache/models": "open_clip safetensors timm torch",
    "actcache/sources": "PIL datasets",
    "actcache/store": "numcodecs zarr",
    "actcache/prompts": "safetensors torch",
    "actcache/extraction": "torch torchvision",
    "actcache/importing": "safetensors torch",
    "actcache/demo": "PIL open_clip safetensors torch",
    "saetrain/distributed": "torch",
    "saetrain/model": "safetensors torch",
    "saetrain/metrics": "torch",
    "saetrain/run": "safetensors torch",
    "saetrain/data": "torch",
    "saetrain/training": "safetensors torch wandb",
    "saetrain/codes": "torch zarr",
    "saetrain/interop": "safetensors torch",
    "analysis/pictures": "PIL",
    "analysis/reduce": "dask distributed",
    "analysis/classifier": "sklearn torch",
    "analysis/concepts": "dask safetensors",
    "analysis/query": "dask",
    "analysis/naming": "torch",
    "analysis/dictionary": "scipy torch",
    "analysis/rules": "scipy sklearn",
    "analysis/interventions": "torch",
    "analysis/benchmark": "sklearn torch",
    "analysis/comparison": "torch",
    "analysis/report": "bokeh jinja2 markupsafe",
    "analysis/publication": "PIL",
    "analysis/views": "torch",
    "analysis/explore": "openTSNE starlette torch uvicorn",
    "analysis/terminal": "rich typer",
    "analysis/arguments": "typer",
    "cli": "typer",
}
"""Which room may import which library. A room that is not listed takes the standard library and EVERYWHERE only."""

EVERYWHERE = {"numpy", "pyarrow", "lazy_loader"}
PACKAGES = (*ORDER, "cli")
ROOMS = [f"{package}/{name}" for package, names in ORDER.items() for name in names.split()] + ["cli"]
DOORS = [*ORDER, *(room.replace("/", ".") for room in ROOMS if (ROOT / room / "__init__.pyi").exists())]


def files_of(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py")) if (ROOT / room).is_dir() else [ROOT / f"{room}.py"]


@cache
def imported(file: Path) -> list[tuple[str, list[str]]]:
    """(dotted module, names) of every import anywhere in a file."""
    found: list[tuple[str, list[str]]] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append((node.module, [alias.name for alias in node.names]))
    return found


def room_of(module: str) -> str:
    """actcache.store.reader -> actcache/store; actcache -> actcache."""
    return "/".join(module.split(".")[:2])


def test_every_file_has_a_room() -> None:
    known = {file for room in ROOMS for file in files_of(room)} | {ROOT / name / "__init__.py" for name in ORDER}
    assert {file for name in ORDER for file in (ROOT / name).rglob("*.py")} - known == set()


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way_and_go_through_doors(room: str) -> None:
    home = room.split("/")[0]
    for file in files_of(room):
        for module, _ in imported(file):
            package, target = module.split(".")[0], room_of(module)
            if package not in PACKAGES or target == room:
                continue
            where = f"{file.relative_to(ROOT)} imports {module}"
            assert module.count(".") <= 1, f"{where}, past the door {target}"
            if package != home:
                assert PACKAGES.index(package) < PACKAGES.index(home), f"{where}, to its right"
            else:
                assert target in ROOMS, f"{where}: inside a package, import from a room, not from the front door"
                assert ROOMS.index(target) < ROOMS.index(room), f"{where}, which comes after it in ORDER"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_its_own_libraries_only(room: str) -> None:
    found = {module.split(".")[0] for file in files_of(room) for module, _ in imported(file)}
    found -= {*sys.stdlib_module_names, *PACKAGES, *EVERYWHERE}
    assert found == set(LIBRARIES.get(room, "").split())


@pytest.mark.parametrize("door", DOORS)
def test_a_door_gives_exactly_what_it_lists(door: str) -> None:
    opened = importlib.import_module(door)
    body = ast.parse((ROOT / door.replace(".", "/") / "__init__.pyi").read_text()).body
    listed = next(ast.literal_eval(node.value) for node in body if isinstance(node, ast.Assign))
    assert sorted(opened.__all__) == sorted(listed)
    for name in listed:
        assert not isinstance(getattr(opened, name), type(sys)), f"{door}.{name} is a module"


@pytest.mark.parametrize("door", [door for door in DOORS if "." in door])
def test_a_door_lists_only_what_others_use(door: str) -> None:
    package, name = door.split(".")
    users = [file for room in ROOMS if room != f"{package}/{name}" for file in files_of(room)]
    users += [file for folder in ("benchmarks", "docs") for file in (ROOT / folder).rglob("*.py")]
    used = {each for file in users for module, names in imported(file) if module == door for each in names}
    front = ast.parse((ROOT / package / "__init__.pyi").read_text()).body
    used |= {a.name for node in front if isinstance(node, ast.ImportFrom) and node.module == name for a in node.names}
    assert set(importlib.import_module(door).__all__) - used == set()


def annotations_of(thing: Any) -> Iterator[object]:
    """What a function takes and returns, or what a class itself holds and its public methods take and return."""
    if isinstance(thing, type):
        yield from inspect.get_annotations(thing).values()
        for name, member in vars(thing).items():
            if name in ("__init__", "__call__", "__getitem__", "__iter__") or not name.startswith("_"):
                for part in ("__func__", "fget", "fset", "func"):  # of class methods, properties, cached properties
                    yield from annotations_of(getattr(member, part, None))
                yield from annotations_of(member)
    elif callable(thing):
        yield from getattr(inspect.unwrap(thing), "__annotations__", {}).values()


@pytest.mark.parametrize("door", DOORS)
def test_no_signature_at_a_door_has_fields_that_only_its_writer_knows(door: str) -> None:
    """A record is a type. Facts that are only shown or written are dict[str, object]: nobody can compute with them."""
    opened = importlib.import_module(door)
    for name in opened.__all__:
        for annotation in annotations_of(getattr(opened, name)):
            assert "dict[str, Any]" not in str(annotation).replace("typing.", ""), name


def test_modules_stay_small() -> None:
    sizes = {file: len(file.read_text().splitlines()) for room in ROOMS[:-1] for file in files_of(room)}
    assert {str(file): n for file, n in sizes.items() if n > 400} == {}


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout


HEAVY = "{'torch', 'zarr', 'dask', 'open_clip', 'pyarrow', 'bokeh'} & set(sys.modules)"


def test_the_command_line_starts_without_heavy_libraries() -> None:
    assert run_python(f"import sys, cli; print({HEAVY})").strip() == "set()"


def test_reading_needs_no_torch() -> None:
    code = (
        "import sys; from actcache import ActivationStore, verify, describe; from saetrain import CodeStore, Run; "
        "from analysis import ConceptTable, analyze, query_latent, show_latents, write_report; "
        "print('torch' in sys.modules)"
    )
    assert run_python(code).strip() == "False"
