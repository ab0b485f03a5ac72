"""Masks over latents, and how the classifiers of one or two models classify images under them.

In: how often latents fire, by class. Out: the outcome of every condition. Each batch is read and encoded once per
model; a mask decodes only the entries it keeps, and what it drops is the difference.
Shapes: B images, C classes, F latents.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from analysis.classifier import BATCH_IMAGES, Outcome, Outcomes, ZeroShot, as_numpy, batches, splice
from analysis.interventions.latent_choice import LatentCounts, match_frequency, rank_latents
from saetrain import SAE


@dataclass(frozen=True)
class LatentMask:
    """k latents for each class, or one list for all images.

    Attributes:
        selection: class, predicted, dataset, list or random.
        draw: number of the random draw; otherwise 0.
        lists: [C, k] or [1, k], -1 behind the last.
        chosen_by: the model whose latents these are, if there are two models.
    """

    selection: str
    k: int
    draw: int
    lists: Tensor
    chosen_by: str = ""

    def table(self, classes: Tensor, n_latents: int) -> Tensor:
        """[B, F]: true for the latents of each image's class [B]; class -1 has none."""
        rows = self.lists[classes.clamp(min=0) if len(self.lists) > 1 else torch.zeros_like(classes)]
        rows = torch.where((rows >= 0) & (classes >= 0)[:, None], rows, n_latents)  # one extra column takes the rest
        table = torch.zeros(len(classes), n_latents + 1, dtype=torch.bool, device=classes.device)
        return table.scatter_(1, rows, True)[:, :n_latents]


class Condition(NamedTuple):
    """What a classifier sees.

    Attributes:
        model: the model whose image tower is used, and whose texts are used unless `selection` is swap.
        chosen_by: the model whose latents are kept or dropped; `all` if none were chosen.
        selection: that of the mask; all: every latent; original: the stream itself; swap: the stream itself with
            the other model's texts.
        k, draw: those of the mask; otherwise 0.
        keep_error: whether the error term was added.
        mode: keep or drop the latents.
    """

    model: str
    chosen_by: str
    selection: str
    k: int = 0
    draw: int = 0
    keep_error: bool = False
    mode: str = "keep"


def make_masks(
    counts: LatentCounts, grid: Sequence[int], n_random: int, rng: np.random.Generator, *,
    listed: Sequence[int] = (), chosen_by: str = "",
) -> list[LatentMask]:  # fmt: skip
    """For each k: the k most frequent latents of each class and of the dataset, and random ones as frequent as these.

    A random draw is left out if too few latents remain for it.

    Args:
        listed: a list that takes the place of the classes' and the dataset's latents.
    """
    total = counts.by_dataset
    ranked = np.array([listed]) if listed else rank_latents(counts.by_class, max(grid))
    dataset = rank_latents(total[None], max(grid))
    masks = []

    def add(selection: str, k: int, lists: NDArray[np.int64], draw: int = 0) -> None:
        masks.append(LatentMask(selection, k, draw, torch.from_numpy(lists), chosen_by))

    for k in grid:
        chosen = ranked[:, :k]
        add("list" if listed else "class", k, chosen)
        if not listed:
            add("dataset", k, dataset[:, :k])
        for draw in range(n_random):
            if (drawn := match_frequency(chosen, total, rng=rng)) is not None:
                add("random", k, drawn, draw)
    return masks


def add_predicted(masks: Iterable[LatentMask]) -> list[LatentMask]:
    """The masks, and after each class's mask the same for the class that the model itself predicts."""
    selections = {"class": ("class", "predicted")}
    return [replace(mask, selection=s) for mask in masks for s in selections.get(mask.selection, (mask.selection,))]


@torch.no_grad()
def count_in_stream(
    sae: SAE, tokens: str, classifier: ZeroShot, images: NDArray[np.int64], labels: NDArray[np.int64], *, tau: float,
    batch_size: int = BATCH_IMAGES,
) -> tuple[LatentCounts, NDArray[np.bool_]]:  # fmt: skip
    """(a_c[s] of some images, encoded on the spot; [F] whether a latent fired on them).

    Args:
        labels: [I] class of each image of the store.
    """
    counts = LatentCounts.empty(len(classifier.names), sae.config.n_latents)
    fired = np.zeros(sae.config.n_latents, dtype=np.bool_)
    sae = sae.to(classifier.vision.device)
    for part in batches(images, batch_size):
        spliced = splice(sae, classifier.read(part), classifier.store.layout, tokens)
        above = spliced.values > tau
        counts.add(labels[part[as_numpy(spliced.images[above])]], as_numpy(spliced.latents[above]))
        fired[as_numpy(spliced.latents)] = True
    return counts, fired


@torch.no_grad()
def classify_masked(
    classifiers: Mapping[str, ZeroShot], sae: SAE, tokens: str, images: NDArray[np.int64],
    masks: Iterable[LatentMask] = (), *, modes: Sequence[str] = ("keep",),
    keep_errors: Sequence[bool] = (False, True), batch_size: int = BATCH_IMAGES,
    report: Callable[[int], None] = lambda n_images: None,
) -> dict[Condition, Outcome]:  # fmt: skip
    """The outcome of each model's stream itself, of all latents, and of each mask, on some images in their order.

    Args:
        classifiers: those of one model, or of two models on the same images and classes.
        modes: keep and drop.
        keep_errors: whether to add the error term; both values may be given.
        report: called with the number of images of each batch.
    """
    outcomes: dict[Condition, Outcomes] = {}
    device = next(iter(classifiers.values())).vision.device
    sae, n_latents = sae.to(device), sae.config.n_latents
    masks = [replace(mask, lists=mask.lists.to(device)) for mask in masks]
    for part in batches(images, batch_size):
        for model, classifier in classifiers.items():
            truth = classifier.labels[part]
            label = torch.from_numpy(truth).to(device)
            x = splice(sae, classifier.read(part), classifier.store.layout, tokens)

            def add(condition: Condition, logits: Tensor, truth: NDArray[np.int64] = truth) -> Tensor:
                outcomes.setdefault(condition, Outcomes()).add(logits, truth)
                return logits

            embedded = classifier.embed(x.x)
            predicted = add(Condition(model, "all", "original"), classifier.classify(embedded)).argmax(1)
            wrong = predicted != label
            for other in classifiers.keys() - {model}:
                add(Condition(model, "all", "swap"), classifiers[other].classify(embedded))
            rest: dict[bool, Tensor | float] = {keep: x.error if keep else 0.0 for keep in keep_errors}
            for keep_error in keep_errors:
                for mode in modes:
                    new = x.whole if mode == "keep" else x.nothing + torch.zeros_like(x.old)
                    condition = Condition(model, "all", "all", keep_error=keep_error, mode=mode)
                    add(condition, classifier.logits(x.stream(new + rest[keep_error])))
            logits: dict[Condition, Tensor] = {}
            for mask in masks:
                by_prediction = mask.selection == "predicted"
                classes = torch.where(wrong, predicted, -1) if by_prediction else label
                kept = x.keep(mask.table(classes, n_latents))
                for keep_error in keep_errors:
                    for mode in modes:
                        condition = Condition(
                            model, mask.chosen_by, mask.selection, mask.k, mask.draw, keep_error, mode
                        )
                        new = (kept if mode == "keep" else x.drop(kept)) + rest[keep_error]
                        if by_prediction:  # where the model is right, its mask is that of the class
                            whole = logits[condition._replace(selection="class")].clone()
                            if bool(wrong.any()):
                                whole[wrong] = classifier.logits(x.stream(new)[wrong])
                        else:
                            whole = classifier.logits(x.stream(new))
                        logits[condition] = add(condition, whole)
        report(len(part))
    return {condition: collected.result() for condition, collected in outcomes.items()}
