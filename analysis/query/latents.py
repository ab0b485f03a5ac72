"""Questions about one latent, answered from codes alone.

Each answer is a pyarrow table, strongest first. Only the latent's own entries are read; `codes.bytes_read` counts the
bytes.
"""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actcache import SettingsError
from analysis.config import SCORES
from analysis.heat_maps import check_patches
from analysis.query.where import choose_images, describe_images, latent_pairs
from analysis.reduce import Pairs, image_scores
from saetrain import CodeStore


def query_latent(
    codes: CodeStore, latent: int, *, n_top: int = 10, score: str = "mean", where: str | None = None
) -> pa.Table:
    """Top images of a latent: image, uri, label_name, score, peak, and the peak patch as row, column and `at`.

    `at` is "row,column", as `query --at` takes it, or "CLS" if the latent fires on CLS only; row and column are then
    null.

    Args:
        score: `mean` over an image's tokens (PatchSAE), or `max`.
        where: only these images, selected by columns of images.parquet: "split == 'test' and label in (3, 5)".

    Raises SettingsError for a latent out of range, an unknown score, or a selection that is invalid or empty.
    """
    if score not in SCORES:
        raise SettingsError(f"--score must be one of {', '.join(SCORES)}, got {score!r}.")
    pairs = latent_pairs(codes, latent, choose_images(codes, where))
    scores = image_scores(pairs, codes, score)
    top = np.lexsort((pairs.image, -scores))[:n_top]
    row, column = np.divmod(pairs.peak_patch[top] - 1, codes.grid[1])
    only_cls = pairs.peak_patch[top] < 0
    return pa.table(
        {
            **describe_images(codes, pairs.image[top].astype(np.int64)),
            "score": scores[top],
            "peak": pairs.peak[top],
            **describe_places(row, column, only_cls),
        }
    )


def describe_places(
    row: NDArray[np.integer[Any]], column: NDArray[np.integer[Any]], on_cls: NDArray[np.bool_]
) -> dict[str, pa.Array]:
    """The columns that say where on an image: row, column (null for CLS), and `at` ("3,4", or "CLS")."""
    places = zip(row.tolist(), column.tolist(), on_cls.tolist(), strict=True)
    return {
        "row": pa.array(row.astype(np.int64), mask=on_cls),
        "column": pa.array(column.astype(np.int64), mask=on_cls),
        "at": pa.array(["CLS" if cls else f"{i},{j}" for i, j, cls in places], pa.string()),
    }


def query_patches(codes: CodeStore, latent: int, *, n_top: int = 10, where: str | None = None) -> pa.Table:
    """Top patches of a latent: image, uri, label_name, row, column, at, value. Raises as `query_latent` does."""
    check_patches(codes)
    chosen = choose_images(codes, where)
    rows, values = codes.read_latent(latent)
    image, token = np.divmod(rows, codes.n_tokens)
    keep = (token > 0) & chosen[image]
    image, token, value = image[keep], token[keep], values[keep].astype(np.float32)
    top = np.lexsort((token, image, -value))[:n_top]
    row, column = np.divmod(token[top] - 1, codes.grid[1])
    places = describe_places(row, column, np.zeros(len(row), dtype=bool))
    return pa.table(describe_images(codes, image[top]) | places | {"value": value[top]})


def query_counter_examples(codes: CodeStore, latent: int, *, n_top: int = 10, where: str | None = None) -> pa.Table:
    """Evidence that a latent is not simply its top class: kind, image, uri, label_name, score (mean over tokens).

    The top class is the one with the highest mean score over all its images. The rows of kind `silent on ...` are its
    images on which the latent does not fire, in stored order, which is random; the rows of kind `fires elsewhere` are
    the images of other classes on which the latent fires most.

    Raises SettingsError as `query_latent` does, and if the latent fires on no labeled image.
    """
    chosen = choose_images(codes, where)
    found = find_counter_examples(codes, latent_pairs(codes, latent, chosen), chosen, n_top=n_top)
    if found is None:
        raise SettingsError(
            f"Latent {latent} fires on no labeled image, and counter-examples need classes. Ask with --show images."
        )
    return found


def find_counter_examples(codes: CodeStore, pairs: Pairs, chosen: NDArray[np.bool_], *, n_top: int) -> pa.Table | None:
    """What `query_counter_examples` answers, from the pairs of one latent; None if it fires on no labeled image.

    Args:
        pairs: those of the chosen images. chosen: [I] the images that are looked at.
    """
    score = np.zeros(codes.n_images)
    score[pairs.image] = image_scores(pairs, codes, "mean")
    names = codes.images["label_name"].combine_chunks().dictionary_encode()
    label, classes = names.indices.to_numpy(), names.dictionary.to_pylist()
    labeled = chosen & (np.array([bool(name) for name in classes])[label])
    total = np.bincount(label[labeled], score[labeled], len(classes))
    if not total.any():
        return None
    top_class = int(np.argmax(total / np.maximum(np.bincount(label[labeled], minlength=len(classes)), 1)))
    silent = np.flatnonzero(labeled & (label == top_class) & (score == 0))[:n_top]
    others = np.flatnonzero(labeled & (label != top_class) & (score > 0))
    elsewhere = others[np.lexsort((others, -score[others]))[:n_top]]
    images = np.concatenate([silent, elsewhere])
    kind = [f"silent on {classes[top_class]}"] * len(silent) + ["fires elsewhere"] * len(elsewhere)
    return pa.table({"kind": pa.array(kind, pa.string()), **describe_images(codes, images), "score": score[images]})
