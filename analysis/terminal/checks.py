"""Checks of single arguments before a verb loads anything heavy: what must be there, and how a value must be spelled.

A check stands in the annotation of an argument, or beside the name of a field in FIELDS. It takes the name of the
argument as people write it, and the value. Everything that takes a glance belongs here, so that a wrong path is
reported at once, and not after torch was loaded; the library checks again, and more.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer

from actcache.artifacts import ARTIFACT_FILE, Kind, artifact_path, is_remote, open_artifact, read_json
from actcache.errors import ModelError, PipelineError, SchemaError, SettingsError
from actcache.hub import is_hub_address, parse_address
from actcache.text import visible

Check = Callable[[str, Any], None]

KINDS = {
    "acts": "an activation store", "run": "a run", "codes": "a code store", "concepts": "a concept table",
    "prompts": "an adapted model", "images": "a source of images", "runs": "a folder of runs",
}  # fmt: skip
"""How messages name what a path is."""

TABLES = (".csv", ".tsv", ".parquet", ".tar")


def find_kind(path: str | Path) -> str | None:
    """What is at a path: a kind of artifact, `runs` (a folder of them), `images`, or None. Reads one file at most."""
    try:
        place = Path(path)
        for folder in (place, *sorted(file.parent for file in place.glob(f"*/{ARTIFACT_FILE}"))[:1]):
            if (folder / ARTIFACT_FILE).is_file():
                kind = str(read_json(folder / ARTIFACT_FILE).get("kind"))
                return kind if folder == place else "runs" if kind == "run" else None
        return "images" if place.is_dir() or place.suffix.lower() in TABLES else None
    except (OSError, ValueError, AttributeError, PipelineError):
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Paths


@dataclass(frozen=True)
class Takes:
    """The path of an artifact of a kind; with `folders`, a folder of such artifacts will do. URLs are not followed.

    A run may lie on the Hugging Face hub: `with_flags` replaces its address by the folder of what was downloaded.
    """

    kind: Kind | None
    folders: bool = False

    def __call__(self, name: str, value: str | Path) -> None:
        if is_hub_address(value):
            address = parse_address(value)
            if self.kind != "run":
                wanted = KINDS[self.kind] if self.kind else "an artifact"
                raise SettingsError(f"{address} is on the Hugging Face hub. Expected {wanted} here; give its path.")
            return
        path = artifact_path(value)
        if is_remote(path) or (self.folders and not (path / ARTIFACT_FILE).exists() and find_kind(path) == "runs"):
            return
        open_artifact(path, self.kind)


@dataclass(frozen=True)
class Makes:
    """Where an artifact will be: nothing, an empty folder, or an artifact of this kind."""

    kind: Kind

    def __call__(self, name: str, value: str | Path) -> None:
        path = artifact_path(value)
        if is_remote(path) or not path.exists():
            return
        if not path.is_dir():
            raise SettingsError(f"{path} is a file. Expected a new or empty directory; choose another path.")
        if (path / ARTIFACT_FILE).is_file() and (kind := find_kind(path)) in KINDS and kind != self.kind:
            raise SettingsError(f"{path} is {KINDS[kind]}, and {name} would replace it. Choose another path.")


@dataclass(frozen=True)
class Writes:
    """A file to write, whose suffix decides what it holds."""

    suffixes: tuple[str, ...]

    def __call__(self, name: str, value: str | Path) -> None:
        path = Path(value)
        if path.suffix.lower() not in self.suffixes:
            example = path.with_suffix(self.suffixes[0]).name if path.name else f"result{self.suffixes[0]}"
            *others, last = self.suffixes
            wanted = f"{', '.join(others)} or {last}" if others else last
            raise typer.BadParameter(f"{name} must end in {wanted} (e.g. {example}), got {path.name!r}.")
        if path.is_dir():
            raise SettingsError(f"{path} is a folder. Expected a file such as {path / ('result' + self.suffixes[0])}.")


@dataclass(frozen=True)
class Reads:
    """A file or folder that must be there. `words` are values that are no paths."""

    what: str = "a file"
    folder: bool | None = False  # None: either will do
    words: tuple[str, ...] = ()

    def __call__(self, name: str, value: str | Path) -> None:
        if str(value) in self.words or "://" in str(value):
            return
        path = Path(value)
        if not path.exists():
            words = f"{', '.join(self.words)} or " if self.words else ""
            raise SettingsError(f"{name} {value} does not exist. Expected {words}{self.what}; check the path.")
        if self.folder is not None and path.is_dir() != self.folder:
            raise SettingsError(f"{name} {value} is a {'folder' if path.is_dir() else 'file'}. Expected {self.what}.")


@dataclass(frozen=True)
class Publishes:
    """Where something is published: an address of the hub, or where a local folder is or will be."""

    def __call__(self, name: str, value: str) -> None:
        if is_hub_address(value):
            parse_address(value)
        elif Path(value).is_file():
            raise SettingsError(f"{value} is a file. Give a new or empty folder, or one of published SAEs.")


def takes_images(name: str, value: str | Path) -> None:
    """A folder, table or archive of images."""
    path = Path(value)
    if not path.exists() or not (path.is_dir() or path.suffix.lower() in TABLES):
        from actcache.sources import open_source  # it says what was expected

        open_source(path)
    if (kind := find_kind(value)) in KINDS and kind not in ("images", "runs"):
        raise SettingsError(f"{value} is {KINDS[kind]}. Expected images; check the order of the arguments.")


def takes_run_or_concepts(name: str, value: str | Path) -> None:
    """What can be published."""
    if open_artifact(value).kind not in ("run", "concepts"):
        raise SchemaError(f"{value} is neither a run nor a concept table (x.concepts). Give one of these.")


def takes_result(name: str, value: str | Path) -> None:
    """A result file, or prompts, whose accuracies a report shows."""
    if Path(value).is_dir():
        open_artifact(value, "prompts")
    else:
        Reads("the JSON file of a measuring verb, or x.prompts")(name, value)


# ---------------------------------------------------------------------------------------------------------------------
# Values


@dataclass(frozen=True)
class OneOf:
    choices: Collection[str]

    def __call__(self, name: str, value: str) -> None:
        if value not in self.choices:
            raise SettingsError(f"{name} must be one of {', '.join(self.choices)}, got {value!r}.")


def at_least_one(name: str, value: float) -> None:
    if value < 1:
        raise SettingsError(f"{name} must be at least 1, got {value}.")


def takes_device(name: str, value: str) -> None:
    if not re.fullmatch(r"auto|(cpu|cuda|mps|xpu|hpu|meta)(:\d+)?", value):
        raise SettingsError(f"{name} must be auto, cpu, cuda, cuda:NUMBER or mps, got {value!r}.")


def takes_address(name: str, value: str) -> None:
    if not re.fullmatch(r"[a-z]+://\S+|\S+:\d+", value):
        raise SettingsError(f"{name} must be an address such as tcp://10.0.0.1:8786, got {value!r}.")


def takes_templates(name: str, value: str) -> None:
    if value not in ("photo", "simple", "openai") and "{}" not in value and not Path(value).is_file():
        raise SettingsError(
            f"{name} must be photo, simple, openai, a text that contains {{}}, or a file of such texts, got {value!r}."
        )


def takes_template(name: str, value: str) -> None:
    if "{}" not in value:
        raise SettingsError(f"{name} must contain {{}}, which stands for the word, got {value!r}.")


def takes_model(name: str, value: str) -> None:
    """An architecture that open_clip lists, or a path. Its list is read from its folder, which does not load torch."""
    if value.lower().endswith(".json"):
        Reads("an open_clip config JSON")(name, value)
    elif not re.search(r"[:/\\]", value) and not Path(value).exists():
        package = find_spec("open_clip")
        folder = Path(package.origin).parent / "model_configs" if package and package.origin else Path("nowhere")
        known = {file.stem for file in folder.glob("*.json")}
        if known and value.replace("/", "-") not in known:
            from difflib import get_close_matches

            near = get_close_matches(value, sorted(known), 3)
            advice = f"Did you mean {' or '.join(near)}?" if near else "Give a name that open_clip lists, or a config."
            raise ModelError(f"open_clip has no model {value!r}. {advice}")


def takes_weights(name: str, value: str) -> None:
    """A tag, random:SEED, or a file; what looks like a file must be there."""
    is_path = "/" in value or Path(value).suffix.lower() in (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".npz")
    if is_path and ":" not in value and not Path(value).exists():
        raise ModelError(f"{name} {value} does not exist. Expected a checkpoint file; check the path.")


def takes_condition(name: str, value: str) -> None:
    """Refuses an empty condition; the columns are known to the verb only."""
    if not value.strip():
        raise SettingsError(f"{name} is empty. Give a condition such as \"label_name == 'cat'\", or leave it out.")


TOKENS = ("all", "patch", "cls")
PRECISIONS = ("auto", "float32", "bfloat16")
WORDS = Reads("a file with one word or phrase per line")

FIELDS: dict[str, Check] = {
    "model": takes_model, "pretrained": takes_weights, "device": takes_device, "precision": OneOf(PRECISIONS),
    "tokens": OneOf(TOKENS), "templates": takes_templates, "template": takes_template, "not_in": Takes("acts"),
    "prompts": Reads("x.prompts or a checkpoint", folder=None), "masks": Reads("a folder of PNG masks", folder=True),
    "legend": Reads("a .csv or .parquet table"), "pairs": Reads("a .csv or .parquet table"),
    "hierarchy": Reads("a JSON file"), "transfer": Takes("acts"), "embeddings": Takes("acts"),
    "protocol": OneOf(("visaebench",)),
    "classes": OneOf(("all", "base", "novel")),
    "explain": OneOf(("label", "model", "zero-shot", "probe", "head")),
    "judge": OneOf(("auto", "zero-shot", "probe", "head")), "probe_store": Takes("acts"),
    "probe_where": takes_condition, "score": OneOf(("mean", "max")), "where": takes_condition,
    "group": takes_condition, "versus": takes_condition, "chosen_where": takes_condition, "batch_size": at_least_one,
}  # fmt: skip
"""Checks of the fields of configurations, by their names."""


# ---------------------------------------------------------------------------------------------------------------------
# Arguments that are missing, or were cut by the shell

CONDITIONS = ("--where", "--group", "--versus", "--chosen-where", "--probe-where")
_OPERATORS = ("==", "!=", "<", "<=", ">", ">=", "=", "in", "not", "is", "and", "or")


def find_unquoted(args: list[str]) -> str | None:
    """What to say where the shell cut a condition into words, because it was not quoted; None where it was not."""
    for place, word in enumerate(args):
        flag, equals, value = word.partition("=")
        if flag not in CONDITIONS:
            continue
        rest = [value, *args[place + 1 :]] if equals else args[place + 1 :]
        first = rest[0] if rest else ""
        if len(rest) > 1 and (first == "not" or (first.isidentifier() and rest[1] in _OPERATORS)):
            condition = visible(" ".join(rest[: 2 if first == "not" else 3]))
            return f'{flag} must be quoted, because the shell cuts it at the spaces: {flag} "{condition}".'
    return None


def explain_missing(roles: list[tuple[str, str | None]], values: list[str]) -> str:
    """Which arguments are missing, judged by what is at the paths that were given.

    Args:
        roles: (name, kind of artifact) of each argument of the verb, in order.
    """
    kinds = {value: find_kind(value) for value in values}
    missing, unknown = dict(roles), []
    for value, kind in kinds.items():
        kind = "run" if kind == "runs" else kind
        role = next((name for name, wanted in missing.items() if wanted is not None and wanted == kind), None)
        if role is None:
            unknown.append(value)
        else:
            del missing[role]
    for _ in unknown:  # what is not there yet is what the verb shall write, which comes last
        if len(missing) > 1 or not values:
            missing.popitem()
    given = ", ".join(
        f"{visible(value)} is {KINDS[kind]}"
        if kind in KINDS
        else f"{visible(value)} {'is no artifact' if Path(value).exists() else 'does not exist'}"
        for value, kind in kinds.items()
    )
    names = " and ".join(f"{name} ({KINDS[kind]})" if kind in KINDS else name for name, kind in missing.items())
    order = " ".join(name for name, _ in roles)
    return f"Missing argument {names}. {given + '. ' if given else ''}Expected {order}."
