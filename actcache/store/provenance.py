"""What a store was extracted from, and where that is now: its images and its model.

In: an activation store, and new paths for what has moved. Out: paths that exist.
"""

import os
from pathlib import Path
from typing import Any

from actcache.artifacts import Artifact, is_remote, relative_path
from actcache.errors import SettingsError

LOCAL = "local-dir:"
"""The prefix of a model's folder, which stays before the path."""


def find_origin(artifact: Artifact, name: str, given: str | None = None) -> str:
    """The value of `model`, `pretrained`, `prompts` or `masks` that `extract` was given, as a path that exists now.

    Raises:
        SettingsError: the store did not record it, or the file is no longer there.
    """
    if given is not None:
        return given
    value = artifact.provenance.get("paths", {}).get(name)
    if value is None:
        raise SettingsError(
            f"{artifact.path} does not record which {name} it was extracted with. Name it with --{name}."
        )
    return whole_path(artifact, name, value)


def whole_path(artifact: Artifact, name: str, value: str) -> str:
    """A recorded value; a path relative to the store (it begins with `..`) is made absolute. Raises SettingsError."""
    prefix = LOCAL if value.startswith(LOCAL) else ""
    value = value.removeprefix(prefix)
    if not value.startswith(".."):
        return prefix + value
    place = os.path.normpath(artifact.path.absolute() / value)
    if not os.path.exists(place):
        raise SettingsError(f"{place} no longer exists. Give its new path with --{name}.")
    return prefix + place


def find_image_source(artifact: Artifact, images: str | Path | None = None) -> str | Path:
    """Where the images are. Raises SettingsError when they are no longer there."""
    source = images or artifact.parent_path("images")
    if not os.path.exists(source):
        raise SettingsError(f"{source} no longer exists. Give the new path of the images with --images.")
    return source


def remember_paths(store: Path, **given: Any) -> dict[str, object]:
    """Paths of files relative to the store, from which `repair` finds them. Like parents, they may move later."""

    def relative(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [relative(member) for member in value]
        if value is None:
            return None
        prefix = LOCAL if str(value).startswith(LOCAL) else ""
        place = str(value).removeprefix(prefix)
        there = not is_remote(store) and Path(place).exists()
        return prefix + (relative_path(Path(place), store) if there else place)

    return {name: relative(value) for name, value in given.items() if value}
