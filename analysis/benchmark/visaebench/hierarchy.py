"""Groups of sibling classes, from a JSON file.

{"finch": ["brambling", "goldfinch"], ...}          classes by the name of their label
{"finch": [10, 11], ...}                            or by its number
{"sibling_groups": {"finch": {"class_indices": [10, 11], "hierarchy_depth": 1}, ...}}       the package's own file
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from actcache import SettingsError

FORM = 'Write {"group": ["class", ...], ...} with the names of the labels.'


class Group(NamedTuple):
    """Sibling classes, by the name or the number of their label."""

    name: str
    classes: tuple[str | int, ...]
    depth: int = 1


def read_hierarchy(path: str | Path) -> tuple[Group, ...]:
    """Read a file of groups. Raises SettingsError where it is missing, or is something else."""
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise SettingsError(f"--hierarchy {path} could not be read ({error.strerror or error}).") from error
    except ValueError as error:
        raise SettingsError(f"--hierarchy {path} is not a JSON file ({error}). {FORM}") from error
    if isinstance(content, dict) and isinstance(content.get("sibling_groups"), dict):
        content = content["sibling_groups"]
    if not isinstance(content, dict) or not content:
        raise SettingsError(f"--hierarchy {path} holds no groups. {FORM}")
    groups = []
    for name, given in content.items():
        depth, classes = 1, given
        if isinstance(given, dict):
            depth, classes = given.get("hierarchy_depth", 1), given.get("class_indices")
        fits = isinstance(classes, list) and all(
            isinstance(each, str | int) and not isinstance(each, bool) for each in classes
        )
        if not fits or not isinstance(depth, int):
            raise SettingsError(f"--hierarchy {path}: the group {name!r} is not a list of classes. {FORM}")
        groups.append(Group(name, tuple(classes), depth))
    return tuple(groups)


def number_groups(groups: tuple[Group, ...], names: Mapping[int, str]) -> dict[str, tuple[tuple[int, ...], int]]:
    """The groups with their classes by number: name -> (numbers, depth).

    A number that no image has is left out later, as in the package, whose file is about all of ImageNet.

    Args:
        names: number -> name of the classes of the images.

    Raises:
        SettingsError: a name that no image has.
    """
    number = {name: each for each, name in names.items()}
    unknown = [each for group in groups for each in group.classes if isinstance(each, str) and each not in number]
    if unknown:
        shown = ", ".join(dict.fromkeys(unknown[:5]))
        known = ", ".join(list(number)[:5])
        raise SettingsError(
            f"--hierarchy names classes that no image has, such as {shown}; write them as the label names of the "
            f"images, such as {known}"
        )
    return {
        group.name: (tuple(number[each] if isinstance(each, str) else each for each in group.classes), group.depth)
        for group in groups
    }
