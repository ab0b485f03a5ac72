"""Who made an artifact, and where its parents lie now: its runs, its stores, its images, and those it learned from."""

from collections.abc import Sequence
from pathlib import Path

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
from actcache.store import StoreGroup
from saetrain import CodeStore, Run, held_out_images


def unseen_images(run: Run, store: StoreGroup) -> NDArray[np.int64]:
    """Images that the run was not trained on, of a store or of another one of the same images in the same order.

    Those are the held-out ones; of other stores, and for an SAE that was imported, all.
    """
    if "imported" in run.artifact.settings:
        return np.arange(store.n_images)
    trained = {parent.id for name, parent in run.artifact.parents.items() if name.startswith("store")}
    trained |= set(run.artifact.provenance.get("rows", ()))
    unseen = [
        held_out_images(one.n_images) if {one.store_id, one.rows_id} & trained else range(one.n_images)
        for one in store.stores
    ]
    return np.concatenate([start + np.array(part) for start, part in zip(store.starts, unseen, strict=False)])


def name_parents(runs: Sequence[Run], store: StoreGroup, codes: CodeStore | None = None) -> dict[str, Artifact]:
    """The parents that a result names: run, run 2, ..., store, store 2, ..., codes."""
    parents = {_numbered("run", i): run.artifact for i, run in enumerate(runs)}
    parents |= {_numbered("store", i): member.artifact for i, member in enumerate(store.stores)}
    return parents if codes is None else {**parents, "codes": codes.artifact}


def _numbered(name: str, index: int) -> str:
    return name if index == 0 else f"{name} {index + 1}"


def find_runs(path: Run | str | Path) -> list[Run]:
    """A run, or the finished runs of a sweep's folder, by name. Raises ArtifactNotFoundError where there is none."""
    if isinstance(path, Run):
        return [path]
    members = sorted(file.parent for file in Path(path).glob("*/artifact.json"))
    if members and not (Path(path) / "artifact.json").exists():
        return [Run.open(member) for member in members]
    return [Run.open(path)]


def open_parents(codes: CodeStore, store: str | Path | None = None) -> StoreGroup:
    """The activation stores that codes were made from, as one.

    Args:
        store: where the one it was made from lies now.

    Raises:
        SettingsError: codes of several stores, and one place. ArtifactNotFoundError, ParentMismatchError.
    """
    names = [name for name in codes.artifact.parents if name.split()[0] == "store"]
    if store is not None and len(names) > 1:
        raise SettingsError(f"{codes.path} was made from {len(names)} stores; --store can name one only.")
    return open_stores([ActivationStore.open(find_parent(codes.artifact, name, store)) for name in names])


def image_stores(codes: CodeStore) -> NDArray[np.int64]:
    """[I]: which of the stores that codes were made from each image is of, counted from 0."""
    if "store" not in codes.images.column_names:
        return np.zeros(codes.n_images, dtype=np.int64)
    return np.asarray(codes.images["store"].to_numpy(), dtype=np.int64)


def find_images(
    codes: CodeStore, *, images: str | Path | None = None, store: str | Path | None = None, number: int = 0
) -> Path | None:
    """Where the codes' images lie (a folder, a table, a tar), or None when it cannot be found.

    Args:
        images: the path, where the caller knows it.
        store: the activation store the codes were made from, the first of several, where it moved.
        number: of which store's images, see `image_stores`.

    Raises:
        ParentMismatchError: `store` is not that store.
    """
    if images is not None:
        return Path(images)
    artifact: Artifact = codes.artifact
    if store is not None:
        artifact = open_artifact(store, "acts", complete=True)
        check_parent(codes.artifact, "store", artifact)
    folder = codes.artifact.parent_path(f"images {number + 1}") if number else artifact.parent_path("images")
    return folder if folder.exists() else None


def find_run(codes: CodeStore, run: str | Path | None = None) -> Run | str:
    """The run that made some codes, or why it cannot be had.

    Raises ParentMismatchError and what `Run.open` raises for a run that was given.
    """
    if run is not None:
        return Run.open(find_parent(codes.artifact, "run", run))
    try:
        return Run.open(find_parent(codes.artifact, "run"))
    except (ArtifactNotFoundError, IncompleteError, ParentMismatchError):
        return f"the run that made the codes is not at {codes.artifact.parents['run'].path} any more"
