"""The record of a latent: its numbers, where and how strongly it fires, its classes, neighbors and images.

The images are taken across the whole range of the latent's scores and not only from the top, in groups of ranks. Only
the latent's own entries are read. Of a latent with more than MAX_ENTRIES entries only some shards are read, and the
record says so.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actcache.text import visible
from analysis.concepts import SHOWN_QUANTILES, choose_bins, class_shares, finite, token_kinds
from analysis.explore.encoding import kept_shots, make_shots, short, shorten, top_shots
from analysis.explore.images import name_images
from analysis.explore.records import CounterExamples, LatentImages, LatentRecord, Partner, Shot, Strengths
from analysis.explore.sources import Sources
from analysis.explore.twins import find_twins
from analysis.query import find_counter_examples, rank_partners
from analysis.reduce import Pairs, find_pairs, image_scores
from saetrain import CodeStore, LatentCodes

MAX_ENTRIES = 1 << 18
"""Entries of a latent that are read: 1.5 MB. A latent that fires on every token of 50,000 images of ViT-B/16 has 38
times as many."""
MAX_COFIRING = 1 << 12
"""Tokens of a latent whose other latents are read; the Jaccard index is then off by about 0.01."""
MAX_HEAT = 1 << 15
"""Patches in the heat maps of a record, so that it stays below 1 MB on large grids too."""
N_CLASSES, N_PARTNERS, N_PATCHES = 12, 12, 16

STRONGEST = "Strongest"
N_STRONGEST, N_OF_GROUP, N_COUNTER = 12, 6, 6
GROUPS = (
    ("90th to 99th percentile", 0.01, 0.10), ("50th to 90th percentile", 0.10, 0.50),
    ("10th to 50th percentile", 0.50, 0.90), ("Weakest tenth", 0.90, 1.0),
)  # fmt: skip
"""Title, and the shares of a latent's images, from the strongest, between which the images of a group are."""


class Fired(NamedTuple):
    """Where a latent fires, of the images that were read.

    Attributes:
        rows, values: its entries, ascending. pairs: its images. score: [pairs] its score on each.
        images: [I] which images were read. note: what was left out, "" for nothing.
    """

    rows: NDArray[np.int64]
    values: NDArray[np.float16]
    pairs: Pairs
    score: NDArray[np.float64]
    images: NDArray[np.bool_]
    note: str


def describe_latent(sources: Sources, latent: int) -> LatentRecord:
    """The record. Raises SettingsError for a latent out of range."""
    sources.check_latent(latent)
    concepts = sources.concepts
    row = concepts.table.slice(latent, 1).to_pylist()[0]
    shares = class_shares(concepts, latent)
    kinds = token_kinds(concepts, row)
    patches = concepts.rows_of("top_patches", latent).slice(0, N_PATCHES).to_pylist()
    found = _describe_images(sources, latent)
    groups = [*found["groups"], *(found["counter"] or [])]
    shown = [*(shot["image"] for group in groups for shot in group["shots"]), *(patch["image"] for patch in patches)]
    return {
        "latent": latent,
        "numbers": {name: short(value) if isinstance(value, float) else value
                    for name, value in row.items() if name != "latent"},
        "quantiles": {title: short(row[name]) for title, name in SHOWN_QUANTILES.items()
                      if finite(row.get(name)) is not None},
        "kinds": {kind.name: {"density": short(kind.density), "mean": short(kind.mean), "max": short(kind.maximum)}
                  for kind in kinds} or None,
        "histogram": _describe_strengths(sources, latent),
        "position": np.asarray(concepts.position_map[latent]).ravel().tolist() if concepts.has("position_map.npy")
                    else None,
        "classes": [{"name": visible(share.name), "n_tokens": share.n_tokens, "share": short(share.share),
                     "n_images": share.n_images} for share in shares[:N_CLASSES]],
        "n_classes": len(shares),
        "nearest": [(n, short(cosine)) for n, cosine in concepts.nearest(latent)] if concepts.has("nearest.npy")
                   else [],
        "patches": [{"image": line["image"], "row": line["row"], "column": line["column"],
                     "value": short(line["value"])} for line in patches],
        "twins": find_twins(sources, latent),
        **found,
        "images": name_images(sources, shown),
    }  # fmt: skip


def _describe_strengths(sources: Sources, latent: int) -> Strengths | None:
    if not sources.concepts.has("histogram.npy"):
        return None
    histogram = sources.concepts.histogram
    counts = np.asarray(histogram.counts[latent : latent + 1], dtype=np.int64)
    if not counts.any():
        return None
    bins = choose_bins(counts)
    edges = np.minimum(histogram.edges[bins.start : bins.stop + 1], np.finfo(np.float16).max)
    return {"edges": shorten(edges.astype(np.float64)), "counts": counts[0, bins].tolist()}


# ---------------------------------------------------------------------------------------------------------------------
# Images


def _describe_images(sources: Sources, latent: int) -> LatentImages:
    codes = sources.codes
    if codes is None:
        kept = kept_shots(sources.concepts, latent, N_STRONGEST)
        return {
            "cofiring": None,
            "groups": [{"title": STRONGEST, "shots": kept}] if kept else [],
            "counter": None,
            "note": "",
        }
    fired = read_fired(codes, latent, int(sources.n_fired[latent]), sources.concepts.config.score)
    groups = choose_groups(fired, seed=latent)
    counter = find_counter_examples(codes, fired.pairs, fired.images, n_top=N_COUNTER) if len(fired.rows) else None
    n_each = max(1, MAX_HEAT // (codes.grid[0] * codes.grid[1]) // (len(groups) + 2))

    def shoot(images: list[int], scores: dict[int, float]) -> list[Shot]:
        has_cls = codes.tokens != "patch"
        return make_shots(
            images[:n_each], scores, fired.rows, fired.values, n_tokens=codes.n_tokens, has_cls=has_cls
        )  # fmt: skip

    scores = dict(zip(fired.pairs.image.tolist(), fired.score.tolist(), strict=True))
    shots = {title: shoot(images, scores) for title, images in groups}
    if fired.note and STRONGEST in shots:  # some of its strongest images were not read
        shots[STRONGEST] = top_shots(sources.concepts, codes, latent, min(n_each, N_STRONGEST))
    return {
        "cofiring": find_partners(codes, latent, fired.rows, sources.n_fired, seed=latent),
        "groups": [{"title": title, "shots": of} for title, of in shots.items()],
        "counter": None if counter is None else _group_counter_examples(counter, shoot),
        "note": fired.note,
    }  # fmt: skip


def _group_counter_examples(
    counter: pa.Table, shoot: Callable[[list[int], dict[int, float]], list[Shot]]
) -> list[CounterExamples]:
    kinds, images, scores = (counter[name].to_pylist() for name in ("kind", "image", "score"))
    of = dict(zip(images, scores, strict=True))
    return [
        {"kind": visible(kind), "shots": shoot([i for i, own in zip(images, kinds, strict=True) if own == kind], of)}
        for kind in dict.fromkeys(kinds)
    ]


def read_fired(codes: CodeStore, latent: int, n_expected: int, score: str) -> Fired:
    """Read the entries of a latent, of all shards or, where it has too many, of shards that are drawn by its number."""
    images = codes.valid
    if n_expected <= MAX_ENTRIES:
        rows, values = codes.read_latent(latent)
        note = ""
    else:
        drawn = np.random.Generator(np.random.Philox(latent)).permutation(codes.n_shards)
        n_shards = max(1, codes.n_shards * MAX_ENTRIES // n_expected)
        shards = sorted(drawn[:n_shards].tolist())
        parts = [codes.read_latents(shard, latent, latent + 1) for shard in shards]
        rows = np.concatenate([part.row for part in parts]).astype(np.int64)
        values = np.concatenate([part.latent_value for part in parts])
        images = np.zeros(codes.n_images, dtype=np.bool_)
        for shard in shards:
            part = codes.shard_range(shard)
            images[part.start : part.stop] = codes.valid[part.start : part.stop]
        n_seen = int(images.sum())
        note = (
            f"It fires on {n_expected:,} tokens. Images and co-firing latents are from {n_seen:,} of "
            f"{int(codes.valid.sum()):,} images, drawn at random."
        )
    pairs = find_pairs(LatentCodes(np.array([0, len(rows)]), rows.astype(np.uint64), values), codes.n_tokens)
    return Fired(rows, values, pairs, image_scores(pairs, codes, score), images, note)


def choose_groups(fired: Fired, *, seed: int) -> list[tuple[str, list[int]]]:
    """(title, images): the strongest images, and some of each group of ranks, drawn by a seed; strongest first."""
    order = np.lexsort((fired.pairs.image, -fired.score))
    image = fired.pairs.image[order].astype(np.int64)
    n, rng = len(image), np.random.Generator(np.random.Philox(seed))
    groups = [(STRONGEST, image[:N_STRONGEST].tolist())] if n else []
    for title, above, below in GROUPS:
        ranks = np.arange(max(round(above * n), N_STRONGEST), round(below * n))
        chosen = np.sort(rng.permutation(ranks)[:N_OF_GROUP])
        if len(chosen):
            groups.append((title, image[chosen].tolist()))
    return groups


def find_partners(
    codes: CodeStore, latent: int, rows: NDArray[np.int64], n_fired: NDArray[np.int64], *, seed: int
) -> list[Partner]:
    """The latents that fire on the same tokens, from at most MAX_COFIRING of them, drawn by a seed.

    Args:
        rows: ascending rows of the latent's entries. n_fired: [F] tokens on which each latent fires, in all.
    """
    if not len(rows):
        return []
    drawn = rows
    if len(rows) > MAX_COFIRING:
        rng = np.random.Generator(np.random.Philox(seed))
        drawn = rows[np.sort(rng.choice(len(rows), MAX_COFIRING, replace=False, shuffle=False))]
    counts = np.bincount(codes.read_rows(drawn).latent, minlength=codes.n_latents)
    both = np.rint(counts * (n_fired[latent] / len(drawn))).astype(np.int64)  # of all tokens, as far as can be told
    return [
        {"latent": row["latent"], "jaccard": short(row["jaccard"]), "share": short(row["share"]),
         "n_tokens": row["n_tokens"]}
        for row in rank_partners(both, n_fired, latent, n_top=N_PARTNERS).to_pylist()
    ]  # fmt: skip
