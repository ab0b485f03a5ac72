"""evaluate_fidelity(): what is left of the classifier when an SAE stands in for the stream.

In: runs, a store with labels. Out: zero-shot accuracy and loss, five ways: with the activations as they are
(`original`), with their reconstruction (`sae`), with reconstruction and error term (`sae+error`: the original again,
the check that the splice is right), with zeros (`zero`) and with the mean token of its kind (`mean`).

loss: cross-entropy of softmax(logit scale x cosine) over the class names, CLIP's contrastive loss with the classes as
texts. recovered: (ablated - sae) / (ablated - original); the share alone hides how much there was to lose, so the
absolute values stand beside it.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actcache import open_stores
from actcache.prompts import open_towers
from actcache.store import StoreGroup, Stores
from analysis.classifier import BATCH_IMAGES, Outcome, Outcomes, Spliced, ZeroShot
from analysis.interventions.study import PLAIN_JUDGE, Judge, Report, Study, open_study, study_parents
from analysis.lineage import find_runs
from analysis.results import describe_result, find_result, finish_result
from saetrain import Run

VARIANTS = ("original", "sae", "sae+error", "zero", "mean")


def evaluate_fidelity(
    run: Run | str | Path,
    store: Stores | StoreGroup,
    out: str | Path | None = None,
    *,
    judge: Judge = PLAIN_JUDGE,
    model: str | None = None,
    pretrained: str | None = None,
    device: str = "auto",
    batch_size: int = BATCH_IMAGES,
    overwrite: bool = False,
    on_progress: Report | None = None,
) -> dict[str, Any]:
    """Measure one run, or every run of a folder (a sweep: several layers, several sizes), on labeled images.

    Args:
        store: with labels, of the run's model. Of the store that a run was trained on, only held-out images count.
        out: a JSON file for the result; the same call again returns what is there.
        judge: on which images, against which texts and on which tokens.
        model, pretrained, device: see `open_zero_shot`.
        batch_size: images a forward pass. Speed only.
        on_progress: called with (images done, images in all).

    Returns:
        The result: settings, class names, and `runs`: for each its hook point, the number of images, the five
        variants' numbers, and the recovered share of accuracy and loss against either ablation (None where the ablation
        costs nothing).

    Raises:
        SettingsError, ParentMismatchError, SchemaError: see `open_zero_shot`, `find_runs`.
    """
    runs = find_runs(run)
    store = open_stores(store)
    head = describe_result("fidelity", asdict(judge), study_parents(runs, store))
    if found := find_result(out, head, overwrite=overwrite):
        return found
    for one in runs:
        one.check_store(store)
    towers = open_towers(store.stores[0].artifact, model=model, pretrained=pretrained, device=device)
    measured = []
    for number, one in enumerate(runs):
        study = open_study(one, store, judge, batch_size=batch_size, towers=towers)

        def report(done: int, total: int, number: int = number) -> None:
            if on_progress:
                on_progress(number * total + done, len(runs) * total)

        measured.append(_describe(study, compare_variants(study, report)))
    names = study.scene.names
    return finish_result(out, head, {"n_classes": len(names), "classes": list(names), "runs": measured})


@torch.no_grad()
def compare_variants(study: Study, on_progress: Report | None = None) -> dict[str, Outcome]:
    """The five variants' outcomes on the study's images."""
    scene, means = study.scene, mean_tokens(study.scene)
    outcomes = {name: Outcomes() for name in VARIANTS}
    for images, spliced in study.batches(scene.images, on_progress):
        for name in VARIANTS:
            outcomes[name].add(scene.logits(_variant(name, spliced, means)), scene.labels[images])
    return {name: collected.result() for name, collected in outcomes.items()}


def mean_tokens(scene: ZeroShot) -> Tensor:
    """[T, D]: the mean activation of each token's kind over the whole store, from its records."""
    store, hook = scene.store, scene.hook_point
    cls, patch = (torch.from_numpy(store.statistics(hook, kind).mean).float() for kind in ("cls", "patch"))
    return torch.cat([cls[None], patch.expand(store.n_tokens - 1, -1)]).to(scene.vision.device)


def _variant(name: str, spliced: Spliced, means: Tensor) -> Tensor:
    if name == "original":
        return spliced.x
    new = {
        "sae": lambda: spliced.whole,
        "sae+error": lambda: spliced.whole + spliced.error,
        "zero": lambda: torch.zeros_like(spliced.old),
        "mean": lambda: means[spliced.part].expand_as(spliced.old),
    }[name]()
    return spliced.stream(new)


def _describe(study: Study, outcomes: dict[str, Outcome]) -> dict[str, Any]:
    numbers = {name: outcome.numbers() for name, outcome in outcomes.items()}
    for name, outcome in outcomes.items():
        numbers[name]["same_prediction"] = float((outcome.predicted == outcomes["original"].predicted).mean())
    recovered = {
        f"{measure}_{ablation}": _recovered(
            measure, *(numbers[name][measure] for name in ("original", "sae", ablation))
        )
        for measure in ("accuracy", "loss")
        for ablation in ("zero", "mean")
    }
    return {**study.facts(), "n_images": len(study.scene.images), "variants": numbers, "recovered": recovered}


def _recovered(measure: str, original: float, sae: float, ablated: float) -> float:
    """NaN where the ablation does no harm: accuracy does not fall, or loss does not rise."""
    harm = original - ablated if measure == "accuracy" else ablated - original
    return (sae - ablated) / (original - ablated) if harm > 0 else float("nan")
