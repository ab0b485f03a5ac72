"""Offline questions to codes: the images of a latent, the latents of an image or a class.

Each answer is a pyarrow table, strongest first. A latent reads only its own entries, an image only its own rows, a
class one dask task a shard.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from actcache import SettingsError
from analysis.catalogue import TopImages, class_counts_statistic
from analysis.concepts import TAU
from analysis.pairs import find_pairs, image_scores, tokens_per_image
from analysis.reduction import reduce_shards
from saetrain import CodeStore, ShardCodes


def query_latent(codes: CodeStore, latent: int, *, n_top: int = 10, score: str = "mean") -> pa.Table:
    """Top images of a latent: image, uri, label_name, score, peak, and the peak patch as (row, column).

    row and column are -1 where only CLS fires. Raises SettingsError for a latent out of range.
    """
    if not 0 <= latent < codes.n_latents:
        raise SettingsError(f"--latent must lie in 0..{codes.n_latents - 1}, got {latent}.")
    rows, values = codes.read_latent(latent)
    shard = ShardCodes(
        first_row=0,
        indptr=np.empty(0, dtype=np.int64),
        latent=np.empty(0, dtype=np.uint32),
        value=values,
        latent_indptr=np.array([0, len(rows)]),
        row=rows.astype(np.uint64),
        latent_value=values,
    )
    pairs = find_pairs(shard, codes.n_tokens)
    scores = image_scores(pairs, codes, score)
    order = np.lexsort((pairs.image, -scores))[:n_top]
    top = TopImages._make(column[order] for column in (pairs.latent, pairs.image, scores, pairs.peak, pairs.peak_patch))
    row, column = np.divmod(top.peak_patch - 1, codes.grid[1])
    return pa.table(
        {
            "image": top.image,
            "uri": codes.images["uri"].take(top.image),
            "label_name": codes.images["label_name"].take(top.image),
            "score": top.score,
            "peak": top.peak,
            "row": np.where(top.peak_patch < 0, -1, row),
            "column": np.where(top.peak_patch < 0, -1, column),
        }
    )


def query_image(codes: CodeStore, image: int | str, *, n_top: int = 10) -> pa.Table:
    """Strongest latents of an image (stored position or uri): latent, score (mean over tokens), peak, n_tokens."""
    position = find_image(codes, image)
    shard = codes.read_shard(codes.find_shard(position))
    first = position * codes.n_tokens - shard.first_row
    part = slice(int(shard.indptr[first]), int(shard.indptr[first + codes.n_tokens]))
    latent, value = shard.latent[part].astype(np.int64), shard.value[part].astype(np.float64)
    found, group = np.unique(latent, return_inverse=True)
    total, count = np.bincount(group, weights=value), np.bincount(group)
    peak = np.zeros(len(found))
    np.maximum.at(peak, group, value)
    order = np.lexsort((found, -total))[:n_top]
    return pa.table(
        {
            "latent": found[order],
            "score": total[order] / tokens_per_image(codes),
            "peak": peak[order],
            "n_tokens": count[order],
        }
    )


def query_class(codes: CodeStore, label_name: str, *, n_top: int = 10, tau: float = TAU) -> pa.Table:
    """Strongest latents of a class by a_c[s] (PatchSAE equation 5): latent, n_tokens, n_images, share of its images.

    Raises SettingsError for a class that has no images, listing those that have.
    """
    names = pc.unique(codes.images["label_name"]).to_pylist()
    if label_name not in names or label_name == "":
        known = ", ".join(sorted(name for name in names if name)) or "none: the images have no labels"
        raise SettingsError(f"No image has class {label_name!r}. Classes: {known}.")
    mine = pc.equal(codes.images["label_name"], label_name).to_numpy()
    labels = np.where(mine, 0, -1).astype(np.int32)
    counts = reduce_shards(codes, {"classes": class_counts_statistic(labels)}, tau=tau)["classes"]
    order = np.lexsort((counts.latent, -counts.n_tokens))[:n_top]
    n_images = int((mine & codes.valid).sum())
    return pa.table(
        {
            "latent": counts.latent[order],
            "n_tokens": counts.n_tokens[order],
            "n_images": counts.n_images[order],
            "image_share": counts.n_images[order] / max(n_images, 1),
        }
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
