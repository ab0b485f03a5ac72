"""Binary matching pursuit: for each attribute of images, up to three latents that fire on the images that have it.

Codes count as binary here: a latent fires on an image, on any of its tokens, or it does not. From r = y, the images
with the attribute, a step takes the latent z of the largest F_beta(r, z), beta = 0.5, which favors precision, answers
yes where it fires, and takes these images out of r. It stops where the F1 of the answer does not rise.
Source: FBMP of sae-concept-eval (arXiv 2606.24716).

A step needs two counts of every latent: of the images of r on which it fires, and of the images without a yes so far on
which it does. These are products of codes and attributes, some images at a time.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from analysis.benchmark.attributes import Marked
from analysis.benchmark.resamples import divide
from saetrain import CodeStore

Array = NDArray[np.float64]

BETA2 = 0.5**2
MOST = 3
"""Latents of a coalition."""
BLOCK_IMAGES = 128
"""Images whose codes are held as an array [images, latents], 6 MB with 12,288 latents."""
NONE = -1


def choose_coalitions(
    codes: CodeStore, marked: Marked, report: Callable[[int], None] = lambda done: None
) -> NDArray[np.int64]:
    """[A, 3] the latents of each attribute, in the order in which they were taken; -1 where there are fewer.

    Args:
        report: called with the number of images that are done, of 3 times as many as are marked.
    """
    known, truth = marked.values >= 0, marked.values == 1
    n_true = truth.sum(0).astype(np.float64)
    answer = np.zeros_like(truth)
    coalitions = np.full((truth.shape[1], MOST), NONE)
    f1, n_hit, n_answer = (np.zeros(truth.shape[1]) for _ in range(3))
    open_ = np.arange(truth.shape[1])
    n_done = 0
    for step in range(MOST):
        hits, fresh = np.zeros((2, codes.n_latents, len(open_)))
        for place, fires in read_fires(codes, marked.images):
            if step:
                answer[place] |= take_latents(fires, coalitions[:, step - 1])
            waiting = known[place] & ~answer[place]
            hits += fires.T @ (waiting & truth[place])[:, open_].astype(np.float32)
            fresh += fires.T @ waiting[:, open_].astype(np.float32)
            n_done += fires.shape[0]
            report(n_done)
        if not step:
            n_fires = fresh
        left = n_true[open_] - n_hit[open_]
        score = divide((1 + BETA2) * hits, BETA2 * left + n_fires, n_fires + left > 0)
        pick = np.nan_to_num(score).argmax(0)
        column = np.arange(len(open_))
        more = hits[pick, column] > 0
        hit, answered = n_hit[open_] + hits[pick, column], n_answer[open_] + fresh[pick, column]
        reached = 2 * hit / (n_true[open_] + answered)
        rises = more & (reached > f1[open_])
        grown = open_[rises]
        coalitions[grown, step], f1[grown] = pick[rises], reached[rises]
        n_hit[grown], n_answer[grown] = hit[rises], answered[rises]
        open_, n_fires = grown, n_fires[:, rises]
        if not len(open_):
            break
    return coalitions


def answer_coalitions(codes: CodeStore, images: NDArray[np.int64], coalitions: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[n, A]: whether a latent of the coalition fires on some images."""
    answer = np.zeros((len(images), len(coalitions)), dtype=bool)
    for place, fires in read_fires(codes, images):
        for latents in coalitions.T:
            answer[place] |= take_latents(fires, latents)
    return answer


def take_latents(fires: NDArray[np.float32], latents: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[B, n]: whether each of n latents fires; none does where the latent is -1."""
    return np.asarray((fires[:, latents] > 0) & (latents != NONE))


def read_fires(codes: CodeStore, images: NDArray[np.int64]) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """(place among `images`, [B, F] 1 where a latent fires on an image and 0 elsewhere), some images at a time.

    Args:
        images: [n] stored positions, ascending.
    """
    tokens = np.arange(codes.n_tokens)
    for start in range(0, len(images), BLOCK_IMAGES):
        part = images[start : start + BLOCK_IMAGES]
        entries = codes.read_rows((part[:, None] * codes.n_tokens + tokens).reshape(-1))
        fires = np.zeros((len(part), codes.n_latents), dtype=np.float32)
        fires[np.searchsorted(part, entries.row // codes.n_tokens), entries.latent] = 1
        yield slice(start, start + len(part)), fires
