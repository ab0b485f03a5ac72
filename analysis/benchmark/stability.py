"""Measure 8, stability: whether a run that differs only in its seed finds the same latents, and when they fire.

    stability cosine          mean cosine of the decoder rows that are matched one to one, so that their sum is largest
    stability share > 0.7     share of these cosines above 0.7
    stability above random    the mean cosine, minus that of random directions of the same number and width
    stability jaccard         of a matched pair, the judged tokens on which both latents fire over those on which one
                              does; mean over the matched pairs

Each is the mean over the other runs of the group. Latents that fire on no judged token are left out, and one that has
no partner counts as a cosine of 0, as in `inspect`. The untrained SAEs of the group are matched in the same way, which
says what the initial weights and the geometry of the stream give for free.

Source: Paulo and Belrose 2025 (arXiv 2501.16615) for matching seeds; that a shared initialization or activations that
are not centered make dictionaries look stable is from arXiv 2606.02061.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.benchmark.measured import Measured, Skipped
from analysis.benchmark.resamples import divide
from analysis.benchmark.subject import Judged, Subject
from analysis.dictionary import PairedLatents, pair_latents
from analysis.results import BenchmarkSubject

NAME = "stability"
ABOVE = 0.7
NO_INTERVAL = "it compares dictionaries, which other images would not change"

Array = NDArray[np.float64]


class _Pair(NamedTuple):
    """What is known of two subjects. `jaccard`: [n + 1], of the judged images and of each resample."""

    n_latents: tuple[int, int]
    n_matched: int
    cosine: float
    above: float
    random_cosine: float
    random_above: float
    jaccard: Array
    jaccard_by_chance: float


@dataclass(frozen=True)
class Stability:
    """The pairs of subjects that have been matched; each is matched once, whichever of the two asks."""

    judged: Judged
    pairs: dict[frozenset[str], _Pair] = field(default_factory=dict)

    def measure(
        self,
        subject: Subject,
        partners: Sequence[Subject] | Skipped,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Measured | Skipped]:
        """The four numbers of a subject, each the mean over its partners.

        Args:
            partners: from `find_partners`. There are no numbers where the list is empty.
            on_progress: called with (images done, in all), over all partners.
        """
        if isinstance(partners, Skipped):
            return [partners]
        if not partners:
            return []
        if importlib.util.find_spec("scipy") is None:
            return [Skipped(NAME, "matching latents needs the package scipy: pip install 'patchsae[quality]'")]
        n_images, found = len(self.judged.images), []
        for number, partner in enumerate(partners):
            key = frozenset((subject.name, partner.name))
            if key not in self.pairs:

                def show(done: int, start: int = number * n_images) -> None:
                    on_progress(start + done, n_images * len(partners))

                self.pairs[key] = _compare(subject, partner, self.judged, show)
            found.append(self.pairs[key])
        return _describe(subject, partners, found)


def find_partners(
    subject: Subject, subjects: Sequence[Subject], described: Sequence[BenchmarkSubject]
) -> list[Subject] | Skipped:
    """The subjects that differ from one in nothing but the seed; none for a baseline that has no seed of a training.

    Returns:
        Why there is none, for a run or its untrained SAE, and for all subjects where no run has a partner.
    """
    groups = {each.name: each.group for each in described}
    mine = groups[subject.name]
    if mine is not None:
        return [each for each in subjects if groups[each.name] == mine and each is not subject]
    if subject.baseline in (None, "untrained") or not any(groups.values()):
        reason = "no two runs differ only in their seed; train the same run with another --seed, and give both"
        if any(groups.values()):
            reason = "no other run differs from it only in its seed; train it with another --seed, and give both"
        return Skipped(NAME, reason)
    return []


def _compare(first: Subject, second: Subject, judged: Judged, on_progress: Callable[[int], None]) -> _Pair:
    live = [_find_live(each, judged) for each in (first, second)]
    rows = [each.run.sae().decoder.detach()[latents] for each, latents in zip((first, second), live, strict=True)]
    matched = pair_latents(*rows)
    size, shape = max(1, min(map(len, live))), (len(live[0]), len(live[1]), first.run.d_model)
    random = _match_random(*shape, judged.seed)
    counts = _count_firing((first, second), (live[0][matched.first], live[1][matched.second]), judged, on_progress)
    both, of_first, of_second = counts
    either = of_first + of_second - both
    jaccard = divide(both, either, either > 0)
    n_tokens = len(judged.images) * judged.store.n_read_tokens(judged.store.layout.token_kind(first.tokens))
    expected = of_first[0] * of_second[0] / n_tokens
    known = either > 0  # a resample may leave out all images on which a pair fires
    return _Pair(
        (len(live[0]), len(live[1])), len(matched.first),
        float(matched.cosine.sum() / size), float((matched.cosine > ABOVE).sum() / size),
        float(random.cosine.sum() / size), float((random.cosine > ABOVE).sum() / size),
        divide(np.where(known, jaccard, 0.0).sum(1), known.sum(1).astype(np.float64), known.any(1)),
        float((expected / (of_first[0] + of_second[0] - expected)).mean()) if len(expected) else 0.0,
    )  # fmt: skip


@lru_cache(maxsize=2)
def _match_random(n: int, m: int, d_model: int, seed: int) -> PairedLatents:
    """The matching of two dictionaries of random directions [n, D] and [m, D]."""
    rng = np.random.Generator(np.random.Philox(seed))
    return pair_latents(*(rng.standard_normal((size, d_model), dtype=np.float32) for size in (n, m)))


def _find_live(subject: Subject, judged: Judged) -> NDArray[np.int64]:
    """The latents that fire on judged tokens, ascending."""
    codes, fires = subject.codes, np.zeros(subject.codes.n_latents, dtype=bool)
    step = judged.store.layout.chunk_images
    for first in range(0, len(judged.images), step):
        fires[codes.read_rows(_rows_of(judged.images[first : first + step], codes.n_tokens)).latent] = True
    return np.flatnonzero(fires)


def _rows_of(images: NDArray[np.int64], n_tokens: int) -> NDArray[np.int64]:
    return (images[:, None] * n_tokens + np.arange(n_tokens)).reshape(-1)


def _count_firing(
    subjects: tuple[Subject, Subject],
    latents: tuple[NDArray[np.int64], NDArray[np.int64]],
    judged: Judged,
    on_progress: Callable[[int], None],
) -> Array:
    """[3, n + 1, P]: the tokens on which both latents of a pair fire, the first does, and the second does.

    Args:
        latents: the matched pairs, [P] of each subject.
    """
    n_pairs, step = len(latents[0]), judged.store.layout.chunk_images
    pair_of = []
    for subject, own in zip(subjects, latents, strict=True):
        numbers = np.full(subject.codes.n_latents, -1)
        numbers[own] = np.arange(n_pairs)
        pair_of.append(numbers)
    counts = np.zeros((3, judged.resamples.n + 1, n_pairs))
    for first in range(0, len(judged.images), step):
        images = judged.images[first : first + step]
        drawn = judged.resamples.weights(first, first + len(images))
        weights = np.concatenate([np.ones((1, len(images))), drawn]).astype(np.float32)
        keys: list[NDArray[np.int64]] = []
        for subject, numbers in zip(subjects, pair_of, strict=True):
            rows = _rows_of(images, subject.codes.n_tokens)
            entries = subject.codes.read_rows(rows)
            pair = numbers[entries.latent]
            keys.append((np.searchsorted(rows, entries.row) * n_pairs + pair)[pair >= 0])
        shared = np.intersect1d(keys[0], keys[1], assume_unique=True)
        for number, key in enumerate((shared, *keys)):
            token, pair = np.divmod(key, max(n_pairs, 1))
            place = token // subjects[0].codes.n_tokens * n_pairs + pair
            of_images = np.bincount(place, minlength=len(images) * n_pairs).reshape(len(images), n_pairs)
            counts[number] += weights @ of_images.astype(np.float32)  # whole numbers far below 2^24
        on_progress(first + len(images))
    return counts


def _describe(subject: Subject, partners: Sequence[Subject], pairs: Sequence[_Pair]) -> list[Measured | Skipped]:
    runs = [each.run for each in (subject, *partners)]
    seeds = [run.train_config.seed for run in runs]
    facts: dict[str, object] = {
        "partners": [partner.name for partner in partners],
        "n_latents": [list(pair.n_latents) for pair in pairs],
        "n_matched": [pair.n_matched for pair in pairs],
        "seeds": seeds,
        "initialization": subject.run.train_config.init if subject.baseline is None else "random",
        "shared_initialization": len(set(seeds)) < len(seeds),  # the seed decides the initial weights
        "centered": all(bool(run.sae().mean.any()) for run in runs),
    }
    cosine, above, random_cosine, random_above = (
        float(np.mean([getattr(pair, name) for pair in pairs]))
        for name in ("cosine", "above", "random_cosine", "random_above")
    )
    fixed = {**facts, "no_interval": NO_INTERVAL}
    found: list[Measured | Skipped] = [
        Measured("stability cosine", cosine, None, True, {**fixed, "random": random_cosine}),
        Measured("stability share > 0.7", above, None, True, {**fixed, "random": random_above}),
        Measured("stability above random", cosine - random_cosine, None, True, {**fixed, "random": random_cosine}),
    ]
    jaccard = np.mean([pair.jaccard for pair in pairs], axis=0)
    of_firing = {**facts, "by_chance": float(np.mean([pair.jaccard_by_chance for pair in pairs]))}
    if np.isfinite(jaccard[0]):
        return [*found, Measured("stability jaccard", float(jaccard[0]), jaccard[1:], True, of_firing)]
    return [*found, Skipped("stability jaccard", "no latent that fires on the judged tokens has a partner")]
