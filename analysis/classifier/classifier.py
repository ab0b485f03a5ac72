"""A classifier behind a hook point: cached activations in, logits over classes out.

Only the blocks after the hook point run, then the judge reads the stream. Promises: with unchanged activations the
logits are those of a full forward pass, up to the rounding of the stored dtype.
Shapes: B images of a batch, T tokens (special tokens, patches, prompts), D d_model, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from actcache import HookPoint
from actcache.models import VisionTower
from actcache.store import StoreGroup
from analysis.classifier.judge import Judge
from analysis.classifier.labeled_images import ClassifiedImages
from analysis.classifier.streams import read_stream


@dataclass(frozen=True)
class Classifier:
    """A store, the model behind one of its hook points, and the judge that tells classes apart.

    Attributes:
        labels: [I] class number of every image of the store, -1 for images that are not selected.
    """

    store: StoreGroup
    hook_point: HookPoint
    vision: VisionTower
    labels: NDArray[np.int64]
    judge: Judge

    @classmethod
    def of(cls, images: ClassifiedImages, vision: VisionTower, judge: Judge) -> "Classifier":
        return cls(images.store, images.hook_point, vision, images.labels, judge)

    @property
    def names(self) -> tuple[str, ...]:
        """Class names, sorted."""
        return self.judge.names

    @property
    def images(self) -> NDArray[np.int64]:
        """Stored positions of the selected images."""
        return np.flatnonzero(self.labels >= 0)

    def read(self, images: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """The stream at the hook point, [B, T, D] float32 on the model's device."""
        return read_stream(self.store, self.hook_point, images).to(self.vision.device)

    def embed(self, x: Tensor) -> Tensor:
        """The stream at the hook point [B, T, D] -> what the judge reads, [B, E]."""
        x = self.vision.run_blocks(x, self.hook_point.layer + 1, self.vision.n_layers)
        return self.judge.embed(self.vision, x)

    def classify(self, features: Tensor) -> Tensor:
        """What the judge reads [B, E] -> logits [B, C]."""
        return self.judge.classify(features)

    def logits(self, x: Tensor) -> Tensor:
        """The stream at the hook point [B, T, D] -> logits [B, C]."""
        return self.classify(self.embed(x))
