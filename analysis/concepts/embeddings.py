"""The image embeddings that monosemanticity compares: which ones were asked for, and the file that holds them.

They are a file that somebody made, or what the model of the codes' store makes of its images, or another store's model.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from actcache import SettingsError
from actcache.artifacts import file_digest
from actcache.progress import Progress
from actcache.store import StoreGroup, Stores
from analysis.concepts.files import write_array
from analysis.concepts.table import EMBEDDINGS_FILE
from analysis.lineage import open_parents, open_same_images
from saetrain import CodeStore


@dataclass(frozen=True)
class Embeddings:
    """Embeddings that were asked for.

    Attributes:
        identity: what stands for them in a table's settings: the content of a file, the stores that they come from, or
            `clip` for the codes' own store.
        file: the file that somebody made, if that is what they are.
        other: another model's store of the same images, if it makes them.
    """

    identity: object
    file: Path | None = None
    other: StoreGroup | None = None


def choose_embeddings(
    codes: CodeStore, embeddings: str | Path | None, with_: Stores | StoreGroup | None
) -> Embeddings | None:
    """What --embeddings and --with ask for; None if neither is given.

    Raises:
        SettingsError: both are given, or a file does not hold one finite, nonzero row per image.
        ParentMismatchError: the other store holds other images.
    """
    if embeddings is not None and str(embeddings) != "clip":
        if with_ is not None:
            raise SettingsError(f"--embeddings {embeddings} and --with both give embeddings. Leave one of them out.")
        check_embeddings(codes, embeddings)
        return Embeddings(file_digest(Path(embeddings))["pieces"], file=Path(embeddings))
    if with_ is not None:
        other = open_same_images(codes, with_)
        return Embeddings({"stores": [member.store_id for member in other.stores]}, other=other)
    return None if embeddings is None else Embeddings("clip")


def write_embeddings(
    chosen: Embeddings, codes: CodeStore, store: str | Path | None, folder: Path, *, device: str,
    on_progress: Progress | None,
) -> Path:  # fmt: skip
    """The .npy file of the embeddings [I, E]: the one that was given, or a new one in `folder`.

    Args:
        store: the activation store of the codes, if it moved.
        on_progress: called with (images done, images in all).
    """
    if chosen.file is not None:
        return chosen.file
    from actcache.prompts import open_towers  # torch
    from analysis.classifier import embed_stored_images

    group = open_parents(codes, store, has_flag=True) if chosen.other is None else chosen.other
    vision = open_towers(group.stores[0].artifact, device=device).vision
    images = np.arange(group.n_images)
    write_array(folder / EMBEDDINGS_FILE, embed_stored_images(group, images, vision=vision, on_progress=on_progress))
    return folder / EMBEDDINGS_FILE


def check_embeddings(codes: CodeStore, path: str | Path) -> None:
    """Raise SettingsError unless the file holds one finite, nonzero row per image."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise SettingsError(
            f"--embeddings {path} cannot be read as an .npy array ({error}). Save it with numpy.save."
        ) from error
    if array.ndim != 2 or len(array) != codes.n_images or array.dtype.kind != "f":
        raise SettingsError(
            f"--embeddings {path} is {array.dtype} {list(array.shape)}, expected floats [{codes.n_images}, width]: "
            "one row per image, in stored order."
        )
    for first in range(0, len(array), 4096):
        norm = np.linalg.norm(np.asarray(array[first : first + 4096], dtype=np.float64), axis=1)
        bad = np.flatnonzero(~(np.isfinite(norm) & (norm > 0)) & codes.valid[first : first + 4096])
        if len(bad):
            raise SettingsError(f"--embeddings {path}: row {first + bad[0]} is zero or not finite. Compute it again.")
