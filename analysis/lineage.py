"""Where an artifact's parents lie now (its runs, stores and images), and which images of codes were learned from."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from actcache import (
    ActivationStore,
    ArtifactNotFoundError,
    IncompleteError,
    ParentMismatchError,
    PipelineError,
    SettingsError,
    open_stores,
)
from actcache.artifacts import Artifact, exists, find_images_of, find_parent, open_artifact
from actcache.seen import Seen
from actcache.store import StoreGroup, Stores
from saetrain import CodeStore, Run

N_URIS = 3
"""Images by which a folder is recognized."""


def seen_in_codes(codes: CodeStore) -> Seen:
    """Which images of codes their run, and the model behind them, have learned from, as the codes recorded it.

    Codes made before this was recorded say that it is unknown, and no image counts as learned from.
    """
    by = f"run {Path(codes.artifact.parent('run').path).name}"
    if codes.seen is None:
        return Seen(np.zeros(codes.n_images, dtype=bool), (by,), "unknown")
    return Seen(codes.seen & codes.valid, (by,))


def name_parents(runs: Sequence[Run], store: StoreGroup, codes: CodeStore | None = None) -> dict[str, Artifact]:
    """The parents that a result names: run, run 2, ..., store, store 2, ..., codes."""
    parents = {_numbered("run", i): run.artifact for i, run in enumerate(runs)}
    parents |= {_numbered("store", i): member.artifact for i, member in enumerate(store.stores)}
    return parents if codes is None else {**parents, "codes": codes.artifact}


def _numbered(name: str, index: int) -> str:
    return name if index == 0 else f"{name} {index + 1}"


def find_runs(path: Run | str | Path) -> list[Run]:
    """A run, or all runs in the folder of a sweep, sorted by name. Raises ArtifactNotFoundError if there is none."""
    if isinstance(path, Run):
        return [path]
    members = sorted(file.parent for file in Path(path).glob("*/artifact.json"))
    if members and not (Path(path) / "artifact.json").exists():
        return [Run.open(member) for member in members]
    return [Run.open(path)]


def open_parents(codes: CodeStore, store: str | Path | None = None, *, has_flag: bool = False) -> StoreGroup:
    """The activation stores that codes were made from, as one.

    Args:
        store: where the store lies now, if it has moved; the folder that holds them, if there are several.
        has_flag: see `find_parent`.

    Raises:
        SettingsError: the path of one store for the codes of several. ArtifactNotFoundError, ParentMismatchError.
    """
    names = [name for name in codes.artifact.parents if name.split()[0] == "store"]
    if store is not None and len(names) > 1 and exists(Path(store) / "artifact.json"):
        raise SettingsError(
            f"{codes.path} was made from {len(names)} stores, but --store names one of them. Name the folder that "
            "holds all of them."
        )
    places = [find_parent(codes.artifact, name, store, has_flag=has_flag) for name in names]
    return open_stores([ActivationStore.open(place) for place in places])


def open_same_images(rows: CodeStore | StoreGroup, other: Stores | StoreGroup, *, flag: str = "--with") -> StoreGroup:
    """The activations of the images of codes, or of a store, by another model, row by row the same images.

    Args:
        flag: the flag that gave the other store, for errors.

    Raises:
        ParentMismatchError: other images or another order, or some that could be read for the first only.
    """
    store = open_stores(other)
    rows_id = str(rows.artifact.settings["rows_id"]) if isinstance(rows, CodeStore) else rows.rows_id
    if store.rows_id != rows_id:
        raise ParentMismatchError(
            f"{flag} {store.path} holds other images than {rows.path}, or in another order. Extract it from the same "
            "images, with the same --seed and --limit."
        )
    if n_missing := int((rows.valid & ~store.valid).sum()):
        raise ParentMismatchError(
            f"{flag} {store.path} lacks {n_missing:,} images of {rows.path}, because they could not be read. "
            "Extract it again once they can be."
        )
    return store


def image_stores(codes: CodeStore) -> NDArray[np.int64]:
    """[I]: number of the store that each image belongs to, counted from 0."""
    if "store" not in codes.images.column_names:
        return np.zeros(codes.n_images, dtype=np.int64)
    return np.asarray(codes.images["store"].to_numpy(), dtype=np.int64)


def source_columns(codes: CodeStore) -> dict[str, str]:
    """The columns that were chosen when the images were extracted, see `ImagePlan.columns`."""
    columns = codes.artifact.provenance.get("source", {}).get("columns", {})
    return {str(name): str(column) for name, column in columns.items()} if isinstance(columns, dict) else {}


class ImagePlaces(NamedTuple):
    """Where the images of codes lie now.

    Attributes:
        folders: the folder, table or tar of each store that the codes were made from; None if it cannot be found.
        stores: [I] number of the store that each image belongs to, as `image_stores` gives it.
    """

    folders: tuple[Path | None, ...]
    stores: NDArray[np.int64]

    def all_there(self) -> bool:
        return all(folder is not None and exists(folder) for folder in self.folders)


def find_images(codes: CodeStore, *, images: str | Path | None = None, store: str | Path | None = None) -> ImagePlaces:
    """Find the images of codes: where the codes remember them, and where their activation stores do.

    Args:
        images: the path, if the caller knows it; with several sources, the folder that holds each under its name.
        store: where the activation store of the codes (the first of several) lies, if it has moved.

    Raises:
        ParentMismatchError: `store` is not the store that the codes were made from.
    """
    names = [name for name in codes.artifact.parents if name.split()[0] == "images"] or ["images"]
    numbers = image_stores(codes)
    if images is not None:
        inside = [Path(images) / Path(codes.artifact.parent(name).path).name for name in names]
        folders = [place if len(names) > 1 and exists(place) else Path(images) for place in inside]
        return ImagePlaces(tuple(folders), numbers)
    uris = codes.images["uri"]
    places: list[Path | None] = []
    for number, name in enumerate(names):
        first = int(np.argmax(numbers == number))
        known = uris.slice(first, N_URIS).to_pylist()
        place = find_images_of(codes.artifact, name, known)
        origin = _find_store(codes, name.replace("images", "store"), store if number == 0 else None)
        if origin is not None and (place is None or (store is not None and number == 0)):
            place = find_images_of(origin, "images", known) or place
        places.append(place)
    return ImagePlaces(tuple(places), numbers)


def _find_store(codes: CodeStore, name: str, given: str | Path | None) -> Artifact | None:
    """The activation store of codes, if it can be found. Raises what `find_parent` raises for a given path."""
    try:
        return open_artifact(find_parent(codes.artifact, name, given), "acts")
    except PipelineError:
        if given is not None:
            raise
        return None


def find_run(codes: CodeStore, run: str | Path | None = None) -> Run | str:
    """The run that made the codes, or the reason why it is not available.

    Raises ParentMismatchError, and what `Run.open` raises, for a run that the caller gave.
    """
    if run is not None:
        return Run.open(find_parent(codes.artifact, "run", run))
    try:
        return Run.open(find_parent(codes.artifact, "run"))
    except (ArtifactNotFoundError, IncompleteError, ParentMismatchError):
        return f"the run that made the codes is no longer at {codes.artifact.parent('run').path}"
