"""mask_latents(): what the classifier does when it sees some latents only, or all but some.

In: a run, a store with labels, and codes or images that latents are chosen on. Out: the masking curve (PatchSAE figure
5b), k latents kept or dropped, for masks that know the true class (`class`), the class that the model itself predicts
(`predicted`), the whole dataset (`dataset`), and for random latents as frequent as the class's (`random`). Latents are
chosen on other images than they are judged on; every accuracy has an interval, and the difference to the random control
has one of its own.

Each batch is read and encoded once; a mask decodes the entries it keeps, what it drops is the difference, and only the
blocks after the hook point run.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actcache import ParentMismatchError, SettingsError
from actcache.store import StoreGroup, Stores, select_images
from analysis.classifier import BATCH_IMAGES, Outcome, as_numpy, check_images
from analysis.intervals import bootstrap_intervals
from analysis.interventions.latent_choice import LatentCounts, check_disjoint, count_in_codes, image_names, split_halves
from analysis.interventions.latent_masks import Key, Mask, count_in_stream, judge_masks, make_masks
from analysis.interventions.study import (
    PLAIN_JUDGE,
    Judge,
    Report,
    Study,
    check_grid,
    check_latents,
    open_inputs,
    open_study,
    study_parents,
)
from analysis.lineage import unseen_images
from analysis.reduce import TAU
from analysis.results import describe_result, find_result, finish_result
from saetrain import CodeStore, Run

K_GRID = (1, 2, 5, 10, 50, 100, 500, 1000, 2000)
"""PatchSAE's; `all` is always there."""
N_RANDOM = 3


@torch.no_grad()
def mask_latents(
    run: Run | str | Path,
    store: Stores | StoreGroup,
    out: str | Path | None = None,
    *,
    judge: Judge = PLAIN_JUDGE,
    k: Sequence[int] = K_GRID,
    latents: Sequence[int] = (),
    keep_error: bool = False,
    n_random: int = N_RANDOM,
    chosen_on: CodeStore | str | Path | None = None,
    chosen_where: str | None = None,
    tau: float = TAU,
    model: str | None = None,
    pretrained: str | None = None,
    device: str = "auto",
    batch_size: int = BATCH_IMAGES,
    overwrite: bool = False,
    on_progress: Report | None = None,
) -> dict[str, Any]:
    """Measure the masking curve.

    Args:
        store: with labels, of the run's model. Of the run's own store only held-out images are judged.
        out: a JSON file for the result; the same call again returns what is there.
        k: how many latents are kept or dropped; numbers as large as the dictionary are left out, for that is `all`.
        latents: instead of the k most frequent of a class: this list, for every image (selection `list`).
        keep_error: add what the SAE does not explain to what is kept.
        n_random: draws of the random control.
        chosen_on: codes, by this run, of the images that latents are chosen on.
        chosen_where: which of these images, or without codes which of the store's. By default, of the run's own store
            the images it was trained on, of another store half of each class.
        tau: a token counts for its class when a latent is above this.
        model, pretrained, device: see `open_zero_shot`. batch_size: images a forward pass. Speed only.

    Returns:
        The result: `curve`, one row a (selection, mode, k) with accuracy, its 95 % interval, class_accuracy and loss,
        and what tells whether controls are matched: tokens_per_image, above tau, of the mean latent in the lists;
        `margins`, accuracy minus the random control's with a paired bootstrap interval; `recalls`, class by class.

    Raises:
        SettingsError: no labels, a class without images to choose on, overlapping images, a latent out of range.
        ParentMismatchError: a store of another model, codes of another run.
    """
    run, store = open_inputs(run, store)
    codes = CodeStore.open(chosen_on) if isinstance(chosen_on, str | Path) else chosen_on
    if codes is not None:
        _check_codes(codes, run)
    listed = check_latents(run, latents)
    if n_random < 0:
        raise SettingsError(f"--n-random must be at least 0, got {n_random}.")
    grid = [n for n in check_grid("--k", k) if n < run.sae_config.size] if not listed else [len(listed)]
    settings = {
        **asdict(judge), "k": grid, "latents": listed, "keep_error": keep_error, "n_random": n_random, "tau": tau,
        "chosen_where": chosen_where,
    }  # fmt: skip
    head = describe_result("masks", settings, study_parents([run], store, codes))
    if found := find_result(out, head, overwrite=overwrite):
        return found
    study = open_study(run, store, judge, model=model, pretrained=pretrained, device=device, batch_size=batch_size)
    judged, counts, n_chosen = _choose(study, judge, codes, chosen_where, tau)
    masks = make_masks(counts, grid, listed, n_random, judge.seed)
    outcomes = judge_masks(study, judged, masks, keep_error, on_progress)
    often = counts.by_dataset / n_chosen
    body = {
        **study.facts(), "classes": list(study.scene.names), "n_chosen": n_chosen, "n_judged": len(judged),
        "n_latents": study.sae.config.size, **_summarize(outcomes, masks, study.scene.names, often, judge.seed),
    }  # fmt: skip
    return finish_result(out, head, body)


# ---------------------------------------------------------------------------------------------------------------------
# Choosing


def _check_codes(codes: CodeStore, run: Run) -> None:
    if codes.artifact.parents["run"].id != run.run_id:
        raise ParentMismatchError(
            f"{codes.path} was encoded by run {codes.artifact.parents['run'].id}, {run.path} is {run.run_id}. "
            f"Encode the images with {run.path}."
        )


def _choose(
    study: Study, judge: Judge, codes: CodeStore | None, chosen_where: str | None, tau: float
) -> tuple[NDArray[np.int64], LatentCounts, int]:
    """(judged images, counts over the chosen ones, how many these are)."""
    scene, store = study.scene, study.scene.store
    judged = scene.images
    number = {name: i for i, name in enumerate(scene.names)}
    table = store.images if codes is None else codes.images
    labels = np.array([number.get(name, -1) for name in table["label_name"].to_pylist()])
    labels[~(store.valid if codes is None else codes.valid)] = -1
    if chosen_where is not None:
        labels[~select_images(table, chosen_where, flag="--chosen-where")] = -1
    elif codes is None:
        trained = np.setdiff1d(np.arange(store.n_images), unseen_images(study.run, store))
        if len(trained):
            labels[np.setdiff1d(np.arange(store.n_images), trained)] = -1
        else:
            chosen, judged = split_halves(scene.labels, seed=judge.seed)
            labels[np.setdiff1d(np.arange(store.n_images), chosen)] = -1
    chosen = np.flatnonzero(labels >= 0)
    check_images(chosen, scene.names, labels, "choose latents on")
    stores = [one.artifact for one in store.stores]
    names = image_names(table, stores if codes is None else [codes.artifact])
    check_disjoint(names[chosen], image_names(store.images, stores)[judged])
    if codes is not None:
        return judged, count_in_codes(codes, labels, len(number), tokens=study.tokens, tau=tau), len(chosen)
    counts, _ = count_in_stream(
        study.sae, study.tokens, scene, chosen, labels, tau=tau, batch_size=study.batch_size
    )  # fmt: skip
    return judged, counts, len(chosen)


# ---------------------------------------------------------------------------------------------------------------------
# Summing up


def _summarize(
    outcomes: dict[Key, Outcome], masks: list[Mask], names: tuple[str, ...], frequency: NDArray[np.float64], seed: int
) -> dict[str, Any]:
    rows: dict[tuple[str, str, int | str], list[Outcome]] = {}
    for (selection, mode, k, _), outcome in outcomes.items():
        rows.setdefault((selection, mode, k), []).append(outcome)
    sizes = {(m.selection, m.k): float((m.lists >= 0).sum(1).double().mean()) for m in masks}
    tokens = {
        (m.selection, m.k): [float(frequency[as_numpy(mine.lists[mine.lists >= 0])].mean()) for mine in masks
                             if (mine.selection, mine.k) == (m.selection, m.k) and bool((mine.lists >= 0).any())]
        for m in masks
    }  # fmt: skip
    curve, right = [], {}
    for (selection, mode, k), draws in rows.items():
        right[selection, mode, k] = np.mean([draw.right for draw in draws], axis=0)
        numbers: dict[str, Any] = draws[0].numbers()
        if selection == "random":
            numbers = {name: float(np.mean([draw.numbers()[name] for draw in draws])) for name in numbers}
            low, high = bootstrap_intervals(right[selection, mode, k][:, None], seed=seed)
            numbers |= {"accuracy_low": float(low[0]), "accuracy_high": float(high[0])}
            numbers["draws"] = [float(draw.right.mean()) for draw in draws]
        size = sizes.get((selection, int(k))) if k != "all" else None
        often = float(np.mean(tokens[selection, int(k)])) if k != "all" else None
        row = {"selection": selection, "mode": mode, "k": k, "n_latents": size, "tokens_per_image": often}
        curve.append({**row, **numbers})
    pairs = [key for key in right if key[0] not in ("random", "all") and ("random", *key[1:]) in right]
    margins = []
    if pairs:
        differences = np.stack([right[key] - right["random", key[1], key[2]] for key in pairs], axis=1)
        low, high = bootstrap_intervals(differences, seed=seed)
        margins = [
            {"selection": s, "mode": mode, "k": k, "margin": float(d), "low": float(a), "high": float(b)}
            for (s, mode, k), d, a, b in zip(pairs, differences.mean(0), low, high, strict=True)
        ]
    recalls = [
        {"selection": s, "mode": mode, "k": k, "recall": {names[c]: r for c, r in draws[0].recalls().items()}}
        for (s, mode, k), draws in rows.items()
        if s in ("all", "class", "predicted", "list")
    ]
    return {"curve": curve, "margins": margins, "recalls": recalls}
