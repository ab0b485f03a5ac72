"""Masks over latents, and what the classifier says through them.

In: how often latents fire, by class. Out: the outcome of every mask, its latents kept and dropped. Each batch is read
and encoded once; a mask decodes the entries it keeps, what it drops is the difference.
Shapes: B images, C classes, F latents.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from analysis.classifier import BATCH_IMAGES, Outcome, Outcomes, Spliced, ZeroShot, as_numpy, batches, splice
from analysis.interventions.latent_choice import LatentCounts, match_frequency, rank_latents
from analysis.interventions.study import Report, Study
from saetrain import SAE


@dataclass(frozen=True)
class Mask:
    """k latents for each class, or one list for all.

    Attributes:
        selection: class, predicted, dataset, list or random.
        draw: number of the random draw; 0 else.
        lists: [C, k] or [1, k], -1 behind the last.
    """

    selection: str
    k: int
    draw: int
    lists: Tensor

    def table(self, classes: Tensor, n_latents: int) -> Tensor:
        """[B, F]: true for the latents of each image's class [B]; class -1 has none."""
        rows = self.lists[classes.clamp(min=0) if len(self.lists) > 1 else torch.zeros_like(classes)]
        rows = torch.where((rows >= 0) & (classes >= 0)[:, None], rows, n_latents)  # one column more takes the rest
        table = torch.zeros(len(classes), n_latents + 1, dtype=torch.bool, device=classes.device)
        return table.scatter_(1, rows, True)[:, :n_latents]


@torch.no_grad()
def count_in_stream(
    sae: SAE, tokens: str, scene: ZeroShot, images: NDArray[np.int64], labels: NDArray[np.int64], *, tau: float,
    batch_size: int = BATCH_IMAGES,
) -> tuple[LatentCounts, NDArray[np.bool_]]:  # fmt: skip
    """(a_c[s] of some images, encoded here and now; [F] whether a latent fired on them).

    Args:
        labels: [I] class of each image of the store.
    """
    counts = LatentCounts.empty(len(scene.names), sae.config.size)
    fired = np.zeros(sae.config.size, dtype=np.bool_)
    sae = sae.to(scene.vision.device)
    for part in batches(images, batch_size):
        spliced = splice(sae, scene.read(part), scene.store.n_tokens, tokens)
        above = spliced.values > tau
        counts.add(labels[part[as_numpy(spliced.images[above])]], as_numpy(spliced.latents[above]))
        fired[as_numpy(spliced.latents)] = True
    return counts, fired


def make_masks(counts: LatentCounts, grid: list[int], listed: list[int], n_random: int, seed: int) -> list[Mask]:
    """For each k the masks of class, predicted class and dataset (or of the list), and the random draws."""
    rng = np.random.Generator(np.random.Philox(seed))
    total = counts.by_dataset
    masks = []
    ranked = rank_latents(counts.by_class, max(grid)) if not listed else np.array([listed])
    dataset = rank_latents(total[None], max(grid))
    for k in grid:
        own = ranked[:, :k]
        chosen = {"list": own} if listed else {"class": own, "predicted": own, "dataset": dataset[:, :k]}
        masks += [Mask(selection, k, 0, torch.from_numpy(lists)) for selection, lists in chosen.items()]
        for draw in range(n_random):
            drawn = match_frequency(own, total, rng=rng)
            if drawn is not None:  # else there are not k others: no control
                masks.append(Mask("random", k, draw, torch.from_numpy(drawn)))
    return masks


Key = tuple[str, str, int | str, int]
"""(selection, mode, k, draw)."""


def judge_masks(
    study: Study, judged: NDArray[np.int64], masks: list[Mask], keep_error: bool, on_progress: Report | None
) -> dict[Key, Outcome]:
    """The outcome of the original, of all and no latents, and of each mask kept and dropped, on the judged images."""
    scene, n_latents = study.scene, study.sae.config.size
    found: dict[Key, Outcomes] = {}
    masks = [Mask(m.selection, m.k, m.draw, m.lists.to(scene.vision.device)) for m in masks]
    for images, spliced in study.batches(judged, on_progress):
        truth = scene.labels[images]
        label = torch.from_numpy(truth).to(scene.vision.device)
        rest: Tensor | float = spliced.error if keep_error else 0.0

        def run(new: Tensor, key: Key, truth: NDArray[np.int64] = truth, x: Spliced = spliced) -> Tensor:
            logits = scene.logits(x.stream(new))
            found.setdefault(key, Outcomes()).add(logits, truth)
            return logits

        predicted = run(spliced.old, ("all", "original", "all", 0)).argmax(1)
        run(spliced.whole + rest, ("all", "keep", "all", 0))
        run(spliced.nothing + rest + torch.zeros_like(spliced.old), ("all", "drop", "all", 0))
        by_class: dict[tuple[str, int], Tensor] = {}
        for mask in masks:
            wrong = predicted != label if mask.selection == "predicted" else torch.ones_like(label, dtype=torch.bool)
            guess = predicted if mask.selection == "predicted" else label
            kept = spliced.keep(mask.table(torch.where(wrong, guess, -1), n_latents))
            for mode, new in (("keep", kept), ("drop", spliced.drop(kept))):
                key: Key = (mask.selection, mode, mask.k, mask.draw)
                if mask.selection != "predicted":
                    logits = run(new + rest, key)
                else:  # where the model is right, its mask is the class's
                    logits = by_class[mode, mask.k].clone()
                    if bool(wrong.any()):
                        logits[wrong] = scene.logits(spliced.stream(new + rest)[wrong])
                    found.setdefault(key, Outcomes()).add(logits, truth)
                if mask.selection == "class":
                    by_class[mode, mask.k] = logits
    return {key: outcomes.result() for key, outcomes in found.items()}
