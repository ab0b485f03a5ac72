"""What a store was extracted from, and where that is now: its images and its model.

In: an activation store, and new paths for what has moved. Out: paths that exist.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actcache.artifacts import (
    Artifact,
    exists,
    find_images_of,
    is_elsewhere,
    is_remote,
    read_provenance,
    recorded_places,
    relative_path,
)
from actcache.errors import CorruptError, SettingsError
from actcache.store.image_table import read_images

N_URIS = 3
"""Images by which a folder is recognized."""
NO_IMAGES = "no images"
"""The path of the parent `images` of a store that was imported without them; nothing lies there."""
_NAME = re.compile(r"(timm:)?(hf-hub:[\w.-]+/)?[\w.-]+|random:\d+", re.ASCII)
_FILES = (".json", ".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz")
PREFIXES = ("timm:local-dir:", "local-dir:")
"""What stands before the folder of a model, and stays before its path."""


def find_origin(artifact: Artifact, name: str, given: str | None = None) -> str:
    """The value of `model`, `pretrained`, `prompts` or `masks` that `extract` was given, as a path that exists now.

    Raises:
        SettingsError: the store did not record it, or the file is no longer there, or it is a URL, which nothing reads
            unless the user names it.
    """
    if name == "model":
        _check_buildable(artifact)
    if given is not None:
        return given
    value = _recorded_paths(artifact).get(name)
    if not isinstance(value, str):
        raise SettingsError(
            f"{artifact.path} does not record which {name} it was extracted with. Name it with --{name}."
        )
    return whole_path(artifact, name, value)


def _check_buildable(artifact: Artifact) -> None:
    """Raise SettingsError if only the name of a store's model is known, so that no weights can be the right ones."""
    name = read_only_name(artifact)
    if name is not None:
        raise SettingsError(
            f"The activations of {artifact.path} were imported with the name of their model only ({name[:80]}), "
            "and this needs the model itself. Import them again and name its weights: `import --model --pretrained`."
        )


def read_only_name(artifact: Artifact) -> str | None:
    """The name of a store's model, if its activations were imported and nothing else is known of the model."""
    fields = artifact.settings.get("imported")
    name = fields.get("model") if isinstance(fields, dict) else None
    return None if name is None else str(name)


def _recorded_paths(artifact: Artifact) -> Mapping[str, str | tuple[str, ...]]:
    return read_provenance(artifact, _Provenance).paths


@dataclass(frozen=True)
class _Provenance:
    """What is read of the provenance: file or name -> path relative to the store, or a name such as a tag."""

    paths: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)


def recorded_name(artifact: Artifact, name: str) -> str | None:
    """The value of `model` or `pretrained` that `extract` was given, if it is a name and not a path; else None."""
    value = _recorded_paths(artifact).get(name)
    is_name = isinstance(value, str) and _NAME.fullmatch(value) and not value.lower().endswith(_FILES)
    return value if is_name and isinstance(value, str) else None


def recorded_list(artifact: Artifact, name: str) -> list[str]:
    """The values of a recorded path that may be given several times, as paths that exist now. Raises SettingsError."""
    values = _recorded_paths(artifact).get(name, ())
    flag = name.replace("_", "-")
    listed = [values] if isinstance(values, str) else list(values)
    return [whole_path(artifact, flag, value) for value in listed]


def records(artifact: Artifact, name: str) -> bool:
    """Whether a store remembers a path of this name."""
    return name in _recorded_paths(artifact)


def whole_path(artifact: Artifact, name: str, value: str) -> str:
    """A recorded value; a path relative to the store (it begins with `..`) is made absolute. Raises SettingsError."""
    if is_elsewhere(artifact.path, value):
        raise SettingsError(
            f"{artifact.path} was made with {name} {value}, which is on other storage and is read only on request. "
            f"Name it with --{name}, in a verb that has this flag."
        )
    prefix = _prefix(value)
    path = value.removeprefix(prefix)
    if not path.startswith("..") and not is_remote(artifact.path):
        return value
    places = recorded_places(artifact.path, "paths", name, path)
    there = next((place for place in places if exists(place)), None)
    if there is None and not path.startswith(".."):
        return value
    if there is None:
        raise SettingsError(
            f"{places[0]} no longer exists. Move it back, or give its new path with --{name}, "
            "in a verb that has this flag."
        )
    return f"{prefix}{there}"


def _prefix(value: str) -> str:
    return next((prefix for prefix in PREFIXES if value.startswith(prefix)), "")


def find_image_source(artifact: Artifact, images: str | Path | None = None) -> str | Path:
    """Where the images are. Raises SettingsError when they are no longer there."""
    if images is not None:
        if not exists(Path(images)):
            raise SettingsError(f"{images} does not exist. Give the path of the images with --images.")
        return images
    if artifact.parent("images").path == NO_IMAGES:
        raise SettingsError(
            f"The activations of {artifact.path} were imported without their images. "
            "Import them again and name the images: `import --images`."
        )
    place = find_images_of(artifact, "images", _some_uris(artifact))
    if place is None:
        recorded = artifact.parent("images").path
        gone = f"{recorded} lies on other storage"
        if not is_elsewhere(artifact.path, recorded):
            gone = f"{artifact.parent_path('images')} no longer exists"
        raise SettingsError(f"{gone}. Give the new path of the images with --images.")
    return place


def _some_uris(artifact: Artifact) -> list[str]:
    try:
        table = read_images(artifact.path)
        return list(table["uri"].slice(0, N_URIS).to_pylist())
    except (CorruptError, KeyError):
        return []


def remember_paths(store: Path, **given: Any) -> dict[str, object]:
    """Paths of files relative to the store, from which `repair` finds them. Like parents, they may move later."""

    def relative(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [relative(member) for member in value]
        prefix = _prefix(str(value))
        path = Path(str(value).removeprefix(prefix))
        there = value is not None and not is_remote(store) and exists(path)
        return prefix + relative_path(path, store) if there else (value if value is None else str(value))

    return {name: relative(value) for name, value in given.items() if value}
