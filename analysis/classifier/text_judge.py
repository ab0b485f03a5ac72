"""The zero-shot judge: an image belongs to the class whose text is nearest to it.

    logit = scale x cosine [+ bias]

The bias is SigLIP's. It changes neither a prediction nor the softmax loss, but the sigmoid loss depends on it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from actcache.models import VisionTower
from actcache.prompts import Towers, warn_about_shared_texts
from analysis.classifier.labeled_images import ClassifiedImages
from analysis.results import JudgeFacts

BATCH_TEXTS = 512
"""Texts that CoCoOp embeds at once: images x classes."""


@dataclass(frozen=True)
class TextJudge:
    """Class texts, embedded.

    Attributes:
        names: class names, sorted.
        classes: [C, E] unit text embeddings; of `by_image` none, [0, E].
        logit_scale: factor that cosines are multiplied with.
        logit_bias: what is added to them afterwards, of a model that was trained with the sigmoid loss.
        by_image: CoCoOp's texts, which differ from image to image: unit image embeddings [B, E] -> [B, C, E].
    """

    names: tuple[str, ...]
    classes: Tensor
    logit_scale: float
    logit_bias: float | None = None
    by_image: Callable[[Tensor], Tensor] | None = None

    @property
    def facts(self) -> JudgeFacts:
        return JudgeFacts("zero-shot", "softmax" if self.logit_bias is None else "sigmoid")

    def embed(self, vision: VisionTower, x: Tensor) -> Tensor:
        """The stream after the last block -> unit image embeddings [B, E]."""
        return F.normalize(vision.head(x), dim=1)

    def classify(self, features: Tensor) -> Tensor:
        """Unit image embeddings [B, E] -> logits [B, C]."""
        if self.by_image is None:
            logits = self.logit_scale * features @ self.classes.T
        else:
            parts = torch.split(features, max(1, BATCH_TEXTS // len(self.names)))
            logits = self.logit_scale * torch.cat([torch.einsum("be,bce->bc", x, self.by_image(x)) for x in parts])
        return logits if self.logit_bias is None else logits + self.logit_bias

    def evidence(self, features: Tensor) -> Tensor:
        """Unit image embeddings [B, E] -> cosines with the class texts [B, C]."""
        return features @ self.classes.T


def open_text_judge(images: ClassifiedImages, towers: Towers, *, by_image: bool = False) -> TextJudge:
    """The texts of the images' classes, embedded by the model.

    Args:
        by_image: accept CoCoOp's prompts too, whose class texts differ from image to image.

    Raises:
        SettingsError: a model without a text tower, CoCoOp's prompts without `by_image`, or prompts that were trained
            for other classes.
    """
    text = towers.text
    warn_about_shared_texts(images.names, images.words)
    texts_by_image = towers.texts_by_image(images.words) if by_image else None
    if texts_by_image is None:
        classes = towers.embed_classes(images.words, images.templates)
    else:
        classes = torch.empty(0, text.embed_dim)
    return TextJudge(images.names, classes, text.logit_scale, text.logit_bias, texts_by_image)
