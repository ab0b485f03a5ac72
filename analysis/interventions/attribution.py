"""delete_latents(): which latents the model's decision rests on, and whether that is true.

    R = z dy/dz        attribution of an active entry, y = cos(image embedding, text of the predicted class)

The error term is passed through: x' = decode(z) + (x - decode(z)).detach() leaves the output as it is, so that one
backward pass through the blocks after the hook point gives dy/dz of all entries. Latents (R summed over the tokens) are
then deleted, the largest first, and y is measured again: a good attribution makes it fall fast. Beside it deletion by
activation (z), energy (z times the norm of the decoder row), logit lens (z times the cosine of the direction with the
text) and at random among the active latents.

Source: Dreyer et al. 2025 (arXiv 2505.20229). Shapes as in splicing.py.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache.store import StoreGroup, Stores
from analysis.classifier import BATCH_IMAGES, Spliced, ZeroShot, as_numpy, embed_directions
from analysis.intervals import bootstrap_intervals
from analysis.interventions.study import (
    PLAIN_JUDGE,
    Judge,
    Report,
    Study,
    check_grid,
    open_inputs,
    open_study,
    study_parents,
)
from analysis.results import describe_result, find_result, finish_result
from saetrain import Run

METHODS = ("attribution", "activation", "energy", "lens", "random")
N_GRID = (1, 2, 5, 10, 20, 50, 100, 200)
BLOCK_ENTRIES = 1 << 16
"""Entries whose dictionary rows are gathered at once: 200 MB at width 768."""


def attribute(scene: ZeroShot, spliced: Spliced, targets: Tensor) -> Tensor:
    """R = z dy/dz of each active entry, [N].

    Args:
        targets: [B] class whose cosine with the image is y.
    """
    with torch.enable_grad():
        x = spliced.x.detach().requires_grad_()
        cosines = (scene.embed(x) * scene.classes[targets]).sum(1)
        (gradient,) = torch.autograd.grad(cosines.sum(), x)
    rows = gradient[:, spliced.part].flatten(0, 1)  # dy/dx' of the replaced tokens
    sae, parts = spliced.sae, []
    for first in range(0, len(spliced.rows), BLOCK_ENTRIES):
        part = slice(first, first + BLOCK_ENTRIES)
        parts.append((rows[spliced.rows[part]] * sae.decoder[spliced.latents[part]]).sum(1))
    return spliced.values * torch.cat(parts) / sae.scale if parts else spliced.values


@torch.no_grad()
def delete_latents(
    run: Run | str | Path,
    store: Stores | StoreGroup,
    out: str | Path | None = None,
    *,
    judge: Judge = PLAIN_JUDGE,
    n: Sequence[int] = N_GRID,
    keep_error: bool = False,
    model: str | None = None,
    pretrained: str | None = None,
    device: str = "auto",
    batch_size: int = BATCH_IMAGES,
    overwrite: bool = False,
    on_progress: Report | None = None,
) -> dict[str, Any]:
    """Measure the deletion curves.

    Args:
        n: how many latents are deleted.
        keep_error: leave the error term in; by default it is off from the start.
        The others as `mask_latents`.

    Returns:
        The result: `curve`, one row a (method, n) with the mean of y and its 95 % bootstrap interval; `areas`, the mean
        of y over ln(1 + n) by the trapezoid rule, smaller is better; `margins`, areas minus attribution's, paired.

    Raises:
        SettingsError, ParentMismatchError: see `open_study`.
    """
    run, store = open_inputs(run, store)
    grid = [0, *check_grid("--n", n)]
    settings = {**asdict(judge), "n": grid, "keep_error": keep_error}
    head = describe_result("deletion", settings, study_parents([run], store))
    if found := find_result(out, head, overwrite=overwrite):
        return found
    study = open_study(run, store, judge, model=model, pretrained=pretrained, device=device, batch_size=batch_size)
    values = _delete(study, grid, keep_error, judge.seed, on_progress)
    body = {**study.facts(), "n_judged": len(values), **_summarize(values, grid, judge.seed)}
    return finish_result(out, head, body)


def score_latents(study: Study, spliced: Spliced, targets: Tensor, lens: Tensor, rng: torch.Generator) -> Tensor:
    """Scores of each image's latents by every method, [M, B, F]; -inf where a latent is silent.

    Args:
        lens: [F, E] unit embeddings of the directions.
    """
    sae, scene = study.sae, study.scene
    shape = (len(spliced.x), sae.config.size)
    place = spliced.images * shape[1] + spliced.latents

    def add_up(entries: Tensor) -> Tensor:
        return torch.zeros(shape, device=entries.device).view(-1).index_add_(0, place, entries).view(shape)

    activation = add_up(spliced.values)
    scores = {
        "attribution": add_up(attribute(scene, spliced, targets)),
        "activation": activation,
        "energy": activation * sae.decoder.norm(dim=1),
        "lens": activation * (scene.classes[targets] @ lens.T),
        "random": torch.rand(shape, generator=rng).to(activation.device),
    }
    return torch.stack([scores[method].masked_fill(activation <= 0, -torch.inf) for method in METHODS])


def _delete(
    study: Study, grid: list[int], keep_error: bool, seed: int, on_progress: Report | None
) -> NDArray[np.float64]:
    """y of every image, method and number of deleted latents: [I, M, n]."""
    scene, rng = study.scene, torch.Generator().manual_seed(seed)
    lens = embed_directions(study.sae, scene.vision).to(scene.vision.device)
    found = []
    for images, spliced in study.batches(scene.images, on_progress):
        targets = scene.logits(spliced.x).argmax(1)
        scores = score_latents(study, spliced, targets, lens, rng)
        order = scores.argsort(dim=2, descending=True, stable=True)[..., : max(grid)]
        rest = spliced.error if keep_error else torch.zeros_like(spliced.old)

        def measure(new: Tensor, x: Spliced = spliced, targets: Tensor = targets) -> NDArray[Any]:
            return as_numpy((scene.embed(x.stream(new)) * scene.classes[targets]).sum(1)).astype(np.float64)

        untouched = measure(spliced.whole + rest)
        values = np.empty((len(images), len(METHODS), len(grid)))
        for number in range(len(METHODS)):
            values[:, number, 0] = untouched
            for i, n in enumerate(grid[1:], start=1):
                table = torch.zeros(scores.shape[1:], dtype=torch.bool, device=scores.device)
                table.scatter_(1, order[number, :, :n], True)
                values[:, number, i] = measure(spliced.drop(spliced.keep(table)) + rest)
        found.append(values)
    return np.concatenate(found)


def _summarize(values: NDArray[np.float64], grid: list[int], seed: int) -> dict[str, Any]:
    low, high = bootstrap_intervals(values.reshape(len(values), -1), seed=seed)
    means = values.mean(0).reshape(-1)
    keys = [(method, n) for method in METHODS for n in grid]
    curve = [
        {"method": method, "n": n, "y": float(y), "low": float(a), "high": float(b)}
        for (method, n), y, a, b in zip(keys, means, low, high, strict=True)
    ]
    x = np.log1p(np.array(grid))
    areas = np.trapezoid(values, x, axis=2) / (x[-1] - x[0])  # [I, M]
    margins = areas[:, 1:] - areas[:, :1]
    low, high = bootstrap_intervals(margins, seed=seed)
    return {
        "curve": curve,
        "areas": dict(zip(METHODS, areas.mean(0).tolist(), strict=True)),
        "margins": [
            {"method": method, "margin": float(m), "low": float(a), "high": float(b)}
            for method, m, a, b in zip(METHODS[1:], margins.mean(0), low, high, strict=True)
        ],
    }
