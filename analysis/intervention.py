"""mask_latents(): what the classifier does when it sees some latents only, or all but some.

In: a run, a store with labels, and codes or images that latents are chosen on. Out: the masking curve (PatchSAE figure
5b), k latents kept or dropped, for masks that know the true class (`class`), the class that the model itself predicts
(`predicted`), the whole dataset (`dataset`), and for random latents as frequent as the class's (`random`). Latents are
chosen on other images than they are judged on; every accuracy has an interval, and the difference to the random control
has one of its own.

Each batch is read and encoded once; a mask decodes the entries it keeps, what it drops is the difference, and only the
blocks after the hook point run.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache import (
    Artifact,
    ParentMismatchError,
    SettingsError,
    StoreGroup,
    Stores,
    Towers,
    open_stores,
    read_templates,
    select_images,
)
from analysis.concepts import TAU
from analysis.fidelity import Outcome, Outcomes, unseen_images
from analysis.intervals import bootstrap_intervals
from analysis.ranking import (
    LatentCounts,
    check_disjoint,
    count_in_codes,
    image_names,
    match_frequency,
    rank_latents,
    split_halves,
)
from analysis.results import describe_result, find_result, finish_result
from analysis.splicing import Spliced, choose_tokens, splice
from analysis.zero_shot import BATCH_IMAGES, ZeroShot, as_numpy, batches, check_images, open_zero_shot
from saetrain import SAE, CodeStore, Run

K_GRID = (1, 2, 5, 10, 50, 100, 500, 1000, 2000)
"""PatchSAE's; `all` is always there."""
N_RANDOM = 3
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Judge:
    """On which images, against which texts and on which tokens interventions are judged. Part of a result's identity.

    Attributes:
        templates, where, limit, seed: see `open_zero_shot`.
        tokens: what is replaced: all, patch or cls; None: what the run was trained on.
    """

    templates: str | Sequence[str] = "photo"
    tokens: str | None = None
    where: str | None = None
    limit: int | None = None
    seed: int = 0


PLAIN_JUDGE = Judge()


@dataclass(frozen=True)
class Study:
    """A run and the classifier behind its hook point, opened."""

    run: Run
    sae: SAE
    scene: ZeroShot
    tokens: str
    templates: tuple[str, ...]
    batch_size: int

    def batches(self, images: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], Spliced]]:
        """Images with their stream, encoded."""
        for part in batches(images, self.batch_size):
            yield part, splice(self.sae, self.scene.read(part), self.scene.store.n_tokens, self.tokens)


def open_study(
    run: Run,
    store: StoreGroup,
    judge: Judge,
    *,
    model: str | None,
    pretrained: str | None,
    device: str,
    batch_size: int,
    towers: Towers | None = None,
) -> Study:
    """Raises SettingsError, ParentMismatchError: see `open_zero_shot`, `choose_tokens`."""
    run.check_store(store)
    tokens = choose_tokens(run, judge.tokens)
    scene = open_zero_shot(
        store, run.hook_point, templates=judge.templates, where=judge.where, within=unseen_images(run, store),
        limit=judge.limit, seed=judge.seed, model=model, pretrained=pretrained, device=device, towers=towers,
    )  # fmt: skip
    sae = run.sae().to(scene.vision.device)
    return Study(run, sae, scene, tokens, read_templates(judge.templates), batch_size)


def study_parents(run: Run, store: StoreGroup, codes: CodeStore | None = None) -> dict[str, Artifact]:
    """What a result names as its parents."""
    parents = {"run": run.artifact}
    parents |= {"store" if i == 0 else f"store {i + 1}": one.artifact for i, one in enumerate(store.stores)}
    return parents if codes is None else {**parents, "codes": codes.artifact}


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
    run = run if isinstance(run, Run) else Run.open(run)
    store = open_stores(store)
    codes = CodeStore.open(chosen_on) if isinstance(chosen_on, str | Path) else chosen_on
    if codes is not None:
        _check_codes(codes, run)
    listed = check_latents(run, latents)
    grid = _check_grid(run, k) if not listed else [len(listed)]
    settings = {
        **asdict(judge), "k": grid, "latents": listed, "keep_error": keep_error, "n_random": n_random, "tau": tau,
        "chosen_where": chosen_where,
    }  # fmt: skip
    head = describe_result("masks", settings, study_parents(run, store, codes))
    out = None if out is None else Path(out)
    if found := find_result(out, head, overwrite=overwrite):
        return found
    study = open_study(
        run, store, judge, model=model, pretrained=pretrained, device=device, batch_size=batch_size
    )  # fmt: skip
    judged, counts, n_chosen = _choose(study, judge, codes, chosen_where, tau)
    masks = make_masks(counts, grid, listed, n_random, judge.seed)
    outcomes = judge_masks(study, judged, masks, keep_error, on_progress)
    often = counts.by_dataset / n_chosen
    body = {
        "run": run.path.name, "hook_point": str(run.hook_point), "tokens": study.tokens,
        "classes": list(study.scene.names), "n_chosen": n_chosen, "n_judged": len(judged),
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


def check_latents(run: Run, latents: Sequence[int]) -> list[int]:
    """Raise SettingsError for a latent out of range, or one that is named twice."""
    n_latents = run.sae_config.size
    for latent in latents:
        if not 0 <= latent < n_latents:
            raise SettingsError(f"--latent must lie in 0..{n_latents - 1}, got {latent}.")
    if len(set(latents)) < len(latents):
        raise SettingsError(f"--latent names one twice: {', '.join(map(str, latents))}.")
    return list(latents)


def _check_grid(run: Run, k: Sequence[int]) -> list[int]:
    if not k or min(k) < 1:
        raise SettingsError(f"--k must be at least 1, got {', '.join(map(str, k)) or 'nothing'}.")
    return sorted({n for n in k if n < run.sae_config.size})


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
        labels[~select_images(table, chosen_where)] = -1
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
    counts = LatentCounts.empty(len(number), study.sae.config.size)
    for images, spliced in study.batches(chosen):
        above = spliced.values > tau
        counts.add(labels[images[as_numpy(spliced.images[above])]], as_numpy(spliced.latents[above]))
    return judged, counts, len(chosen)


# ---------------------------------------------------------------------------------------------------------------------
# Masking


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
    done = 0
    for images, spliced in study.batches(judged):
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
        done += len(images)
        if on_progress:
            on_progress(done, len(judged))
    return {key: outcomes.result() for key, outcomes in found.items()}


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
