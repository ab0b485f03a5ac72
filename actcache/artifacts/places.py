"""Places: at which paths the artifacts, images and files that an artifact was made from may lie now.

An artifact records each of them by id and by a path relative to itself, which holds while both move together, and
beside the seal, in `places.json`, by its absolute path, which holds while only the child moves. Both are tried. The
absolute paths are this machine's: they enter neither an identity nor a checksum, and the file may be deleted.

Promise: nothing outside the file system of the artifact is looked at because a file says so. What lies on another host,
in another bucket or on another kind of storage has to be named by the user.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from actcache.artifacts.files import artifact_path, digest, is_remote, read_signed
from actcache.errors import CorruptError

PLACES_FILE = "places.json"
"""Absolute paths of what an artifact was made from: {"parents": {name: path}, "paths": {name: path}, "digest"}."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)|hf-hub:", re.ASCII)


def relative_path(where: Path, child: Path) -> str:
    """The path of a parent as an artifact at `child` records it: relative, or a URL across file systems."""
    if is_remote(where) or is_remote(child):
        return str(where)
    return os.path.relpath(where.absolute(), child.absolute())


def list_places(path: Path, parents: Mapping[str, Path], provenance: Mapping[str, object]) -> dict[str, object]:
    """The content of places.json for an artifact at `path`; what is not on this machine's disk, or stands for
    nothing inside of the artifact, is left out.
    """
    outside = {name: where for name, where in parents.items() if not is_remote(where) and where.parent != path}
    places = {name: str(where.absolute()) for name, where in outside.items()}
    recorded = provenance.get("paths")
    paths = recorded.items() if isinstance(recorded, dict) else ()
    relative = {name: str(value).removeprefix("local-dir:") for name, value in paths if not is_remote(path)}
    files = {name: _resolve(path, value) for name, value in relative.items() if value.startswith("..")}
    fields = {"parents": places, "paths": {name: str(file) for name, file in files.items()}}
    return {**fields, "digest": digest(fields)}


def is_elsewhere(child: Path, recorded: str) -> bool:
    """Whether a recorded path is a URL of another host, bucket or kind of storage than the artifact's own."""
    if not _URL.match(recorded):
        return False
    if not is_remote(child):
        return True
    own, other = urlsplit(str(child)), urlsplit(recorded)
    return "::" in recorded or (own.scheme, own.netloc) != (other.scheme, other.netloc)


def recorded_places(child: Path, group: str, name: str, recorded: str) -> list[Path]:
    """The paths at which something may lie, the likeliest first; none if it is elsewhere.

    Args:
        child: path of the artifact.
        group: `parents`, or `paths` for the files in the provenance.
        recorded: the path in artifact.json.
    """
    if is_elsewhere(child, recorded):
        return []
    places = [artifact_path(recorded) if is_remote(child) else _resolve(child, recorded)]
    absolute = _read_places(child, group).get(name)
    if isinstance(absolute, str) and os.path.isabs(absolute) and "\0" not in absolute:
        places.append(Path(absolute))
    return list(dict.fromkeys(places))


def exists(path: Path) -> bool:
    """Whether something is at a path, which may come from a file that says anything."""
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long, or no permission
        return False


def _resolve(child: Path, recorded: str) -> Path:
    return Path(os.path.normpath(child.absolute() / recorded))


def _read_places(child: Path, group: str) -> Mapping[str, object]:
    """The absolute paths that an artifact remembers; none where the file is damaged, because it is only a hint."""
    try:
        paths = read_signed(child / PLACES_FILE, "Delete it.").get(group)
    except CorruptError:
        return {}
    return paths if isinstance(paths, dict) else {}
