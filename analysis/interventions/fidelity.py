"""evaluate_fidelity(): how much of the classifier is left when an SAE stands in for the stream.

In: runs, and a store with labels. Out: accuracy and loss of a judge for five variants of the stream: the activations
themselves (`original`), their reconstruction (`sae`), reconstruction plus error term (`sae+error`: this restores the
original and so checks the splice), zeros (`zero`) and the mean token of each kind (`mean`).

loss: the one with which the judge was trained, with the class names as CLIP's texts: cross-entropy of softmax(logit
scale x cosine) for CLIP and of softmax(logits) for a probe or a head; the sigmoid loss for SigLIP, beside which
softmax_loss stands. recovered: (ablated - sae) / (ablated - original). The share alone hides how much there was to
lose, so the absolute values stand beside it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from actcache import open_stores
from actcache.progress import Progress
from actcache.store import StoreGroup, Stores, Tokens
from analysis.classifier import Classifier, Outcome, Outcomes, Spliced
from analysis.config import ModelOptions, StudyConfig
from analysis.interventions.study import Study, run_study
from analysis.lineage import find_runs
from analysis.results import Fidelity, Head, RecoveredShares, RunFidelity, VariantScores
from saetrain import Run

VARIANTS = ("original", "sae", "sae+error", "zero", "mean")


def evaluate_fidelity(
    run: Run | str | Path,
    store: Stores | StoreGroup,
    out: str | Path | None = None,
    *,
    study: StudyConfig = StudyConfig(),
    model: ModelOptions = ModelOptions(),
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> Fidelity:
    """Measure one run, or every run of a folder (a sweep: several layers, several sizes), on labeled images.

    Args:
        store: a labeled store of the run's model. Images that a run has learned from are left out.
        out: a JSON file for the result; the same call again returns what the file holds.
        on_progress: called with (images done, images in all).

    Raises:
        SettingsError, ParentMismatchError, SchemaError: see `run_study`, `find_runs`.
    """
    runs = find_runs(run)

    def measure(head: Head, studies: Iterator[Study]) -> Fidelity:
        measured: list[RunFidelity] = []
        names: tuple[str, ...] = ()

        def report(done: int, total: int) -> None:
            if on_progress:
                on_progress(len(measured) * total + done, len(runs) * total)

        for opened in studies:
            names = opened.classifier.names
            measured.append(_describe(opened, compare_variants(opened, report)))
        return Fidelity(*head, n_classes=len(names), classes=names, runs=tuple(measured))

    return run_study(
        Fidelity, runs, open_stores(store), out, measure, settings={}, study=study, model=model, overwrite=overwrite
    )


@torch.no_grad()
def compare_variants(
    study: Study, on_progress: Progress | None = None, *, names: Sequence[str] = VARIANTS
) -> dict[str, Outcome]:
    """Outcomes of some variants, by default all five, on the study's images."""
    classifier, means = study.classifier, mean_tokens(study.classifier, study.tokens)
    outcomes = {name: Outcomes(classifier.judge.facts.loss) for name in names}
    for images, spliced in study.batches(classifier.images, on_progress):
        for name in names:
            outcomes[name].add(classifier.logits(_variant(name, spliced, means)), classifier.labels[images])
    return {name: collected.result() for name, collected in outcomes.items()}


def mean_tokens(classifier: Classifier, tokens: str) -> Tensor:
    """[t, D]: for each token that is replaced, the mean activation of its kind over the whole store, from records."""
    store, kind = classifier.store, classifier.store.layout.token_kind(tokens)
    kinds: tuple[Tokens, ...] = ("cls", "patch") if kind == "all" else (kind,)
    means = [torch.from_numpy(store.statistics(classifier.hook_point, each).mean).float() for each in kinds]
    rows = [mean.expand(store.n_read_tokens(each), -1) for each, mean in zip(kinds, means, strict=True)]
    return torch.cat(rows).to(classifier.vision.device)


def _variant(name: str, spliced: Spliced, means: Tensor) -> Tensor:
    if name == "original":
        return spliced.x
    new = {
        "sae": lambda: spliced.whole,
        "sae+error": lambda: spliced.whole + spliced.error,
        "zero": lambda: torch.zeros_like(spliced.old),
        "mean": lambda: means.expand_as(spliced.old),
    }[name]()
    return spliced.stream(new)


def _describe(study: Study, outcomes: dict[str, Outcome]) -> RunFidelity:
    original = outcomes["original"].predicted
    variants = {
        name: VariantScores(**asdict(outcome.scores()), same_prediction=float((outcome.predicted == original).mean()))
        for name, outcome in outcomes.items()
    }
    sae, ablations = variants["sae"], ("zero", "mean")
    accuracy = [_recovered(variants["original"].accuracy, sae.accuracy, variants[name].accuracy) for name in ablations]
    loss = [_recovered(-variants["original"].loss, -sae.loss, -variants[name].loss) for name in ablations]
    return RunFidelity(*study.facts, len(study.classifier.images), variants, RecoveredShares(*accuracy, *loss))


def _recovered(original: float, sae: float, ablated: float) -> float | None:
    """The share of a score, of which more is better; None where the ablation does no harm."""
    return (sae - ablated) / (original - ablated) if original > ablated else None
