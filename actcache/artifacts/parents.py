"""Parents: the artifacts and images that an artifact was made from, found where they lie now, and checked.

An artifact is known by its id, so it may lie anywhere; `places.py` says where to look.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from actcache.artifacts.files import artifact_path, is_remote
from actcache.artifacts.opening import Artifact, Kind, open_artifact
from actcache.artifacts.places import exists, recorded_places
from actcache.errors import ArtifactNotFoundError, ParentMismatchError, PipelineError

_KINDS: Mapping[str, Kind] = {"store": "acts", "run": "run", "codes": "codes"}


def find_parent(child: Artifact, name: str, given: str | Path | None = None, *, has_flag: bool = False) -> Path:
    """Where parent `name` of an artifact lies now; its id is checked.

    Args:
        given: its path, or the folder that holds it under its old name. By default it is looked for where the artifact
            was made from it: by its relative path, then by its absolute path.
        has_flag: whether the verb takes its path as --store, --run or --codes, so that an error may advise to give it.

    Raises:
        ArtifactNotFoundError: it is not there.
        ParentMismatchError: another artifact is there.
        SchemaError, CorruptError: as `open_artifact`.
    """
    word, recorded = name.split()[0], child.parent(name).path  # `store 2` is a store, too
    if given is not None:
        folder = artifact_path(given)
        places = [folder, *([] if is_remote(folder) else [folder / os.path.basename(os.path.normpath(recorded))])]
    else:
        places = recorded_places(child.path, "parents", name, recorded)
    if not places:
        raise ArtifactNotFoundError(
            f"{child.path} was made from {name} {recorded}, which lies on other storage and is read only on request. "
            + (f"Name it with --{word}." if has_flag else "Make the artifact again from a copy on its own storage.")
        )
    refusals: list[PipelineError] = []
    for place in places:
        try:
            check_parent(child, name, open_artifact(place, _KINDS.get(word)))
        except PipelineError as error:
            refusals.append(error)
        else:
            return place
    telling = next((error for error in refusals if not isinstance(error, ArtifactNotFoundError)), refusals[0])
    if given is not None or not isinstance(telling, ArtifactNotFoundError):
        raise telling
    raise ArtifactNotFoundError(
        f"{telling} {child.path} was made from it; move it back"
        + (f", or name its new path with --{word}." if has_flag else ".")
    ) from telling


def check_parent(child: Artifact, name: str, parent: Artifact) -> None:
    """Raise ParentMismatchError unless `child` was made from `parent`."""
    expected = child.parent(name)
    if expected.id != parent.id:
        raise ParentMismatchError(
            f"{child.path} was made from {name} {expected.id} (recorded at {expected.path}), but {parent.path} is "
            f"{parent.id}. Give the {name} that it was made from."
        )


def find_images_of(child: Artifact, name: str, uris: Iterable[str] = ()) -> Path | None:
    """Where the images of an artifact lie now, or None.

    Args:
        name: of the parent, e.g. `images` or `images 2`.
        uris: of some of the images. A folder that holds one of them is preferred to one that holds other files.
    """
    there = [place for place in recorded_places(child.path, "parents", name, child.parent(name).path) if exists(place)]
    known = [uri for uri in uris if isinstance(uri, str)]
    return min(there, key=lambda place: not any(exists(place / uri) for uri in known), default=None)
