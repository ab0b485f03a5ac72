"""What a store was extracted from, and where that lies now: its images and its model.

In: an activation store and, where things moved, new paths. Out: paths that exist, or both towers, their identity
checked against the store's.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actcache.artifacts import Artifact, is_remote, relative_path
from actcache.errors import SettingsError

if TYPE_CHECKING:
    pass


def find_origin(artifact: Artifact, name: str, given: str | None = None) -> str:
    """`model`, `pretrained`, `prompts` or `masks`, as `extract` was given it; a path that was relative is made whole.

    Raises:
        SettingsError: the store does not say, or the file is not there any more.
    """
    if given is not None:
        return given
    value = artifact.provenance.get("paths", {}).get(name)
    if value is None:
        raise SettingsError(f"{artifact.path} does not say what it was extracted with. Give --{name}.")
    return whole_path(artifact, name, value)


def whole_path(artifact: Artifact, name: str, value: str) -> str:
    """A remembered value; a path beside the store, which begins with `..`, from here. Raises SettingsError."""
    if not value.startswith(".."):
        return value
    place = os.path.normpath(artifact.path.absolute() / value)
    if not os.path.exists(place):
        raise SettingsError(f"{place} is not there any more. Say with --{name} what the store was extracted with.")
    return place


def find_image_source(artifact: Artifact, images: str | Path | None = None) -> str | Path:
    """Where the images are. Raises SettingsError when they are not there any more."""
    source = images or artifact.parent_path("images")
    if not os.path.exists(source):
        raise SettingsError(f"{source} is not there any more. Say with --images where the images are.")
    return source


def remember_paths(store: Path, **given: Any) -> dict[str, Any]:
    """Where files lay, relative to the store, so that a repair finds them; like parents, they may have moved."""

    def relative(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [relative(member) for member in value]
        there = value is not None and not is_remote(store) and Path(value).exists()
        return relative_path(Path(value), store) if there else (value if value is None else str(value))

    return {name: relative(value) for name, value in given.items() if value}
