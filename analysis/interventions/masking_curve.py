"""mask_latents(): how the classifier does when it sees only some latents, or all but some.

In: a run, a store with labels, and codes or images to choose latents on. Out: the masking curve (PatchSAE, figure 5b),
with k latents kept or dropped, for masks that know the true class (`class`), for masks of the class that the model
itself predicts (`predicted`), for the latents of the whole dataset (`dataset`), and for random latents that fire as
often as the class's (`random`). Latents are chosen on other images than those they are judged on. Every accuracy has an
interval, and so has its difference to the random control.

Each batch is read and encoded once; a mask decodes only the entries it keeps, what it drops is the difference, and only
the blocks after the hook point run.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actcache import ParentMismatchError, SettingsError
from actcache.progress import Progress
from actcache.seen import LearnedImages, SeenImages
from actcache.store import StoreGroup, Stores, select_images
from analysis.classifier import Outcome, as_numpy, check_images
from analysis.config import MaskingConfig, ModelOptions, StudyConfig
from analysis.intervals import bootstrap_intervals
from analysis.interventions.latent_choice import LatentCounts, count_in_codes, split_halves
from analysis.interventions.latent_masks import (
    Condition,
    LatentMask,
    add_predicted,
    classify_masked,
    count_in_stream,
    make_masks,
)
from analysis.interventions.study import Study, check_grid, check_latents, open_inputs, run_study
from analysis.results import Head, MaskingCurve, MaskMargin, MaskRecall, MaskScores, mean_scores
from saetrain import CodeStore, Run


def mask_latents(
    run: Run | str | Path,
    store: Stores | StoreGroup,
    out: str | Path | None = None,
    config: MaskingConfig = MaskingConfig(),
    *,
    chosen_on: CodeStore | str | Path | None = None,
    study: StudyConfig = StudyConfig(),
    model: ModelOptions = ModelOptions(),
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> MaskingCurve:
    """Measure the masking curve.

    Args:
        store: a labeled store of the run's model. Only images that the run has not learned from are judged, so of its
            own store the held-out ones.
        out: a JSON file for the result; the same call again returns what the file holds.
        config: the default `k` is cut where the dictionary ends, because all latents are `all`; `latents` take the
            place of the k most frequent ones of a class, for every image (selection `list`). Without `chosen_on` and
            `chosen_where`, latents are chosen on the images of the store that the run has learned from, if there are
            some of each class, or else on half of each class.
        chosen_on: codes that this run made of the images that latents are chosen on.

    Raises:
        SettingsError: no labels, a class without images to choose on, nothing left to judge, a latent out of range.
        ParentMismatchError: a store of another model, codes of another run.
    """
    run, store = open_inputs(run, store)
    codes = CodeStore.open(chosen_on) if isinstance(chosen_on, str | Path) else chosen_on
    if codes is not None:
        _check_codes(codes, run)
    listed = check_latents(run, config.latents)
    where, table = config.chosen_where, store.images if codes is None else codes.images
    choosable = None if where is None else select_images(table, where, flag="--chosen-where")
    usual = MaskingConfig.k
    grid = [len(listed)] if listed else check_grid("--k", config.k, run.sae_config.n_latents, usual=usual)

    def measure(head: Head, studies: Iterator[Study]) -> MaskingCurve:
        (opened,) = studies
        classifier = opened.classifier
        judged, counts, n_chosen, counted = _choose(opened, codes, choosable, config.tau)
        rng = np.random.Generator(np.random.Philox(study.seed))
        masks = add_predicted(make_masks(counts, grid, config.n_random, rng, listed=listed))
        n_done = 0

        def report(n_images: int) -> None:
            nonlocal n_done
            n_done += n_images
            if on_progress:
                on_progress(n_done, len(judged))

        outcomes = classify_masked(
            {"": classifier}, opened.sae, opened.tokens, judged, masks, modes=("keep", "drop"),
            keep_errors=(config.keep_error,), batch_size=opened.batch_size, report=report,
        )  # fmt: skip
        groups: dict[tuple[str, str, int | str], list[Outcome]] = {}
        for condition, outcome in outcomes.items():
            groups.setdefault(_name_row(condition), []).append(outcome)
        curve = [
            _summarize(key, draws, [mask for mask in masks if (mask.selection, mask.k) == (key[0], key[2])],
                       counts.by_dataset / n_chosen, study.seed)
            for key, draws in groups.items()
        ]  # fmt: skip
        recalls = [
            MaskRecall(*key, {classifier.names[c]: recall for c, recall in draws[0].recalls().items()})
            for key, draws in groups.items()
            if key[0] in ("all", "class", "predicted", "list")
        ]
        return MaskingCurve(
            *head, *opened.facts, classes=classifier.names, n_chosen=n_chosen, n_judged=len(judged),
            n_latents=opened.sae.config.n_latents, curve=tuple(curve), margins=_measure_margins(groups, study.seed),
            recalls=tuple(recalls), seen=None if counted is None else (counted,),
        )  # fmt: skip

    settings = asdict(replace(config, k=tuple(grid), latents=tuple(listed)))
    return run_study(
        MaskingCurve, [run], store, out, measure, settings=settings, study=study, model=model, codes=codes,
        overwrite=overwrite,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Choosing


def _check_codes(codes: CodeStore, run: Run) -> None:
    if codes.artifact.parents["run"].id != run.run_id:
        raise ParentMismatchError(
            f"{codes.path} was encoded by run {codes.artifact.parents['run'].id}, but {run.path} is {run.run_id}. "
            f"Encode the images with {run.path}."
        )


def _choose(
    study: Study, codes: CodeStore | None, choosable: NDArray[np.bool_] | None, tau: float
) -> tuple[NDArray[np.int64], LatentCounts, int, SeenImages | None]:
    """(judged images, counts over the chosen images, number of chosen images, how many were both).

    Args:
        choosable: images of the codes, or else of the store, that latents may be chosen on, if the caller named them.
    """
    classifier, store = study.classifier, study.classifier.store
    judged = classifier.images
    number = {name: i for i, name in enumerate(classifier.names)}
    table = store.images if codes is None else codes.images
    labels = np.array([number.get(name, -1) for name in table["label_name"].to_pylist()])
    labels[~(store.valid if codes is None else codes.valid)] = -1
    if choosable is not None:
        labels[~choosable] = -1
    elif codes is None:
        in_class = np.bincount(labels[study.seen.images & (labels >= 0)], minlength=len(number))
        if in_class.all() and not study.config.uses_seen:
            labels[~study.seen.images] = -1
        else:
            chosen, judged = split_halves(classifier.labels, seed=study.config.seed)
            labels[np.setdiff1d(np.arange(store.n_images), chosen)] = -1
    chosen = np.flatnonzero(labels >= 0)
    check_images(chosen, classifier.names, labels, "choose latents on")
    both = LearnedImages.of("choice of latents", table, chosen)
    if codes is None:  # positions tell the images of one store apart, names need not
        known = both.find(store.images, named=np.zeros(store.n_images, dtype=bool))
        known.images[chosen] = True
    else:
        known = both.find(store.images)
    if known.images[judged].all() and not study.config.uses_seen:
        raise SettingsError(
            f"All {len(judged):,} images of {store.path} are used both to choose latents and to judge them. Separate "
            "them with --where and --chosen-where, give codes of other images with --chosen-on, or pass --on-seen use."
        )
    judged, counted = known.judge(judged, study.config, str(store.path))
    if codes is not None:
        return judged, count_in_codes(codes, labels, len(number), tokens=study.tokens, tau=tau), len(chosen), counted
    counts, _ = count_in_stream(
        study.sae, study.tokens, classifier, chosen, labels, tau=tau, batch_size=study.batch_size
    )  # fmt: skip
    return judged, counts, len(chosen), counted


# ---------------------------------------------------------------------------------------------------------------------
# Summing up


def _name_row(condition: Condition) -> tuple[str, str, int | str]:
    """(selection, mode, k) of a condition's row in the curve; draws share a row."""
    if condition.selection == "original":
        return "all", "original", "all"
    return condition.selection, condition.mode, condition.k or "all"


def _summarize(
    key: tuple[str, str, int | str], draws: list[Outcome], masks: list[LatentMask], frequency: NDArray[np.float64],
    seed: int,
) -> MaskScores:  # fmt: skip
    """A row of the curve.

    Args:
        masks: the masks of the row; none for all latents.
        frequency: [F] tokens per image above tau.
    """
    numbers = asdict(draws[0].scores())
    if key[0] == "random":
        numbers = mean_scores([draw.scores() for draw in draws])
        right = np.mean([draw.right for draw in draws], axis=0)
        low, high = bootstrap_intervals(right[:, None], seed=seed)
        numbers |= {"accuracy_low": float(low[0]), "accuracy_high": float(high[0])}
    often = [
        float(frequency[as_numpy(mask.lists[mask.lists >= 0])].mean())
        for mask in masks
        if bool((mask.lists >= 0).any())
    ]
    return MaskScores(
        *key,
        n_latents=float((masks[-1].lists >= 0).sum(1).double().mean()) if masks else None,
        tokens_per_image=float(np.mean(often)) if masks else None,
        **numbers,
        draws=tuple(float(draw.right.mean()) for draw in draws) if key[0] == "random" else None,
    )


def _measure_margins(groups: dict[tuple[str, str, int | str], list[Outcome]], seed: int) -> tuple[MaskMargin, ...]:
    right = {key: np.mean([draw.right for draw in draws], axis=0) for key, draws in groups.items()}
    pairs = [
        (selection, mode, k)
        for selection, mode, k in right
        if isinstance(k, int) and selection != "random" and ("random", mode, k) in right
    ]
    if not pairs:
        return ()
    differences = np.stack([right[key] - right["random", key[1], key[2]] for key in pairs], axis=1)
    low, high = bootstrap_intervals(differences, seed=seed)
    numbers = zip(differences.mean(0).tolist(), low.tolist(), high.tolist(), strict=True)
    return tuple(MaskMargin(*key, *bounds) for key, bounds in zip(pairs, numbers, strict=True))
