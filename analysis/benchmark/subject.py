"""What a benchmark compares, and the images on which it judges.

A Subject is a dictionary with its codes: a run of the user, or a baseline that was made for the comparison. Every
measure takes a Subject and Judged, so that runs and baselines are measured by the same code on the same images.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actcache.store import StoreGroup
from analysis.benchmark.resamples import Resamples
from saetrain import CodeStore, Run
from saetrain.config import Tokens


@dataclass(frozen=True)
class Subject:
    """A dictionary that is compared, with the codes that it gives the store.

    Attributes:
        name: what the tables call it; no two subjects share a name.
        baseline: untrained, pca, raw or k-means; None for a run.
        of: the run that an untrained SAE belongs to.
    """

    name: str
    baseline: str | None
    of: str | None
    run: Run
    codes: CodeStore

    @property
    def tokens(self) -> Tokens:
        """The kind of tokens that have codes."""
        return self.codes.tokens


@dataclass(frozen=True)
class Judged:
    """The images of a benchmark.

    Attributes:
        images: [I] stored positions that are judged, ascending; nobody has learned from them.
        choosing: stored positions of other images, ascending. Whatever is chosen or fitted (latents, the weight of a
            penalty, thresholds, baselines) uses these only.
        resamples: of `images`.
        unsampled: all that may be judged, of which `images` are a sample; None where they are all.
    """

    store: StoreGroup
    images: NDArray[np.int64]
    choosing: NDArray[np.int64]
    resamples: Resamples
    seed: int
    unsampled: NDArray[np.int64] | None = None

    @property
    def may_judge(self) -> NDArray[np.int64]:
        """Stored positions of all images that may be judged, ascending."""
        return self.images if self.unsampled is None else self.unsampled
