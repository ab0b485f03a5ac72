"""Measuring what prompts gain: the accuracy without them and with them, on the same images.

In: towers, prompts, labeled images. Out: AdaptationAccuracy. Classes are told apart by their texts, or by class means
in a model without texts.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache.models import TextTower
from actcache.progress import ProgressWithNote
from actcache.prompts.accuracy import AdaptationAccuracy, ClassAccuracy
from actcache.prompts.class_means import ClassMeans
from actcache.prompts.class_names import class_words
from actcache.prompts.config import PromptConfig
from actcache.prompts.few_shot import ClassSplit
from actcache.prompts.pixels import Pixels, embed_all
from actcache.prompts.prompts import Prompts
from actcache.prompts.towers import Towers, classify, embed_images, prompt_text, prompt_vision

BATCH_TEXTS = 512
"""Number of texts (images x classes) that CoCoOp embeds at once to classify."""


def measure(
    towers: Towers, prompts: Prompts, config: PromptConfig, split: ClassSplit, pixels: Pixels,
    label_names: Sequence[str], *, means: ClassMeans | None = None, on_progress: ProgressWithNote | None = None,
) -> AdaptationAccuracy:  # fmt: skip
    """Measure the accuracy without and with prompts. What was learned for specific classes cannot judge others.

    Args:
        means: what tells classes apart in a model without texts.
    """
    adapts_images = bool(prompts.n_vision)
    total, done = len(pixels) * (1 + adapts_images), 0

    def report(n: int) -> None:
        nonlocal done
        done += n
        if on_progress:
            on_progress(done, total, "measuring")

    labels, learned = np.array(label_names), split.choose(config.classes)
    embed = embed_images if means is None else means.embed
    plain = embed_all(towers.vision, pixels, embed=embed, on_batch=report)
    images = plain
    if adapts_images:
        images = embed_all(prompt_vision(towers.vision, prompts), pixels, embed=embed, on_batch=report)

    def judge(prompts: Prompts | None, embedded: Tensor, names: Sequence[str]) -> NDArray[np.int64]:
        if means is None:
            return predict(towers, prompts, embedded, names, config.template)
        return find_nearest(embedded, means.means[[learned.index(name) for name in names]])

    def score(prompts: Prompts | None, embedded: Tensor) -> ClassAccuracy:
        accuracy: dict[str, float | None] = {}
        per_class: dict[str, float] = {}
        for part in ("all", "base", "novel"):
            names = getattr(split, part)
            tied = prompts is not None and prompts.n_classes is not None and names != learned
            tied |= means is not None and not {*names} <= {*learned}
            rows = np.flatnonzero(np.isin(labels, np.array(names, dtype=str)))
            if tied or len(names) < 2 or not len(rows):
                accuracy[part] = None
                continue
            truth = np.searchsorted(names, labels[rows])
            right = judge(prompts, embedded[torch.from_numpy(rows)], names) == truth
            accuracy[part] = float(right.mean())
            if part == "all":
                per_class = {name: float(right[truth == i].mean()) for i, name in enumerate(names) if i in truth}
        harmonic = harmonic_mean(accuracy["base"], accuracy["novel"])
        return ClassAccuracy(**accuracy, per_class=per_class, harmonic=harmonic)

    return AdaptationAccuracy(score(None, plain), score(prompts, images))


@torch.no_grad()
def predict(
    towers: Towers, prompts: Prompts | None, images: Tensor, names: Sequence[str], template: str
) -> NDArray[np.int64]:
    """[N]: number of the nearest class for unit image embeddings [N, E]."""
    words = [class_words(name, names) for name in names]
    if prompts is not None and prompts.kind.texts_by_image:
        text, size = prompt_text(towers.text, prompts, words), max(1, BATCH_TEXTS // len(words))
        parts = [classify(x, text.embed(prompts, x), 1.0).argmax(1) for x in torch.split(images, size)]
        return np.asarray(torch.cat(parts).cpu().numpy())
    return find_nearest(images, embed_texts(towers.text, prompts, words, template))


def find_nearest(images: Tensor, classes: Tensor) -> NDArray[np.int64]:
    """[N]: number of the nearest of unit vectors [C, E] for unit vectors [N, E]."""
    return np.asarray(classify(images, classes, 1.0).argmax(1).cpu().numpy())


def harmonic_mean(base: float | None, novel: float | None) -> float | None:
    if base is None or novel is None:
        return None
    return 2 * base * novel / (base + novel) if base + novel else 0.0


def embed_texts(text: TextTower, prompts: Prompts | None, names: Sequence[str], template: str) -> Tensor:
    """Unit embeddings [C, E] of class names, with or without prompts (except CoCoOp's, which need an image)."""
    if prompts is None:
        return text.embed_classes(names, [template])
    with torch.no_grad():
        return prompt_text(text, prompts, names).embed(prompts)
