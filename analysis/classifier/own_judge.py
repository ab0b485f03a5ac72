"""The checkpoint's own classifier as a judge: the logits that the model's head gives, over the classes of the images.

The classes of the checkpoint are matched with the labels of the images by what both are called, or by number where
nothing names the classes of the checkpoint.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actcache import SettingsError
from actcache.models import VisionTower, own_classes
from actcache.prompts import Towers
from analysis.classifier.labeled_images import ClassifiedImages
from analysis.results import JudgeFacts


@dataclass(frozen=True)
class OwnJudge:
    """The classes of the images among those of the checkpoint.

    Attributes:
        names: class names, sorted.
        columns: [C] number that each of them has in the checkpoint.
    """

    names: tuple[str, ...]
    columns: Tensor

    @property
    def facts(self) -> JudgeFacts:
        return JudgeFacts("head", "softmax")

    def embed(self, vision: VisionTower, x: Tensor) -> Tensor:
        """The stream after the last block -> logits over all classes of the checkpoint."""
        return vision.head(x)

    def classify(self, features: Tensor) -> Tensor:
        """Logits over all classes of the checkpoint -> logits [B, C]."""
        return features[:, self.columns]

    def evidence(self, features: Tensor) -> Tensor:
        return self.classify(features)


def open_own_judge(images: ClassifiedImages, towers: Towers) -> OwnJudge:
    """Raises SettingsError: the checkpoint has no classifier, or a class is none of its classes or that of another."""
    path, classes = images.store.path, own_classes(towers.vision, towers.n_classes)
    if not classes:
        raise SettingsError(
            f"The model of {path} has no classifier of its own. Judge with --judge probe, or take weights that were "
            "trained to classify."
        )
    labels = sorted({name for name in images.store.images["label_name"].to_pylist() if name})
    columns = match_classes(classes, images.names, images.words, labels)
    for name, column in columns.items():
        same = next(other for other in columns if columns[other] == column)
        if column is not None and same == name:
            continue
        wrong = f"none of the {len(classes):,} classes" if column is None else f"the same class as {same!r} to those"
        raise SettingsError(
            f"{name!r} is {wrong} that the model of {path} was trained on. Name its classes with --class-names, by "
            "text or number, or judge with --judge probe."
        )
    return OwnJudge(images.names, torch.tensor(list(columns.values()), device=towers.vision.device))


def match_classes(
    classes: Sequence[Sequence[str]], names: Sequence[str], words: Sequence[str], labels: Sequence[str]
) -> dict[str, int | None]:
    """The number in the checkpoint of each class, None for one that is none of its classes or could be several.

    A class is known by its WordNet id or its words, in upper or lower case; words that are a number stand for it. Where
    the classes of the checkpoint have no names, and there are as many labels, both are the same in sorted order.

    Args:
        classes: the names of each class of the checkpoint.
        names, words: of the classes of the images.
        labels: all labels of the images, sorted.
    """
    known: defaultdict[str, set[int]] = defaultdict(set)
    for number, texts in enumerate(classes):
        for text in texts:
            known[_plain(text)].add(number)
    unnamed = not known and len(labels) == len(classes)
    columns: dict[str, int | None] = {}
    for name, text in zip(names, words, strict=True):
        if text.isdecimal():
            numbers = {int(text)} & set(range(len(classes)))
        else:
            numbers = known.get(_synset(name)) or known.get(_plain(text)) or known.get(_plain(name)) or set()
        if not numbers and unnamed:
            numbers = {labels.index(name)}
        columns[name] = numbers.pop() if len(numbers) == 1 else None
    return columns


def _plain(text: str) -> str:
    return text.strip().lower().replace("_", " ")


def _synset(name: str) -> str:
    """n01440764_tench -> n01440764."""
    match = re.match(r"[nvars]\d{8}(?![^\W_])", name)
    return match[0] if match else ""
