"""M5 `monosemanticity`: how alike the images of a latent are to another model, weighted by how strongly it fires.

    MS = sum_{a<b} w_a w_b cos(e_a, e_b) / sum_{a<b} w_a w_b = (||sum w e||^2 - sum w^2) / ((sum w)^2 - sum w^2)

over the 16 images with the largest c, with w = (c - min c) / (max c - min c) over all images, and e the mean patch of
the other model as a unit vector. All such vectors lie in a narrow cone, so the floor is high.
"""

import numpy as np
from numpy.typing import NDArray

from actcache.store import StoreGroup
from analysis.benchmark.measured import Measured
from analysis.benchmark.visaebench.images import ProtocolImages
from analysis.benchmark.visaebench.localization import sample
from analysis.benchmark.visaebench.pairs import Totals

NAME = "monosemanticity"
MOST_LATENTS, N_TOP = 1000, 16
BLOCK = 64


def choose_alive(totals: Totals) -> NDArray[np.int64]:
    """The package's sample of the latents that fire on some image, ascending."""
    return sample(np.flatnonzero(totals.alive), MOST_LATENTS)


class TopImages:
    """The images with the largest c of each of some latents: `place` [k, 16] (-1: none) and `c` [k, 16]."""

    def __init__(self, latents: NDArray[np.int64], n_latents: int) -> None:
        self.latents = latents
        self.place = np.full((len(latents), N_TOP), -1, dtype=np.int64)
        self.c = np.zeros((len(latents), N_TOP), np.float32)
        self._number = np.full(n_latents, -1)
        self._number[latents] = np.arange(len(latents))

    def add(self, latent: NDArray[np.int64], place: NDArray[np.int64], c: NDArray[np.float32]) -> None:
        number = self._number[latent]
        wanted = number >= 0
        wanted[wanted] = c[wanted] > self.c[number[wanted], -1]
        held = self.place >= 0
        number = np.concatenate([np.nonzero(held)[0], number[wanted]])
        place = np.concatenate([self.place[held], place[wanted]])
        c = np.concatenate([self.c[held], c[wanted]])
        order = np.lexsort((place, -c, number))
        number, place, c = number[order], place[order], c[order]
        nth = np.arange(len(number)) - np.searchsorted(number, number)
        top = nth < N_TOP
        self.place[number[top], nth[top]], self.c[number[top], nth[top]] = place[top], c[top]


def measure_monosemanticity(top: TopImages, totals: Totals, images: ProtocolImages, embeddings: StoreGroup) -> Measured:
    """`embeddings`: the same images in another model, at one hook point."""
    needed = np.unique(top.place[top.place >= 0])
    vectors = _read_embeddings(embeddings, images.images[needed])
    low = totals.smallest[top.latents].astype(np.float64)[:, None]
    spread = totals.largest[top.latents].astype(np.float64)[:, None] - low
    weights = np.where(top.place >= 0, top.c - low, 0) / np.where(spread > 0, spread, 1)
    place = np.searchsorted(needed, np.maximum(top.place, needed[0] if len(needed) else 0))
    scores = []
    for first in range(0, len(weights), BLOCK):
        w = weights[first : first + BLOCK]
        summed = np.einsum("bk,bkd->bd", w, vectors[place[first : first + BLOCK]])
        own = (w**2).sum(1)
        pairs = w.sum(1) ** 2 - own
        some = np.count_nonzero(w, axis=1) > 1
        scores.append(((summed**2).sum(1) - own)[some] / pairs[some])
    ms = np.concatenate(scores) if scores else np.empty(0)
    facts: dict[str, object] = {
        "ms_std": float(ms.std()) if len(ms) else 0.0, "ms_median": float(np.median(ms)) if len(ms) else 0.0,
        "num_features_scored": len(ms), "num_dead_features": int((~totals.alive).sum()),
        "embeddings": f"{embeddings.path.name}, {embeddings.hook_point(None)}",
    }  # fmt: skip
    return Measured(NAME, float(ms.mean()) if len(ms) else 0.0, None, True, facts)


def _read_embeddings(store: StoreGroup, stored: NDArray[np.int64]) -> NDArray[np.float64]:
    """[len(stored), D]: the mean patch of each image, as a unit vector."""
    step, hook_point = store.layout.chunk_images, store.hook_point(None)
    parts = [
        store.read(hook_point, images=stored[first : first + step], tokens="patch", check=store.checks_cheaply)
        .astype(np.float32)
        .mean(1, dtype=np.float64)
        for first in range(0, len(stored), step)
    ]
    vectors = np.concatenate(parts) if parts else np.empty((0, store.layout.d_model))
    unit: NDArray[np.float64] = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit
