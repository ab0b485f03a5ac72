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
    SettingsError,
    open_stores,
)
from actcache.artifacts import Artifact, check_parent, find_parent, open_artifact
from actcache.seen import Seen
from actcache.store import StoreGroup
from saetrain import CodeStore, Run


def seen_in_codes(codes: CodeStore) -> Seen:
    """Which images of codes their run, and the model behind them, have learned from, as the codes recorded it.

    Codes made before this was recorded say that it is unknown, and no image counts as learned from.
    """
    by = f"run {Path(codes.artifact.parents['run'].path).name}"
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


def open_parents(codes: CodeStore, store: str | Path | None = None) -> StoreGroup:
    """The activation stores that codes were made from, as one.

    Args:
        store: where the store lies now, if it has moved.

    Raises:
        SettingsError: one path for the codes of several stores. ArtifactNotFoundError, ParentMismatchError.
    """
    names = [name for name in codes.artifact.parents if name.split()[0] == "store"]
    if store is not None and len(names) > 1:
        raise SettingsError(
            f"{codes.path} was made from {len(names)} stores, but --store can name only one. Move them back instead."
        )
    return open_stores([ActivationStore.open(find_parent(codes.artifact, name, store)) for name in names])


def image_stores(codes: CodeStore) -> NDArray[np.int64]:
    """[I]: number of the store that each image belongs to, counted from 0."""
    if "store" not in codes.images.column_names:
        return np.zeros(codes.n_images, dtype=np.int64)
    return np.asarray(codes.images["store"].to_numpy(), dtype=np.int64)


class ImagePlaces(NamedTuple):
    """Where the images of codes lie now.

    Attributes:
        folders: the folder, table or tar of each store that the codes were made from; None if it cannot be found.
        stores: [I] number of the store that each image belongs to, as `image_stores` gives it.
    """

    folders: tuple[Path | None, ...]
    stores: NDArray[np.int64]

    def all_there(self) -> bool:
        return all(folder is not None and folder.exists() for folder in self.folders)


def find_images(codes: CodeStore, *, images: str | Path | None = None, store: str | Path | None = None) -> ImagePlaces:
    """Find the images of codes.

    Args:
        images: the path, if the caller knows it.
        store: where the activation store of the codes (the first of several) lies, if it has moved.

    Raises:
        ParentMismatchError: `store` is not the store that the codes were made from.
    """
    names = [name for name in codes.artifact.parents if name.split()[0] == "images"]
    if images is not None:
        return ImagePlaces((Path(images),) * len(names), image_stores(codes))
    origin: Artifact = codes.artifact
    if store is not None:
        origin = open_artifact(store, "acts", complete=True)
        check_parent(codes.artifact, "store", origin)
    folders = [(origin if name == "images" else codes.artifact).parent_path(name) for name in names]
    return ImagePlaces(tuple(folder if folder.exists() else None for folder in folders), image_stores(codes))


def find_run(codes: CodeStore, run: str | Path | None = None) -> Run | str:
    """The run that made the codes, or the reason why it is not available.

    Raises ParentMismatchError, and what `Run.open` raises, for a run that the caller gave.
    """
    if run is not None:
        return Run.open(find_parent(codes.artifact, "run", run))
    try:
        return Run.open(find_parent(codes.artifact, "run"))
    except (ArtifactNotFoundError, IncompleteError, ParentMismatchError):
        return f"the run that made the codes is no longer at {codes.artifact.parents['run'].path}"
