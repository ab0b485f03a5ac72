"""Judges: what reads the model's stream after its last block and says which class an image belongs to.

    zero-shot   the class whose text is nearest (text_judge.py)
    head        the checkpoint's own classifier (own_judge.py)
    probe       a linear classifier, trained on other images than those it judges (probe.py)

A judge reads the stream in two steps, so that features can be edited or judged by another judge: embed, then classify.
Gradients flow through both.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from actcache import SettingsError
from actcache.models import VisionTower
from actcache.prompts import Towers
from analysis.classifier.labeled_images import ClassifiedImages
from analysis.classifier.own_judge import open_own_judge
from analysis.classifier.probe import LinearProbe
from analysis.classifier.text_judge import open_text_judge
from analysis.results import JudgeFacts


class Judge(Protocol):
    """Shapes: B images, T tokens, D d_model, E features, C classes."""

    @property
    def names(self) -> tuple[str, ...]:
        """Class names, sorted."""

    @property
    def facts(self) -> JudgeFacts:
        """What a result records of the judge."""

    def embed(self, vision: VisionTower, x: Tensor) -> Tensor:
        """The stream after the last block [B, T, D] -> features [B, E]."""

    def classify(self, features: Tensor) -> Tensor:
        """Features [B, E] -> logits [B, C]."""

    def evidence(self, features: Tensor) -> Tensor:
        """Features [B, E] -> what speaks for each class [B, C]: cosines with texts, or logits."""


def open_judge(
    kind: str, images: ClassifiedImages, towers: Towers, *, probe: LinearProbe | None = None, by_image: bool = False
) -> Judge:
    """The judge of a kind for some images.

    Args:
        probe: a fitted probe, for the kind `probe`.
        by_image: accept CoCoOp's prompts, see `open_text_judge`.

    Raises:
        SettingsError: see `open_text_judge`, `open_own_judge`.
    """

    def open_probe() -> Judge:
        assert probe is not None
        return probe.among(images.names)

    openers: Mapping[str, Callable[[], Judge]] = {
        "zero-shot": lambda: open_text_judge(images, towers, by_image=by_image),
        "head": lambda: open_own_judge(images, towers),
        "probe": open_probe,
    }
    return openers[kind]()


def choose_judge(asked: str, images: ClassifiedImages, towers: Towers) -> str:
    """The kind of judge; of `auto` the first that the model has: texts, then a classifier for these classes."""
    if asked != "auto":
        return asked
    if towers.text_tower is not None:
        return "zero-shot"
    try:
        open_own_judge(images, towers)
    except SettingsError:
        return "probe"
    return "head"
