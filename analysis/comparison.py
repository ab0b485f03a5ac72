"""compare(): what prompt tuning changed, the concepts or the mapping from concepts to classes.

In: concept tables of a base and of an adapted model: one SAE, one set of images. Out: one JSON file:
`overlap` of the latents that the two models use; `accuracy` of both and with texts swapped (base image x adapted text
and the reverse); `masks`, classifiers that see k latents a class, chosen with either model, judged with either model,
beside frequency-matched random latents, with and without the SAE's error term; `confusion` and `prediction` counts; and
`conclusion`, one sentence with the share of the gain that needs no new concept.

Latents are chosen on one half of each class's images and judged on the other. Masks know the true class,
as PatchSAE's do.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache import ActivationStore, ParentMismatchError, SettingsError, StoreGroup, Towers, open_stores, open_towers
from analysis.concepts import TAU, ConceptTable
from analysis.fidelity import Outcome, Outcomes
from analysis.intervals import LEVELS, N_RESAMPLES, bootstrap_intervals
from analysis.intervention import Mask
from analysis.overlap import compare_counts, improvement_rate
from analysis.ranking import LatentCounts, count_in_codes, match_frequency, rank_latents, split_halves
from analysis.results import describe_result, find_result, finish_result
from analysis.splicing import splice
from analysis.zero_shot import BATCH_IMAGES, ZeroShot, batches, choose_images, number_classes, open_zero_shot
from saetrain import CodeStore, Run

MODELS = ("base", "adapted")
K_GRID = (1, 2, 5, 10, 50, 100, 500)
Key = tuple[Any, ...]
"""(model, "original"), (model, "swap"), or (model, chosen by, selection, k, draw, keep_error)."""


@dataclass(frozen=True)
class Side:
    """One of the two models: its concepts, its codes, its activations."""

    concepts: ConceptTable
    codes: CodeStore
    store: StoreGroup

    @classmethod
    def open(cls, path: str | Path) -> "Side":
        """Raises what `ConceptTable.open`, `CodeStore.open` and `ActivationStore.open` raise."""
        concepts = ConceptTable.open(path)
        codes = CodeStore.open(concepts.artifact.parent_path("codes"))
        names = sorted(name for name in codes.artifact.parents if name.startswith("store"))
        return cls(concepts, codes, open_stores([ActivationStore.open(codes.artifact.parent_path(n)) for n in names]))


def compare(
    base: str | Path,
    adapted: str | Path,
    out: str | Path | None = None,
    *,
    k: Sequence[int] = K_GRID,
    n_top: int = 50,
    high: int = 50,
    low: int = 100,
    n_random: int = 2,
    tau: float = TAU,
    template: str = "a photo of a {}.",
    limit: int | None = None,
    seed: int = 0,
    device: str = "auto",
    batch_size: int = BATCH_IMAGES,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Compare a model with its adapted self.

    Args:
        base, adapted: concept tables of the two stores, by the same run.
        out: a JSON file for the result; the same call again returns what is there.
        k: latents a class that the masked classifiers see.
        n_top: latents whose overlap is measured; the conclusion is drawn at the nearest k.
        high, low: ranks that bound the groups, see `group_latents`.
        n_random: draws of the random control.
        tau: a token counts for its class above this.
        template: the base model's text; the adapted one's prompts have their own.
        limit: judge a random sample of so many images of the half.
        seed: of halves, sample, controls and intervals.

    Raises:
        ParentMismatchError: other images, another SAE or another model; two stores of the same prompts.
        SettingsError: no labels, CoCoOp's prompts, values out of range.
    """
    sides = dict(zip(MODELS, (Side.open(base), Side.open(adapted)), strict=True))
    run = _check_pair(sides["base"], sides["adapted"])
    if not k or min(k) < 1 or n_random < 1 or not 1 <= high <= low or n_top < 1:
        raise SettingsError("--k, --n-random and --n-top must be at least 1, and 1 <= --high <= --low.")
    grid = sorted(set(k))
    settings: dict[str, Any] = {
        "k": grid, "n_top": n_top, "high": high, "low": low, "n_random": n_random, "tau": tau,
        "template": template, "limit": limit, "seed": seed,
    }  # fmt: skip
    parents = {name: side.concepts.artifact for name, side in sides.items()}
    head = describe_result("comparison", settings, parents)
    out = None if out is None else Path(out)
    if found := find_result(out, head, overwrite=overwrite):
        return found
    towers = {name: open_towers(side.store.stores[0].artifact, device=device) for name, side in sides.items()}
    store = sides["base"].store
    labeled = [choose_images(side.store, where=None, limit=None, seed=seed) for side in sides.values()]
    images = np.intersect1d(labeled[0], labeled[1])
    names, labels = number_classes(store, images)
    chosen, judged = split_halves(labels, seed=seed)
    if limit is not None and limit < len(judged):
        judged = np.sort(np.random.Generator(np.random.Philox(seed)).permutation(judged)[:limit])
    scenes = {name: _scene(side, run, towers[name], judged, template, names) for name, side in sides.items()}
    whole, half = np.full(len(labels), -1), np.full(len(labels), -1)
    whole[images], half[chosen] = labels[images], labels[chosen]
    tokens = run.train_config.tokens
    counts = {
        name: [count_in_codes(side.codes, some, len(names), tokens=tokens, tau=tau) for some in (whole, half)]
        for name, side in sides.items()
    }
    masks = list(_make_masks({n: c[1] for n, c in counts.items()}, grid, n_random, run, seed))
    outcomes = _judge(run, scenes, judged, masks, batch_size, on_progress)
    first, second = (counts[name][0].by_class for name in MODELS)
    body: dict[str, Any] = {
        "classes": list(names), "n_chosen": len(chosen), "n_judged": len(judged), "hook_point": str(run.hook_point),
        "prompts": sides["adapted"].store.stores[0].artifact.settings["prompts"],
        "overlap": compare_counts(first, second, names, k=n_top, high=high, low=low),
        **_summarize(outcomes, names, seed),
    }  # fmt: skip
    body["conclusion"] = _conclude(outcomes, body, n_top, seed)
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
    prompts = [side.store.stores[0].artifact.settings.get("prompts") for side in sides]
    if prompts[0] is not None or prompts[1] is None:
        raise ParentMismatchError(
            f"{base.concepts.path} must be of the plain model and {adapted.concepts.path} of an adapted one. "
            "Give CONCEPTS_BASE first, and extract the other with --prompts."
        )
    return Run.open(base.codes.artifact.parent_path("run"))


def _scene(
    side: Side, run: Run, towers: Towers, judged: NDArray[np.int64], template: str, names: tuple[str, ...]
) -> ZeroShot:
    scene = open_zero_shot(side.store, run.hook_point, templates=template, within=judged, towers=towers)
    if scene.names != names:
        raise SettingsError("Some class has no image to judge. Give more images, or no --limit.")
    return scene


def _make_masks(
    counts: dict[str, LatentCounts], grid: list[int], n_random: int, run: Run, seed: int
) -> Iterator[tuple[str, Mask]]:
    """(chosen by, mask): the k most frequent latents of each class, and random ones as frequent."""
    rng = np.random.Generator(np.random.Philox(seed))
    grid = [k for k in grid if k < run.sae_config.size]
    for name, found in counts.items():
        ranked = rank_latents(found.by_class, max(grid, default=1))
        for k in grid:
            yield name, Mask("class", k, 0, torch.from_numpy(ranked[:, :k]))
            for draw in range(n_random):
                drawn = match_frequency(ranked[:, :k], found.by_dataset, rng=rng)
                if drawn is not None:
                    yield name, Mask("random", k, draw, torch.from_numpy(drawn))


@torch.no_grad()
def _judge(
    run: Run, scenes: dict[str, ZeroShot], judged: NDArray[np.int64], masks: list[tuple[str, Mask]], batch_size: int,
    on_progress: Callable[[int, int], None] | None,
) -> dict[Key, Outcome]:  # fmt: skip
    found: dict[Key, Outcomes] = {}
    device, done = scenes["base"].vision.device, 0
    sae, tokens = run.sae().to(device), run.train_config.tokens
    masks = [(name, Mask(m.selection, m.k, m.draw, m.lists.to(device))) for name, m in masks]
    for images in batches(judged, batch_size):
        truth = scenes["base"].labels[images]
        label = torch.from_numpy(truth).to(device)
        tables = [mask.table(label, sae.config.size) for _, mask in masks]
        for model, scene in scenes.items():
            other = scenes[MODELS[1 - MODELS.index(model)]]
            spliced = splice(sae, scene.read(images), scene.store.n_tokens, tokens)

            def add(key: Key, logits: Tensor, truth: NDArray[np.int64] = truth) -> None:
                found.setdefault(key, Outcomes()).add(logits, truth)

            embedded = scene.embed(spliced.x)
            add((model, "original"), scene.logit_scale * embedded @ scene.classes.T)
            add((model, "swap"), scene.logit_scale * embedded @ other.classes.T)
            for keep_error in (False, True):
                rest: Tensor | float = spliced.error if keep_error else 0.0
                all_latents = scene.logits(spliced.stream(spliced.whole + rest))
                add((model, "all", "all", "all", 0, keep_error), all_latents)
            for (chosen_by, mask), table in zip(masks, tables, strict=True):
                kept = spliced.keep(table)
                for keep_error in (False, True):
                    key = (model, chosen_by, mask.selection, mask.k, mask.draw, keep_error)
                    add(key, scene.logits(spliced.stream(kept + (spliced.error if keep_error else 0.0))))
        done += len(images)
        if on_progress:
            on_progress(done, len(judged))
    return {key: outcomes.result() for key, outcomes in found.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Summing up


def _summarize(outcomes: dict[Key, Outcome], names: tuple[str, ...], seed: int) -> dict[str, Any]:
    accuracy, rows, prediction = {}, [], []
    right: dict[Key, list[NDArray[Any]]] = {}
    for key, outcome in outcomes.items():
        if len(key) == 2:
            model, what = key
            text = model if what == "original" else MODELS[1 - MODELS.index(model)]
            accuracy[f"{model} image, {text} text"] = outcome.numbers()
            continue
        right.setdefault((*key[:4], key[5]), []).append(outcome.right)
        if key[2] == "class":
            row = dict(zip(("classified_by", "chosen_by", "selection", "k"), key, strict=False))
            prediction.append(row | {"keep_error": key[5], "counts": _confusion(outcome, len(names)).tolist()})
    for key, draws in right.items():
        mean = np.mean(draws, axis=0)
        low, high = bootstrap_intervals(mean[:, None], seed=seed)
        row = dict(zip(("classified_by", "chosen_by", "selection", "k", "keep_error"), key, strict=True))
        rows.append(
            row | {"accuracy": float(mean.mean()), "accuracy_low": float(low[0]), "accuracy_high": float(high[0])}
        )
    base, adapted = (outcomes[model, "original"] for model in MODELS)
    delta = improvement_rate(float(base.right.mean()), float(adapted.right.mean()))
    confusion = {model: _confusion(outcomes[model, "original"], len(names)).tolist() for model in MODELS}
    return {"accuracy": accuracy, "improvement": delta, "masks": rows, "confusion": confusion, "prediction": prediction}


def _confusion(outcome: Outcome, n_classes: int) -> NDArray[np.int64]:
    """[C, C]: images of true class (row) that were said to be of a class (column)."""
    flat = np.bincount(outcome.label * n_classes + outcome.predicted, minlength=n_classes**2)
    return flat.reshape(n_classes, n_classes)


def _conclude(outcomes: dict[Key, Outcome], body: dict[str, Any], n_top: int, seed: int) -> dict[str, Any]:
    """The share of the gain that is there with the base model's latents, and with the base model's images, in words.

    With A the accuracy of a model (first letter) that sees the top k latents chosen by a model (second), error term on:
    share = (A[adapted, base] - A[base, base]) / (A[adapted, adapted] - A[base, base]).
    """
    stored = sorted({key[3] for key in outcomes if len(key) == 6 and key[2] == "class"})
    k = min(stored, key=lambda n: (abs(n - n_top), n))

    def seen(model: str, chosen_by: str) -> NDArray[np.bool_]:
        return outcomes[model, chosen_by, "class", k, 0, True].right

    start = seen("base", "base")
    same, own = _gain(seen("adapted", "base"), start), _gain(seen("adapted", "adapted"), start)
    base, adapted = (outcomes[model, "original"].right for model in MODELS)
    text, whole = _gain(outcomes["base", "swap"].right, base), _gain(adapted, base)
    latents, texts = _share(same, own, seed), _share(text, whole, seed)
    points = 100 * float(whole.mean())
    overlap = body["overlap"]["task"]["jaccard"]
    sentence = (
        f"Accuracy goes from {base.mean():.1%} to {adapted.mean():.1%} ({points:+.1f} points). "
        f"Seeing only the {k} latents a class that the base model uses most, the adapted model keeps "
        f"{_say(latents)} of the gain it makes with the {k} of its own; what it keeps needs no new concept. "
        f"Its texts with the base model's images make {_say(texts)} of the whole gain; "
        f"the two models share {overlap:.0%} of a class's top {n_top} latents."
    )
    return {"sentence": sentence, "k": k, "points": points, "without_new_concepts": latents, "text_only": texts}


def _gain(after: NDArray[np.bool_], before: NDArray[np.bool_]) -> NDArray[np.float64]:
    return after.astype(np.float64) - before


def _share(part: NDArray[np.float64], whole: NDArray[np.float64], seed: int) -> dict[str, float | None]:
    """mean(part) / mean(whole) with a paired bootstrap interval; None where the whole is not above 0 for certain."""
    low, _ = bootstrap_intervals(whole[:, None], seed=seed)
    if low[0] <= 0:
        return {"share": None, "low": None, "high": None}
    rng = np.random.Generator(np.random.Philox(seed))
    ratios = np.empty(N_RESAMPLES)
    for i in range(N_RESAMPLES):
        drawn = rng.integers(len(part), size=len(part))
        total = whole[drawn].sum()
        ratios[i] = part[drawn].sum() / total if total else np.nan
    bounds = np.nanpercentile(ratios, LEVELS)
    return {"share": float(part.mean() / whole.mean()), "low": float(bounds[0]), "high": float(bounds[1])}


def _say(share: dict[str, float | None]) -> str:
    if share["share"] is None:
        return "an unknown share (that gain is not certain)"
    return f"{share['share']:.0%} ({share['low']:.0%} to {share['high']:.0%})"
