"""delete_latents(): which latents the model's decision rests on, and a test of that claim.

    R = z dy/dz        attribution of an active entry, y = cos(image embedding, text of the predicted class), or for a
                       judge without texts the logit of the predicted class

The error term is passed through: x' = decode(z) + (x - decode(z)).detach() leaves the output unchanged, so that one
backward pass through the blocks after the hook point gives dy/dz for all entries. Latents (R summed over the tokens)
are then deleted, the largest first, and y is measured again: a good attribution makes it fall fast. The alternatives
are deletion by activation (z), energy (z times the norm of the decoder row), logit lens (z times what y would be for
the direction alone), and at random among the active latents.

Source: Dreyer et al. 2025 (arXiv 2505.20229). Shapes as in splicing.py.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache import SettingsError
from actcache.progress import Progress
from actcache.store import StoreGroup, Stores
from analysis.classifier import Classifier, Spliced, as_numpy, read_directions
from analysis.config import DeletionConfig, ModelOptions, StudyConfig
from analysis.intervals import bootstrap_intervals
from analysis.interventions.study import Study, open_inputs, run_study
from analysis.results import Deletion, DeletionMargin, DeletionPoint, Head
from saetrain import Run

METHODS = ("attribution", "activation", "energy", "lens", "random")
BLOCK_ENTRIES = 1 << 16
"""Entries whose dictionary rows are gathered at once: 200 MB at width 768."""


def measure_evidence(classifier: Classifier, x: Tensor, targets: Tensor) -> Tensor:
    """y [B] of the stream x [B, T, D] for each image's class [B]: a cosine with its text, or its logit."""
    evidence: Tensor = classifier.judge.evidence(classifier.embed(x))
    return evidence.gather(1, targets[:, None])[:, 0]


def attribute(classifier: Classifier, spliced: Spliced, targets: Tensor) -> Tensor:
    """R = z dy/dz of each active entry, [N].

    Args:
        targets: [B] class that y is about.
    """
    with torch.enable_grad():
        x = spliced.x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(measure_evidence(classifier, x, targets).sum(), x)
    rows = gradient[:, spliced.part].flatten(0, 1)  # dy/dx' of the replaced tokens
    sae, parts = spliced.sae, []
    for first in range(0, len(spliced.rows), BLOCK_ENTRIES):
        part = slice(first, first + BLOCK_ENTRIES)
        parts.append((rows[spliced.rows[part]] * sae.decoder[spliced.latents[part]]).sum(1))
    if not parts:
        return spliced.values
    units = spliced.units.flatten()[spliced.rows] if sae.config.per_token else spliced.units
    return spliced.values * torch.cat(parts) / units


def delete_latents(
    run: Run | str | Path,
    store: Stores | StoreGroup,
    out: str | Path | None = None,
    config: DeletionConfig = DeletionConfig(),
    *,
    study: StudyConfig = StudyConfig(),
    model: ModelOptions = ModelOptions(),
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> Deletion:
    """Measure the deletion curves.

    Args:
        The same as those of `mask_latents`.

    Raises:
        SettingsError, ParentMismatchError: see `run_study`.
    """
    run, store = open_inputs(run, store)
    if not config.n:
        raise SettingsError("--n must be given at least once, got none.")
    grid = [0, *sorted(set(config.n))]

    def measure(head: Head, studies: Iterator[Study]) -> Deletion:
        (opened,) = studies
        values = _delete(opened, grid, config.keep_error, on_progress)  # [I, M, n]
        low, high = bootstrap_intervals(values.reshape(len(values), -1), seed=study.seed)
        x = np.log1p(np.array(grid))
        areas = np.trapezoid(values, x, axis=2) / (x[-1] - x[0])  # [I, M]
        margins = areas[:, 1:] - areas[:, :1]
        margin_bounds = bootstrap_intervals(margins, seed=study.seed)
        keys = [(method, n) for method in METHODS for n in grid]
        points = zip(keys, values.mean(0).reshape(-1).tolist(), low.tolist(), high.tolist(), strict=True)
        differences = zip(METHODS[1:], margins.mean(0).tolist(), *(b.tolist() for b in margin_bounds), strict=True)
        return Deletion(
            *head, *opened.facts, n_judged=len(values),
            curve=tuple(DeletionPoint(*key, *numbers) for key, *numbers in points),
            areas=dict(zip(METHODS, areas.mean(0).tolist(), strict=True)),
            margins=tuple(DeletionMargin(*difference) for difference in differences),
        )  # fmt: skip

    settings = {"n": grid, "keep_error": config.keep_error}
    return run_study(
        Deletion, [run], store, out, measure, settings=settings, study=study, model=model, overwrite=overwrite
    )


def score_latents(study: Study, spliced: Spliced, targets: Tensor, lens: Tensor, rng: torch.Generator) -> Tensor:
    """Scores of each image's latents by every method, [M, B, F]; -inf where a latent is silent.

    Args:
        lens: [F, C] what speaks for each class in the directions alone.
    """
    sae, classifier = study.sae, study.classifier
    shape = (len(spliced.x), sae.config.n_latents)
    place = spliced.images * shape[1] + spliced.latents

    def add_up(entries: Tensor) -> Tensor:
        return torch.zeros(shape, device=entries.device).view(-1).index_add_(0, place, entries).view(shape)

    activation = add_up(spliced.values)
    scores = {
        "attribution": add_up(attribute(classifier, spliced, targets)),
        "activation": activation,
        "energy": activation * sae.decoder.norm(dim=1),
        "lens": activation * lens[:, targets].T,
        "random": torch.rand(shape, generator=rng).to(activation.device),
    }
    return torch.stack([scores[method].masked_fill(activation <= 0, -torch.inf) for method in METHODS])


@torch.no_grad()
def _delete(study: Study, grid: list[int], keep_error: bool, on_progress: Progress | None) -> NDArray[np.float64]:
    """y of every image, method and number of deleted latents: [I, M, n]."""
    classifier, rng = study.classifier, torch.Generator().manual_seed(study.config.seed)
    judge, vision = classifier.judge, classifier.vision
    lens = read_directions(study.sae, vision, lambda x: judge.evidence(judge.embed(vision, x))).to(vision.device)
    batches = []
    for images, spliced in study.batches(classifier.images, on_progress):
        targets = classifier.logits(spliced.x).argmax(1)
        scores = score_latents(study, spliced, targets, lens, rng)
        order = scores.argsort(dim=2, descending=True, stable=True)[..., : max(grid)]
        rest = spliced.error if keep_error else torch.zeros_like(spliced.old)

        def measure(new: Tensor, x: Spliced = spliced, targets: Tensor = targets) -> NDArray[np.float64]:
            return as_numpy(measure_evidence(classifier, x.stream(new), targets)).astype(np.float64)

        values = np.empty((len(images), len(METHODS), len(grid)))
        values[:, :, 0] = measure(spliced.whole + rest)[:, None]
        for number in range(len(METHODS)):
            for i, n in enumerate(grid[1:], start=1):
                table = torch.zeros(scores.shape[1:], dtype=torch.bool, device=scores.device)
                table.scatter_(1, order[number, :, :n], True)
                values[:, number, i] = measure(spliced.drop(spliced.keep(table)) + rest)
        batches.append(values)
    return np.concatenate(batches)
