"""k latents chosen with either of two models, classified with either: the four settings, and their controls.

In: one SAE, both models' classifiers behind its hook point, counts of latents on the images they are chosen on. Out:
for every condition what was said of each judged image. Each batch is read and encoded once a model; a mask decodes the
entries it keeps, and only the blocks after the hook point run.

Source: PatchSAE (arXiv 2412.05276) section 4.2.2, figure 5c; swapped texts, dataset-level and random masks are
controls.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from analysis.classifier import BATCH_IMAGES, Outcome, Outcomes, ZeroShot, batches, splice
from analysis.interventions import LatentCounts, Mask, match_frequency, rank_latents
from saetrain import SAE

MODELS = ("base", "adapted")


class Condition(NamedTuple):
    """What a classifier saw.

    Attributes:
        model: whose image tower, and whose texts unless `selection` is swap.
        chosen_by: whose latents; `all` where none were chosen.
        selection: class, dataset, random; all: every latent; original, swap: the stream as it is.
        k, draw: latents kept, number of the random draw; 0 else.
        keep_error: whether what the SAE does not explain was added.
    """

    model: str
    chosen_by: str
    selection: str
    k: int = 0
    draw: int = 0
    keep_error: bool = False


@dataclass(frozen=True)
class Round:
    """One seed: which images latents are chosen on, which are judged (stored positions), and what came out."""

    seed: int
    chosen: NDArray[np.int64]
    judged: NDArray[np.int64]
    outcomes: Mapping[Condition, Outcome]

    def right(self, condition: Condition) -> NDArray[np.float64]:
        """[n]: 1 where the class was right."""
        return self.outcomes[condition].right.astype(np.float64)


def make_masks(
    counts: Mapping[str, LatentCounts], grid: Sequence[int], n_random: int, seed: int
) -> Iterator[tuple[str, Mask]]:
    """(chosen by, mask): the k most frequent latents of each class, of the dataset, and random ones as frequent as the
    classes'; a random draw is left out where too few latents are left for it."""
    rng = np.random.Generator(np.random.Philox(seed))
    for name, found in counts.items():
        total = found.by_dataset
        ranked, whole = (rank_latents(some, max(grid)) for some in (found.by_class, total[None]))
        for k in grid:
            yield name, Mask("class", k, 0, torch.from_numpy(ranked[:, :k]))
            yield name, Mask("dataset", k, 0, torch.from_numpy(whole[:, :k]))
            for draw in range(n_random):
                drawn = match_frequency(ranked[:, :k], total, rng=rng)
                if drawn is not None:
                    yield name, Mask("random", k, draw, torch.from_numpy(drawn))


@torch.no_grad()
def judge(
    sae: SAE, tokens: str, scenes: Mapping[str, ZeroShot], judged: NDArray[np.int64],
    masks: Iterable[tuple[str, Mask]] = (), *, batch_size: int = BATCH_IMAGES,
    report: Callable[[int], None] = lambda n_images: None,
) -> dict[Condition, Outcome]:  # fmt: skip
    """Every condition's outcome on the judged images, in their order.

    Args:
        scenes: of both MODELS, on one set of images and classes.
        report: called with the number of images of each batch.
    """
    found: dict[Condition, Outcomes] = {}
    device = scenes["base"].vision.device
    sae = sae.to(device)
    masks = [(name, Mask(m.selection, m.k, m.draw, m.lists.to(device))) for name, m in masks]
    for images in batches(judged, batch_size):
        truth = scenes["base"].labels[images]
        label = torch.from_numpy(truth).to(device)
        tables = [mask.table(label, sae.config.size) for _, mask in masks]
        for model, scene in scenes.items():
            other = scenes[MODELS[1 - MODELS.index(model)]]
            spliced = splice(sae, scene.read(images), scene.store.n_tokens, tokens)

            def add(condition: Condition, logits: Tensor, truth: NDArray[np.int64] = truth) -> None:
                found.setdefault(condition, Outcomes()).add(logits, truth)

            embedded = scene.embed(spliced.x)
            add(Condition(model, "all", "original"), scene.classify(embedded))
            add(Condition(model, "all", "swap"), other.classify(embedded))
            for keep_error in (False, True):
                rest: Tensor | float = spliced.error if keep_error else 0.0
                condition = Condition(model, "all", "all", keep_error=keep_error)
                add(condition, scene.logits(spliced.stream(spliced.whole + rest)))
            for (chosen_by, mask), table in zip(masks, tables, strict=True):
                kept = spliced.keep(table)
                for keep_error in (False, True):
                    condition = Condition(model, chosen_by, mask.selection, mask.k, mask.draw, keep_error)
                    add(condition, scene.logits(spliced.stream(kept + (spliced.error if keep_error else 0.0))))
        report(len(images))
    return {condition: outcomes.result() for condition, outcomes in found.items()}
