"""compare(): what prompt tuning changed, the concepts or the mapping from concepts to classes.

In: concept tables of a base and of an adapted model: one SAE, one set of images. Out: one JSON file; `compare` says
what is in it. Latents are chosen on one half of each class's images and judged on the other, anew for each seed. Masks
know the true class, as PatchSAE's do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache import ParentMismatchError, SettingsError
from actcache.prompts import open_towers
from actcache.store import StoreGroup
from analysis.classifier import BATCH_IMAGES, ZeroShot, check_images, choose_images, open_zero_shot
from analysis.comparison.crossover import MODELS, Round, judge, make_masks
from analysis.comparison.overlap import compare_counts
from analysis.comparison.second_dictionary import check_second, cross_dictionaries
from analysis.comparison.verdict import conclude, summarize
from analysis.concepts import ConceptTable
from analysis.interventions import LatentCounts, count_in_codes, split_halves
from analysis.lineage import open_parents
from analysis.reduce import TAU
from analysis.results import describe_result, find_result, finish_result
from saetrain import CodeStore, Run

K_GRID = (1, 2, 5, 10, 50, 100, 500)


@dataclass(frozen=True)
class Side:
    """One of the two models: its concepts, its codes, its activations."""

    concepts: ConceptTable
    codes: CodeStore
    store: StoreGroup

    @classmethod
    def open(cls, path: str | Path) -> "Side":
        """Raises what `ConceptTable.open`, `CodeStore.open` and `open_parents` raise."""
        concepts = ConceptTable.open(path)
        codes = CodeStore.open(concepts.artifact.parent_path("codes"))
        return cls(concepts, codes, open_parents(codes))


def compare(
    base: str | Path,
    adapted: str | Path,
    out: str | Path | None = None,
    *,
    second_run: Run | str | Path | None = None,
    k: Sequence[int] = K_GRID,
    n_top: int = 50,
    high: int = 50,
    low: int = 100,
    n_random: int = 2,
    tau: float = TAU,
    template: str = "a photo of a {}.",
    limit: int | None = None,
    seed: int = 0,
    n_seeds: int = 1,
    device: str = "auto",
    batch_size: int = BATCH_IMAGES,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Compare a model with its adapted self.

    Args:
        base, adapted: concept tables of the two stores, by the same run.
        out: a JSON file for the result; the same call again returns what is there.
        second_run: another SAE at the same hook point, trained on the adapted model's activations: adds `dictionaries`.
        k: latents a class that the masked classifiers see.
        n_top: latents whose overlap is measured; the conclusion is drawn at the nearest k.
        high, low: ranks that bound the groups, see `group_latents`.
        n_random: draws of the random control.
        tau: a token counts for its class above this.
        template: the base model's text; the adapted one's prompts have their own.
        limit: judge a random sample of so many images of the half.
        seed: of halves, sample, controls and intervals.
        n_seeds: do it so many times, with seed, seed + 1, ...: halves, sample and controls drawn anew each time.

    Returns:
        The result. `classes`, `n_chosen`, `n_judged` (images a seed), `hook_point`, `prompts`, `interval` (what the
        intervals cover), `overlap` (see `compare_counts`), `improvement`, and

        accuracy: {"base image, adapted text": {accuracy, accuracy_low, accuracy_high, class_accuracy, loss}, ...}, the
            four ways to put images and texts together.
        masks: rows {classified_by, chosen_by, selection, k, keep_error, accuracy, accuracy_low, accuracy_high}.
            classified_by, chosen_by: base | adapted. selection: class (the k latents most frequent on the image's true
            class), dataset (on all images: the same for every image), random (as frequent as the class's; mean of the
            draws); `all` latents have chosen_by and k "all".
        confusion: {base | adapted: [C][C]}, rows true, columns said; counts of images, summed over seeds.
        prediction: rows {classified_by, chosen_by, selection: class | dataset, k, keep_error, counts: [C][C]}.
            Neither is kept of more than 100 classes.
        conclusion: {sentence, k, points, seen_points (of the gain with the k latents of each model's own),
            without_new_concepts: {share, low, high}, text_only: {share, low, high}}, see docs/decisions/0019.
        dictionaries: with `second_run`: {n_images (held out), k, cells: rows {sae: first | second, run, model: base |
            adapted, fvu, l0, accuracy, accuracy_low, accuracy_high, loss (SAE spliced in, no error term),
            original_accuracy}, shares: rows {sae, share, low, high} (without new concepts, by either SAE), n_firing:
            [first, second], n_without_counterpart (latents of the second), counterpart_cosine, mean_largest_cosine,
            sentence}; else absent.

    Raises:
        ParentMismatchError: other images, another SAE or another model; two stores of the same prompts; a second run of
            another model, hook point or kind of token.
        SettingsError: no labels, other classes than prompts of each class have, values out of range.
    """
    sides = dict(zip(MODELS, (Side.open(base), Side.open(adapted)), strict=True))
    run = _check_pair(sides["base"], sides["adapted"])
    if not k or min(*k, n_random, n_top, n_seeds, limit or 1) < 1 or limit == 0 or not 1 <= high <= low:
        raise SettingsError(
            "--k, --n-random, --n-top, --n-seeds and --limit must be at least 1, and 1 <= --high <= --low."
        )
    grid = sorted({n for n in k if n < run.sae_config.size})
    if not grid:
        raise SettingsError(f"--k must be below the dictionary's {run.sae_config.size:,} latents, got {min(k)}.")
    k_top = min(grid, key=lambda n: (abs(n - n_top), n))
    settings: dict[str, Any] = {
        "k": grid, "n_top": n_top, "high": high, "low": low, "n_random": n_random, "tau": tau,
        "template": template, "limit": limit, "seed": seed, "n_seeds": n_seeds,
    }  # fmt: skip
    parents = {name: side.concepts.artifact for name, side in sides.items()}
    second = second_run if isinstance(second_run, Run | None) else Run.open(second_run)
    if second is not None:
        check_second(run, second, k_top)
        parents["second run"] = second.artifact
    head = describe_result("comparison", settings, parents)
    if found := find_result(out, head, overwrite=overwrite):
        return found
    scenes = _open_scenes(sides, run, template, device)
    labels, names = scenes["base"].labels, scenes["base"].names
    tokens, sae = run.train_config.tokens, run.sae()
    halves = [_halve(labels, names, limit, one) for one in range(seed, seed + n_seeds)]
    # the second run judges the same again, and both runs the held-out images
    total = sum(len(judged) for _, judged in halves) * (1 if second is None else 2)
    done = 0

    def report(n_images: int) -> None:
        nonlocal done
        done += n_images
        if on_progress:
            on_progress(min(done, total), total)

    def count(images: NDArray[np.int64]) -> dict[str, LatentCounts]:
        some = np.full(len(labels), -1)
        some[images] = labels[images]
        return {
            name: count_in_codes(side.codes, some, len(names), tokens=tokens, tau=tau) for name, side in sides.items()
        }

    rounds = []
    for number, (chosen, judged) in enumerate(halves, start=seed):
        masks = make_masks(count(chosen), grid, n_random, number)
        outcomes = judge(sae, tokens, scenes, judged, masks, batch_size=batch_size, report=report)
        rounds.append(Round(number, chosen, judged, outcomes))
    first, other = (counts.by_class for counts in count(scenes["base"].images).values())
    body: dict[str, Any] = {
        "classes": list(names), "n_chosen": len(rounds[0].chosen), "n_judged": len(rounds[0].judged),
        "hook_point": str(run.hook_point), "prompts": sides["adapted"].store.stores[0].settings.prompts,
        "overlap": compare_counts(first, other, names, k=n_top, high=high, low=low),
        **summarize(rounds, names, seed),
    }  # fmt: skip
    body["conclusion"] = conclude(rounds, body["overlap"], k_top, n_top, seed)
    if second is not None:
        body["dictionaries"] = cross_dictionaries(
            (run, second), scenes, rounds, k=k_top, tau=tau, seed=seed, limit=limit,
            batch_size=batch_size, report=report,
        )  # fmt: skip
    return finish_result(out, head, body)


def _check_pair(base: Side, adapted: Side) -> Run:
    """The run of both. Raises ParentMismatchError unless the two differ in prompts only."""
    sides = (base, adapted)
    for what, said in (
        ("images", [str(side.codes.artifact.settings["rows_id"]) for side in sides]),
        ("SAE", [side.codes.artifact.parents["run"].id for side in sides]),
        ("model", [side.store.model_id for side in sides]),
    ):
        if said[0] != said[1]:
            raise ParentMismatchError(
                f"{base.concepts.path} and {adapted.concepts.path} have other {what}: {said[0]} and {said[1]}. "
                "Extract both from the same images in the same order, and encode both by one run of one model."
            )
    prompts = [side.store.stores[0].settings.prompts for side in sides]
    if prompts[0] is not None or prompts[1] is None:
        raise ParentMismatchError(
            f"{base.concepts.path} must be of the plain model and {adapted.concepts.path} of an adapted one. "
            "Give CONCEPTS_BASE first, and extract the other with --prompts."
        )
    return Run.open(base.codes.artifact.parent_path("run"))


def _open_scenes(sides: dict[str, Side], run: Run, template: str, device: str) -> dict[str, ZeroShot]:
    """Both models' classifiers, on the images that are labeled and readable in both stores."""
    first, second = (choose_images(side.store, where=None, limit=None, seed=0) for side in sides.values())
    images = np.intersect1d(first, second)
    return {
        name: open_zero_shot(
            side.store, run.hook_point, templates=template, within=images, by_image=True,
            towers=open_towers(side.store.stores[0].artifact, device=device),
        )
        for name, side in sides.items()
    }  # fmt: skip


def _halve(
    labels: NDArray[np.int64], names: Sequence[str], limit: int | None, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(chosen, judged) images of one seed."""
    chosen, judged = split_halves(labels, seed=seed)
    check_images(chosen, tuple(names), labels, "choose latents on")
    if limit is not None and limit < len(judged):
        judged = np.sort(np.random.Generator(np.random.Philox(seed)).permutation(judged)[:limit])
    return chosen, judged
