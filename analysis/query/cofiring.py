"""Which latents fire on the same tokens: exact for chosen latents, and over a sample of tokens for all latents.

In: codes. Out: counts of tokens, or a pyarrow table, strongest partner first. No (latents x latents) array is made.

The Jaccard index of two latents is the number of tokens on which both fire over the number on which either fires.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actcache import SettingsError
from actcache.options import check_number
from analysis.concepts import strongest_first
from analysis.reduce import fold_pieces, join_columns, tokens_per_image
from saetrain import CodeStore

TASK_PAIRS = 1 << 18
"""The number of pairs of latents on a token that a task of `sample_partners` sorts, for the processor's cache."""


# ---------------------------------------------------------------------------------------------------------------------
# Chosen latents, exactly


class CoFiring(NamedTuple):
    """Exact counts of tokens for L chosen latents."""

    both: NDArray[np.int64]  # [L, F] tokens on which a chosen and another latent fire; with itself: on which it fires
    n_fired: NDArray[np.int64]  # [F] tokens on which each latent fires

    def jaccard(self) -> NDArray[np.float64]:
        """[L, F]; 0 if neither fires."""
        own = self.both.max(axis=1)  # a latent shares most tokens with itself
        return np.asarray(self.both / np.maximum(own[:, None] + self.n_fired - self.both, 1))


def co_fire(codes: CodeStore, latents: Sequence[int]) -> CoFiring:
    """Count the tokens on which each of some latents fires together with every other latent.

    In each shard, this reads the entries of these latents, the tokens on which they fire, and how often each latent
    fires.

    Raises SettingsError for a latent out of range, or for no latent.
    """
    if not latents:
        raise SettingsError(f"No latent was named. Name at least one, in 0..{codes.n_latents - 1}.")
    for latent in latents:
        if not 0 <= latent < codes.n_latents:
            raise SettingsError(f"A latent must lie in 0..{codes.n_latents - 1}, got {latent}.")
    count = partial(_count_shard, latents=list(latents))
    counts: NDArray[np.int64] = fold_pieces(codes, count, partial(sum, start=0), range(codes.n_shards))
    return CoFiring(counts[:-1], counts[-1])


def _count_shard(codes: CodeStore, shard: int, *, latents: list[int]) -> NDArray[np.int64]:
    """[L + 1, F]: `both` of one shard, with `n_fired` as the last row."""
    counts = np.zeros((len(latents) + 1, codes.n_latents), dtype=np.int64)
    for place, latent in enumerate(latents):
        rows = codes.read_latents(shard, latent, latent + 1).row.astype(np.int64)
        counts[place] = np.bincount(codes.read_rows(rows).latent, minlength=codes.n_latents)
    counts[-1] = codes.count_latents(shard)
    return counts


def query_co_firing(codes: CodeStore, latent: int, *, n_top: int = 10) -> pa.Table:
    """Latents that fire on the same tokens: latent, n_tokens (both fire), share (of this latent's tokens), jaccard.

    Strongest jaccard first. Raises SettingsError for a latent out of range.
    """
    counts = co_fire(codes, [latent])
    return rank_partners(counts.both[0], counts.n_fired, latent, n_top=n_top)


def rank_partners(both: NDArray[np.int64], n_fired: NDArray[np.int64], latent: int, *, n_top: int) -> pa.Table:
    """What `query_co_firing` answers, from `both` [F] of the latent and `n_fired` [F], see `CoFiring`."""
    jaccard = both / np.maximum(both[latent] + n_fired - both, 1)
    others = np.flatnonzero(both)
    others = others[others != latent]
    top = others[np.lexsort((others, -jaccard[others]))[:n_top]]
    share = both[top] / max(int(both[latent]), 1)
    return pa.table({"latent": top, "n_tokens": both[top], "share": share, "jaccard": jaccard[top]})


# ---------------------------------------------------------------------------------------------------------------------
# All latents, over a sample


def sample_partners(codes: CodeStore, *, n_tokens: int = 100_000, seed: int = 0, n_partners: int = 4) -> pa.Table:
    """For every latent, the partners with the highest Jaccard index on a sample of tokens; the lower latent wins a tie.

    A Jaccard index J from n tokens of either latent has a standard error of about sqrt(J (1 - J) / n), so rare latents
    need more tokens.

    Args:
        n_tokens: number of encoded tokens to sample, without replacement; all of them if there are fewer.
        seed: random seed of the sample (numpy's Philox), which does not depend on how codes are cut into shards.

    Returns:
        latent, rank, partner, n_tokens (sampled tokens on which both fire), share (of the latent's tokens), jaccard,
        n_sampled (the same in all rows); ordered by latent, then rank. A latent that fires with no other has no row.

    Raises SettingsError for fewer than one token or partner.
    """
    n_tokens = check_number("sample", n_tokens, int, at_least=1)
    n_partners = check_number("n_top", n_partners, int, at_least=1)
    seed = check_number("seed", seed, int, at_least=0)
    rows = sample_rows(codes, n_tokens, seed)
    cuts = np.searchsorted(rows, np.cumsum(codes.shard_sizes)[:-1] * codes.n_tokens)
    parts = [part for part in np.split(rows, cuts) if len(part)]
    sample = _index(fold_pieces(codes, _read_rows, join_columns, parts), codes.n_latents)
    find = partial(_find_partners, sample=sample, n_partners=n_partners)
    latent, partner, both, jaccard = fold_pieces(codes, find, join_columns, _cut_work(sample))
    rank = np.arange(len(latent)) - np.searchsorted(latent, latent)
    share = both / np.diff(sample.latent_indptr)[latent]
    table = {"latent": latent, "rank": rank, "partner": partner, "n_tokens": both, "share": share, "jaccard": jaccard}
    return pa.table({**table, "n_sampled": np.full(len(latent), len(rows))})


def list_pairs(partners: pa.Table) -> pa.Table:
    """Each pair of latents once, strongest first: latent (the lower one), partner, n_tokens, share, partner_share, ...

    In: what `sample_partners` returns, where a pair stands twice if each latent is among the other's partners.
    share: of the latent's tokens; partner_share: of the partner's. jaccard and n_sampled are as there.
    """
    names = ("latent", "partner", "n_tokens", "share", "jaccard", "n_sampled")
    latent, partner, both, share, jaccard, n_sampled = (partners[name].to_numpy() for name in names)
    n_own = np.rint(both / np.where(share > 0, share, 1)).astype(np.int64)
    n_other = np.rint(both / np.where(jaccard > 0, jaccard, 1)).astype(np.int64) + both - n_own
    swapped = latent > partner
    low, high = np.minimum(latent, partner), np.maximum(latent, partner)
    first, second = np.where(swapped, n_other, n_own), np.where(swapped, n_own, n_other)
    _, kept = np.unique(np.stack([low, high]), axis=1, return_index=True)
    order = kept[np.lexsort((high[kept], low[kept], -both[kept], -jaccard[kept]))]
    columns = {
        "latent": low, "partner": high, "n_tokens": both, "share": both / np.maximum(first, 1),
        "partner_share": both / np.maximum(second, 1), "jaccard": jaccard, "n_sampled": n_sampled,
    }  # fmt: skip
    return pa.table({name: column[order] for name, column in columns.items()})


def sample_rows(codes: CodeStore, n_tokens: int, seed: int) -> NDArray[np.int64]:
    """The rows of a sample of the encoded tokens of readable images, ascending."""
    per_image = tokens_per_image(codes)
    first = 1 if codes.tokens == "patch" else 0
    images = np.flatnonzero(codes.valid)
    n_all = len(images) * per_image
    generator = np.random.Generator(np.random.Philox(seed))
    chosen = np.sort(generator.choice(n_all, min(n_tokens, n_all), replace=False, shuffle=False))
    place, token = np.divmod(chosen, per_image)
    return np.asarray(images[place] * codes.n_tokens + first + token, dtype=np.int64)


class _Sample(NamedTuple):
    """The entries of a sample in both orders. Tokens on which nothing fires are left out."""

    indptr: NDArray[np.int64]  # [S + 1]
    latent: NDArray[np.int32]  # [nnz] by token
    latent_indptr: NDArray[np.int64]  # [F + 1]
    token: NDArray[np.int32]  # [nnz] by latent


def _read_rows(codes: CodeStore, rows: NDArray[np.int64]) -> tuple[NDArray[Any], ...]:
    entries = codes.read_rows(rows)
    return entries.row, entries.latent.astype(np.int32)


def _index(entries: tuple[NDArray[Any], ...], n_latents: int) -> _Sample:
    row, latent = entries
    start = np.flatnonzero(np.diff(row, prepend=-1))
    indptr = np.append(start, len(row))
    token = np.repeat(np.arange(len(start), dtype=np.int32), np.diff(indptr))
    latent_indptr = np.concatenate([[0], np.cumsum(np.bincount(latent, minlength=n_latents))])
    return _Sample(indptr, latent, latent_indptr, token[np.argsort(latent, kind="stable")])


def _cut_work(sample: _Sample) -> list[range]:
    """Cut all latents into ranges of about TASK_PAIRS pairs; a latent that has more is a range of its own."""
    n_pairs = np.concatenate([[0], np.cumsum(np.diff(sample.indptr)[sample.token])])[sample.latent_indptr]
    cuts = np.searchsorted(n_pairs, np.arange(TASK_PAIRS, n_pairs[-1], TASK_PAIRS))
    edges = np.unique([0, *cuts, len(n_pairs) - 1]).tolist()
    return [range(first, last) for first, last in pairwise(edges)]


def _find_partners(codes: CodeStore, latents: range, *, sample: _Sample, n_partners: int) -> tuple[NDArray[Any], ...]:
    """(latent, partner, tokens on which both fire, jaccard) of the strongest partners, by latent, strongest first."""
    n_latents, count = codes.n_latents, np.diff(sample.latent_indptr)
    start, stop = sample.latent_indptr[[latents.start, latents.stop]]
    own = np.repeat(np.arange(len(latents)), count[latents.start : latents.stop])
    n_slices = 1 + int(np.diff(sample.indptr)[sample.token[start:stop]].sum()) // (2 * TASK_PAIRS)
    pairs = [
        _count_pairs(sample, *part, n_latents)
        for part in zip(np.array_split(own, n_slices), np.array_split(sample.token[start:stop], n_slices), strict=True)
    ]
    pair, both = pairs[0] if n_slices == 1 else _add_counts(pairs)
    latent, partner = np.divmod(pair, n_latents)
    others = partner != latent + latents.start
    latent, partner, both = latent[others], partner[others], both[others]
    jaccard = both / (count[latent + latents.start] + count[partner] - both)
    order = strongest_first(latent, jaccard, partner)
    rank = np.arange(len(order)) - np.searchsorted(latent, latent)  # latents are sorted either way
    top = order[rank < n_partners]
    return latent[top] + latents.start, partner[top], both[top], jaccard[top]


def _count_pairs(
    sample: _Sample, own: NDArray[np.int64], token: NDArray[np.int32], n_latents: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(own * F + latent, ascending; the number of these tokens on which both fire)."""
    first, n = sample.indptr[token], np.diff(sample.indptr)[token]
    entry = np.repeat(first - np.cumsum(n) + n, n) + np.arange(n.sum())
    pair, both = np.unique(np.repeat(own * n_latents, n) + sample.latent[entry], return_counts=True)
    return pair, both


def _add_counts(parts: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> tuple[NDArray[Any], NDArray[Any]]:
    pair, both = join_columns(parts)
    pair, group = np.unique(pair, return_inverse=True)
    return pair, np.bincount(group, both).astype(np.int64)
