"""find_seen(): which images of a store have been learned from by those who are judged on it.

In: a store, runs, and further images that were learned from. Out: Seen. Everything that judges asks this one function;
codes keep its answer. A run has learned from the training images of its stores (not from the held-out ones) and from
what the model behind them has learned from; a store of an adapted model brings the shots of its prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actcache import ActivationStore, CorruptError, PipelineError, SettingsError, open_stores
from actcache.artifacts import find_parent, open_checked, read_provenance, write_atomic
from actcache.prompts import learned_by_model
from actcache.seen import HASH_BYTES, LearnedImages, Seen, hashes_of, pack_hashes, unpack_hashes
from actcache.store import StoreGroup, select_images
from saetrain.data import held_out_images, split_wanted
from saetrain.run import LEARNED_FILE, Run


@dataclass(frozen=True)
class _TrainedOn:
    """What a run records of the stores it was trained on, beside their ids: the ids of their images and their order."""

    rows: tuple[str, ...] = ()


def find_seen(store: StoreGroup, runs: Sequence[Run] = (), learned: Sequence[LearnedImages] = ()) -> Seen:
    """Which images of a store the runs, the store's own model and others have learned from.

    In a store that a run was trained on, or one of the same images in the same order, all but the held-out images count
    as learned from, of those that its --where took. Elsewhere, contents are compared. An SAE that was imported does not
    say what it has learned from.
    """
    seen = Seen(np.zeros(store.n_images, dtype=bool))
    for images in (*learned, *_shots(store)):
        seen |= images.find(store.images, store.valid)
    for run in runs:
        seen |= _seen_by_run(store, run)
    return seen


def _seen_by_run(store: StoreGroup, run: Run) -> Seen:
    if "imported" in run.artifact.settings:
        return Seen(np.zeros(store.n_images, dtype=bool))
    trained = {parent.id for name, parent in run.artifact.parents.items() if name.startswith("store")}
    trained |= set(read_provenance(run.artifact, _TrainedOn).rows)
    joined, seen = np.zeros(store.n_images, dtype=bool), np.zeros(store.n_images, dtype=bool)
    for start, member in zip(store.starts.tolist(), store.stores, strict=False):
        if {member.store_id, member.rows_id} & trained:
            held_out = held_out_images(member.n_images)
            joined[start : start + member.n_images] = True
            seen[start : start + held_out.start] = True
    wanted = _wanted_by_run(store, run)  # the others may be copies of these, so their contents are compared
    joined, seen = joined & wanted, seen & wanted
    others = store.valid & ~joined  # elsewhere, positions say more than names
    no_hash = np.asarray(hashes_of(store.images).is_null().to_numpy(zero_copy_only=False), dtype=bool) & store.valid
    images = learned_by_run(run, store.stores, need_uris=bool((no_hash & others).any()))
    known_by = "position" if (no_hash & joined).any() else "content"
    return Seen(seen & store.valid, (images.by,), known_by) | images.find(store.images, store.valid, others)


def _wanted_by_run(store: StoreGroup, run: Run) -> NDArray[np.bool_]:
    """Which images the --where of a training took. All, where the store lacks its columns: then nobody can tell."""
    where = run.train_config.where
    try:
        return store.valid if where is None else select_images(store.images, where)
    except SettingsError:
        return store.valid


def learned_by_run(run: Run, near: Sequence[ActivationStore] = (), *, need_uris: bool = True) -> LearnedImages:
    """The images that a run has learned from: what it recorded, or else the training images of its stores.

    Args:
        near: opened stores that may be its own, wherever they lie now.
        need_uris: whether hashes alone are not enough, so that the stores are opened although the run has the hashes.
    """
    by, file = f"run {run.path.name}", run.path / LEARNED_FILE
    recorded = None
    if file.is_file():
        with open_checked(run.artifact, LEARNED_FILE) as opened:
            data = opened.read()
        if len(data) % HASH_BYTES:
            raise CorruptError(f"{file} has {len(data):,} bytes, which are no hashes. {run.artifact.remedy}")
        recorded = unpack_hashes(data)
        if not need_uris:
            return LearnedImages(by, recorded, None, recorded.slice(0, 0))
    known = {store.store_id: store for store in near}
    try:
        stores = [
            known.get(parent.id) or ActivationStore.open(find_parent(run.artifact, name))
            for name, parent in run.artifact.parents.items()
            if name.startswith("store")
        ]
        group = open_stores(stores)
        where = run.train_config.where
        wanted = group.valid if where is None else group.valid & select_images(group.images, where)
        images, _ = split_wanted(group, wanted)
    except PipelineError:  # they are gone, and nobody else knows
        return (
            LearnedImages.unknown(by) if recorded is None else LearnedImages(by, recorded, None, recorded.slice(0, 0))
        )
    return _learned_from(by, group, images)


def _learned_from(by: str, stores: StoreGroup, images: NDArray[np.int64]) -> LearnedImages:
    """What training on some images learns from: these images, and the shots of the model."""
    return LearnedImages.of(by, stores.images, images).together(*_shots(stores))


def write_learned(run: Path, stores: StoreGroup, images: NDArray[np.int64]) -> None:
    """Record the hashes of the training images in a run, so that it knows them without its stores.

    Nothing is written if some of them have no hash: their stores say more.
    """
    learned = _learned_from("", stores, images)
    if learned.known and not len(learned.unhashed):
        hashes = sorted(set(learned.content.to_pylist()))
        write_atomic(run / LEARNED_FILE, pack_hashes(hashes))


def _shots(store: StoreGroup) -> list[LearnedImages]:
    return [images for member in store.stores if (images := learned_by_model(member)) is not None]
