"""compare(): what prompt tuning changed, the concepts or the mapping from concepts to classes.

In: concept tables of a base model and of its adapted version, from one SAE and one set of images. Out: a Comparison.
For each seed, latents are chosen on one half of each class's images and judged on the other. Masks know the true class,
as PatchSAE's do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache import ParentMismatchError
from actcache.artifacts import find_parent
from actcache.progress import Progress
from actcache.prompts import open_towers
from actcache.seen import SeenImages
from actcache.store import StoreGroup
from analysis.classifier import (
    BATCH_IMAGES,
    ClassifiedImages,
    Classifier,
    ProbeTraining,
    check_images,
    choose_classes,
    choose_images,
    choose_judge,
    choose_training,
    describe_config,
    fit_probe,
    open_judge,
    sample_images,
)
from analysis.comparison.overlap import compare_counts, improvement_rate
from analysis.comparison.second_dictionary import check_second, cross_dictionaries
from analysis.comparison.verdict import INTERVALS, MODELS, Round, conclude, count_predictions, summarize
from analysis.concepts import ConceptTable
from analysis.config import ComparisonConfig
from analysis.interventions import LatentCounts, check_grid, classify_masked, count_in_codes, make_masks, split_halves
from analysis.lineage import open_parents
from analysis.results import Comparison, describe_result, find_result, finish_result
from saetrain import CodeStore, Run
from saetrain.lineage import find_seen


@dataclass(frozen=True)
class Side:
    """One of the two models, with its concepts, codes and activations."""

    concepts: ConceptTable
    codes: CodeStore
    store: StoreGroup

    @classmethod
    def open(cls, path: str | Path) -> "Side":
        """Raises what `ConceptTable.open`, `CodeStore.open` and `open_parents` raise."""
        concepts = ConceptTable.open(path)
        codes = CodeStore.open(find_parent(concepts.artifact, "codes"))
        return cls(concepts, codes, open_parents(codes))


def compare(
    base: str | Path,
    adapted: str | Path,
    out: str | Path | None = None,
    config: ComparisonConfig = ComparisonConfig(),
    *,
    second_run: Run | str | Path | None = None,
    device: str = "auto",
    batch_size: int = BATCH_IMAGES,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> Comparison:
    """Compare a model with its adapted version.

    Args:
        base, adapted: concept tables of the two stores, made by the same run.
        out: a JSON file for the result; the same call again returns what the file holds.
        second_run: another SAE at the same hook point, trained on the adapted model's activations: adds `dictionaries`.
        device, batch_size: where to run, and images per forward pass. They affect speed only.

    Raises:
        ParentMismatchError: different images, SAEs or models; two stores of the same prompts; a second run of another
            model, hook point or kind of token.
        SettingsError: no labels, classes for which the prompts were not trained, values out of range.
    """
    sides = dict(zip(MODELS, (Side.open(base), Side.open(adapted)), strict=True))
    run = _check_pair(sides["base"], sides["adapted"])
    grid = check_grid("--k", config.k, run.sae_config.n_latents, usual=ComparisonConfig.k)
    k_top = min(grid, key=lambda n: (abs(n - config.n_top), n))
    parents = {name: side.concepts.artifact for name, side in sides.items()}
    second = second_run if isinstance(second_run, Run | None) else Run.open(second_run)
    if second is not None:
        check_second(run, second, k_top)
        parents["second run"] = second.artifact
    head = describe_result(Comparison, describe_config(replace(config, k=tuple(grid))), parents)
    if (earlier := find_result(Comparison, out, head, overwrite=overwrite)) is not None:
        return earlier
    runs = [run] if second is None else [run, second]
    classifiers, counted = _open_classifiers(sides, runs, config, device, batch_size)
    labels, names = classifiers["base"].labels, classifiers["base"].names
    tokens, sae, seed = run.train_config.tokens, run.sae(), config.seed
    halves = [_halve(labels, names, config.limit, number) for number in range(seed, seed + config.n_seeds)]
    # the second run judges the same images again, and both runs judge the held-out images
    total = sum(len(judged) for _, judged in halves) * (1 if second is None else 2)
    done = 0

    def report(n_images: int) -> None:
        nonlocal done
        done += n_images
        if on_progress:
            on_progress(min(done, total), total)

    def count(images: NDArray[np.int64]) -> dict[str, LatentCounts]:
        counted = np.full(len(labels), -1)
        counted[images] = labels[images]
        return {
            name: count_in_codes(side.codes, counted, len(names), tokens=tokens, tau=config.tau)
            for name, side in sides.items()
        }

    rounds = []
    for number, (chosen, judged) in enumerate(halves, start=seed):
        rng = np.random.Generator(np.random.Philox(number))
        masks = [
            mask
            for model, counts in count(chosen).items()
            for mask in make_masks(counts, grid, config.n_random, rng, chosen_by=model)
        ]
        outcomes = classify_masked(classifiers, sae, tokens, judged, masks, batch_size=batch_size, report=report)
        rounds.append(Round(number, chosen, judged, outcomes))
    base_counts, adapted_counts = (counts.by_class for counts in count(classifiers["base"].images).values())
    overlap = compare_counts(base_counts, adapted_counts, names, k=config.n_top, high=config.high, low=config.low)
    accuracy, masked = summarize(rounds, seed)
    confusion, prediction = count_predictions(rounds, len(names))
    result = Comparison(
        *head, classes=names, n_chosen=len(rounds[0].chosen), n_judged=len(rounds[0].judged),
        hook_point=str(run.hook_point), prompts=sides["adapted"].store.stores[0].settings.prompts or {},
        overlap=overlap, interval=INTERVALS[len(rounds) > 1], accuracy=accuracy,
        improvement=improvement_rate(*(accuracy[f"{model} image, {model} text"].accuracy for model in MODELS)),
        masks=masked, confusion=confusion, prediction=prediction,
        conclusion=conclude(rounds, overlap, k_top, config.n_top, seed),
        dictionaries=None if second is None else cross_dictionaries(
            (run, second), classifiers, rounds, k=k_top, tau=config.tau, seed=seed, limit=config.limit,
            batch_size=batch_size, report=report,
        ),
        seen=(counted,), judge=classifiers["adapted"].judge.facts,
    )  # fmt: skip
    return finish_result(out, result)


def _check_pair(base: Side, adapted: Side) -> Run:
    """The run of both sides. Raises ParentMismatchError unless they differ only in their prompts."""
    sides = (base, adapted)
    for what, values in (
        ("images", [str(side.codes.artifact.settings["rows_id"]) for side in sides]),
        ("SAE", [side.codes.artifact.parent("run").id for side in sides]),
        ("model", [side.store.model_id for side in sides]),
    ):
        if values[0] != values[1]:
            raise ParentMismatchError(
                f"{base.concepts.path} and {adapted.concepts.path} have different {what}: {values[0]} and {values[1]}. "
                "Extract both from the same images in the same order, and encode both by one run of one model."
            )
    prompts = [side.store.stores[0].settings.prompts for side in sides]
    if prompts[0] is not None or prompts[1] is None:
        raise ParentMismatchError(
            f"{base.concepts.path} must belong to the base model and {adapted.concepts.path} to its adapted version. "
            "Give CONCEPTS_BASE first, and extract the other store with --prompts."
        )
    return Run.open(find_parent(base.codes.artifact, "run"))


def _choose_images(
    sides: dict[str, Side], runs: Sequence[Run], config: ComparisonConfig, trainings: Mapping[str, ProbeTraining]
) -> tuple[dict[str, ClassifiedImages], SeenImages]:
    """The images that are labeled and readable in both stores, and that neither the runs nor the prompts nor a probe
    have learned from. Raises SettingsError if there are none.
    """
    first, second = (choose_images(side.store, where=None, limit=None, seed=0) for side in sides.values())
    base, adapted = (find_seen(side.store, runs) for side in sides.values())
    seen = base | adapted
    for name, training in trainings.items():
        seen |= training.seen_in(sides[name].store)
    images, counted = seen.judge(np.intersect1d(first, second), config, str(sides["base"].store.path))
    how: dict[str, Any] = {"templates": config.template, "class_names": config.class_names, "within": images}
    return {name: choose_classes(side.store, runs[0].hook_point, **how) for name, side in sides.items()}, counted


def _open_classifiers(
    sides: dict[str, Side], runs: Sequence[Run], config: ComparisonConfig, device: str, batch_size: int
) -> tuple[dict[str, Classifier], SeenImages]:
    """Both models' classifiers, on images that nothing has learned from. A probe is trained for each model."""

    def train_probes() -> dict[str, ProbeTraining]:
        return {name: choose_training(side.store, config, seed=config.seed) for name, side in sides.items()}

    trainings = train_probes() if config.judge == "probe" else {}
    labeled, counted = _choose_images(sides, runs, config, trainings)
    towers = {name: open_towers(side.store.stores[0].artifact, device=device) for name, side in sides.items()}
    kind = choose_judge(config.judge, labeled["base"], towers["base"])
    if kind == "probe" and not trainings:
        trainings = train_probes()
        labeled, counted = _choose_images(sides, runs, config, trainings)
    classifiers = {}
    for name, images in labeled.items():
        vision, probe = towers[name].vision, None
        if kind == "probe":
            probe = fit_probe(trainings[name], images.names, vision, batch_size=batch_size)
        judge = open_judge(kind, images, towers[name], probe=probe, by_image=True)
        classifiers[name] = Classifier.of(images, vision, judge)
    return classifiers, counted


def _halve(
    labels: NDArray[np.int64], names: Sequence[str], limit: int | None, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(chosen, judged) images of one seed."""
    chosen, judged = split_halves(labels, seed=seed)
    check_images(chosen, tuple(names), labels, "choose latents on")
    return chosen, sample_images(judged, limit, seed)
