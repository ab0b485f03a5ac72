"""Questions about one latent or one image, answered from codes alone.

Each answer is a pyarrow table, strongest first. A latent reads only its own entries, an image only its own rows;
`codes.bytes_read` tells how many bytes that was. Groups of images: analysis/selection.py, analysis/contrast.py.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from actcache import SettingsError
from analysis.heat import check_patches
from analysis.pairs import SCORES, image_scores, tokens_per_image
from analysis.selection import choose_images, image_rows, latent_pairs, show_images
from saetrain import CodeStore, RowCodes

At = tuple[int | slice, int | slice]
"""A patch (3, 4), or a region (slice(0, 3), slice(2, 5)): rows, columns of the grid."""


# ---------------------------------------------------------------------------------------------------------------------
# One latent


def query_latent(
    codes: CodeStore, latent: int, *, n_top: int = 10, score: str = "mean", where: str | None = None
) -> pa.Table:
    """Top images of a latent: image, uri, label_name, score, peak, and the peak patch as (row, column).

    row and column are -1 where only CLS fires.

    Args:
        score: `mean` over an image's tokens (PatchSAE), or `max`.
        where: only these images, by columns of images.parquet: "split == 'test' and label in (3, 5)".

    Raises SettingsError for a latent out of range, another score, or a selection that is wrong or empty.
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
            **show_images(codes, pairs.image[top].astype(np.int64)),
            "score": scores[top],
            "peak": pairs.peak[top],
            "row": np.where(only_cls, -1, row),
            "column": np.where(only_cls, -1, column),
        }
    )


def query_patches(codes: CodeStore, latent: int, *, n_top: int = 10, where: str | None = None) -> pa.Table:
    """Top patches of a latent: image, uri, label_name, row, column, value. Raises as `query_latent`."""
    check_patches(codes)
    chosen = choose_images(codes, where)
    rows, values = codes.read_latent(latent)
    image, token = np.divmod(rows, codes.n_tokens)
    keep = (token > 0) & chosen[image]
    image, token, value = image[keep], token[keep], values[keep].astype(np.float32)
    top = np.lexsort((token, image, -value))[:n_top]
    row, column = np.divmod(token[top] - 1, codes.grid[1])
    return pa.table(show_images(codes, image[top]) | {"row": row, "column": column, "value": value[top]})


def query_counter_examples(codes: CodeStore, latent: int, *, n_top: int = 10, where: str | None = None) -> pa.Table:
    """What speaks against a latent being its top class: kind, image, uri, label_name, score (mean over tokens).

    The top class is the one with the highest mean score over all its images. `silent`: its images on which the latent
    does not fire, in stored order, which is random; `elsewhere`: the images of other classes it fires on most.

    Raises SettingsError as `query_latent`, and where the latent fires on no labeled image.
    """
    chosen = choose_images(codes, where)
    pairs = latent_pairs(codes, latent, chosen)
    score = np.zeros(codes.n_images)
    score[pairs.image] = image_scores(pairs, codes, "mean")
    names = codes.images["label_name"].combine_chunks().dictionary_encode()
    label, classes = names.indices.to_numpy(), names.dictionary.to_pylist()
    labeled = chosen & (np.array([bool(name) for name in classes])[label])
    total = np.bincount(label[labeled], score[labeled], len(classes))
    if not total.any():
        raise SettingsError(f"Latent {latent} fires on no labeled image. Counter-examples need classes.")
    top_class = int(np.argmax(total / np.maximum(np.bincount(label[labeled], minlength=len(classes)), 1)))
    silent = np.flatnonzero(labeled & (label == top_class) & (score == 0))[:n_top]
    others = np.flatnonzero(labeled & (label != top_class) & (score > 0))
    elsewhere = others[np.lexsort((others, -score[others]))[:n_top]]
    images = np.concatenate([silent, elsewhere])
    kind = [f"silent on {classes[top_class]}"] * len(silent) + ["fires elsewhere"] * len(elsewhere)
    return pa.table({"kind": pa.array(kind, pa.string()), **show_images(codes, images), "score": score[images]})


# ---------------------------------------------------------------------------------------------------------------------
# One image, or two


def query_image(codes: CodeStore, image: int | str, *, at: At | None = None, n_top: int = 10) -> pa.Table:
    """Strongest latents of an image, a patch or a region: latent, score (mean over these tokens), peak, n_tokens.

    Args:
        image: stored position, or uri.
        at: (row, column) of a patch, or slices of both for a region; all tokens when None.

    Raises SettingsError for an image that is not there, or a patch outside the grid.
    """
    position = find_image(codes, image)
    rows = image_rows(codes, np.array([position])) if at is None else position * codes.n_tokens + find_tokens(codes, at)
    found = _sum_latents(codes.read_rows(rows))
    n_tokens = tokens_per_image(codes) if at is None else len(rows)
    order = np.lexsort((found.latent, -found.total))[:n_top]
    return pa.table(
        {
            "latent": found.latent[order],
            "score": found.total[order] / n_tokens,
            "peak": found.peak[order],
            "n_tokens": found.n_tokens[order],
        }
    )


def query_images(codes: CodeStore, image: int | str, other: int | str, *, n_top: int = 10) -> pa.Table:
    """Shared and exclusive latents of two images (PatchSAE's covariate-shift case): latent, kind, score_1, score_2.

    The `n_top` strongest latents of each are compared; a score is the mean over the image's tokens. `kind` is shared,
    only 1 or only 2; a latent that is exclusive may fire on the other image, too weakly to be among its strongest.

    Raises SettingsError for an image that is not there, or twice the same.
    """
    positions = [find_image(codes, image), find_image(codes, other)]
    if positions[0] == positions[1]:
        raise SettingsError(f"--image names image {positions[0]} twice. Give two.")
    scores = np.zeros((2, codes.n_latents))
    for k, position in enumerate(positions):
        found = _sum_latents(codes.read_rows(image_rows(codes, np.array([position]))))
        scores[k, found.latent] = found.total / tokens_per_image(codes)
    inside = np.zeros((2, codes.n_latents), dtype=bool)
    for k in range(2):
        strongest = np.argsort(-scores[k], kind="stable")[:n_top]
        inside[k, strongest[scores[k, strongest] > 0]] = True
    kinds = [("shared", inside[0] & inside[1]), ("only 1", inside[0] & ~inside[1]), ("only 2", inside[1] & ~inside[0])]
    parts = []
    for kind, mask in kinds:
        latents = np.flatnonzero(mask)
        latents = latents[np.lexsort((latents, -scores[:, latents].sum(0)))]
        columns = {"latent": latents, "kind": pa.array([kind] * len(latents), pa.string())}
        parts.append(pa.table(columns | {"score_1": scores[0, latents], "score_2": scores[1, latents]}))
    return pa.concat_tables(parts)


class _Sums(NamedTuple):
    """By latent, ascending."""

    latent: NDArray[np.int64]
    total: NDArray[np.float64]
    peak: NDArray[np.float64]
    n_tokens: NDArray[np.int64]


def _sum_latents(found: RowCodes) -> _Sums:
    latent, group = np.unique(found.latent, return_inverse=True)
    value = found.value.astype(np.float64)
    peak = np.zeros(len(latent))
    np.maximum.at(peak, group, value)
    return _Sums(
        latent,
        np.bincount(group, value, len(latent)).astype(np.float64),
        peak,
        np.bincount(group, minlength=len(latent)),
    )


def find_image(codes: CodeStore, image: int | str) -> int:
    """Stored position of an image given as position or uri. Raises SettingsError when it is neither."""
    text = str(image)
    position = pc.index(codes.images["uri"], text).as_py()
    if position >= 0:
        return int(position)
    if text.isdigit() and int(text) < codes.n_images:
        return int(text)
    raise SettingsError(
        f"--image {text} is neither a position in 0..{codes.n_images - 1} nor the uri of a stored image "
        f"(e.g. {codes.images['uri'][0].as_py()})."
    )


def find_tokens(codes: CodeStore, at: At) -> NDArray[np.int64]:
    """Tokens of a patch or a region, ascending. Raises SettingsError outside the grid, or where nothing is left."""
    check_patches(codes)
    axes: list[range] = []
    for name, part, size in zip(("row", "column"), at, codes.grid, strict=True):
        chosen = part if isinstance(part, slice) else slice(part, part + 1)
        start, stop = chosen.start or 0, size if chosen.stop is None else chosen.stop
        if not 0 <= start < stop <= size:
            raise SettingsError(f"--at: a {name} must lie in 0..{size - 1}, a range must not be empty, got {part}.")
        axes.append(range(start, stop))
    rows, columns = (np.array(axis) for axis in axes)
    return np.asarray(1 + rows[:, None] * codes.grid[1] + columns).ravel()
