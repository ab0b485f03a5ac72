"""Measure 2, the task that is kept: what the rest of the model answers with a reconstruction in place of the stream.

    task accuracy    of the judge, on the labeled judged images
    task agreement   share of the images that are classified as with the original activations
    task loss        of the judge
    task recovered   (accuracy - accuracy at the mean token) / (original accuracy - accuracy at the mean token)

The accuracies with the original activations, with zeros and with the mean token stand in the details of each. Runs and
baselines are spliced in by the same code as in `evaluate`, and the judge is the same for all of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actcache import PipelineError
from actcache.prompts import Towers, open_towers
from actcache.seen import Seen
from actcache.store import select_images
from analysis.benchmark.measured import Measured, Skipped
from analysis.benchmark.resamples import divide
from analysis.benchmark.subject import Judged, Subject
from analysis.classifier import (
    ClassifiedImages,
    Classifier,
    LinearProbe,
    Outcome,
    ProbeTraining,
    choose_classes,
    choose_judge,
    choose_tokens,
    choose_training,
    fit_probe,
    label_names,
    open_judge,
    sample_images,
)
from analysis.config import ModelOptions, StudyConfig
from analysis.interventions import Study, compare_variants
from analysis.results import JudgeFacts
from saetrain import Run

NAME = "task"
N_PROBE = 20_000
"""Choosing images that a probe, as the judge, is trained on at most."""
REFERENCES = ("original", "zero", "mean")


@dataclass(frozen=True)
class Task:
    """The judge, and what it answers without an SAE.

    Attributes:
        places: [I'] numbers of the labeled images among the judged ones.
        references: outcomes for the original activations, zeros and mean tokens.
    """

    towers: Towers
    classifier: Classifier
    config: StudyConfig
    batch_size: int
    places: NDArray[np.int64]
    references: Mapping[str, Outcome]

    @property
    def facts(self) -> JudgeFacts:
        return self.classifier.judge.facts


def open_task(
    judged: Judged, run: Run, config: StudyConfig, model: ModelOptions,
    on_progress: Callable[[int, int], None] | None = None,
) -> Task | Skipped:  # fmt: skip
    """Open the model and its judge, and measure the references.

    Args:
        run: one of the runs; all have its hook point.

    Returns:
        Why the task cannot be measured, where there are no labels, or no tower at hand that reads the hook point.
    """
    try:
        training = None if config.probe_store is None else _probe_of_store(judged, config)
        classified = _classify(judged, run, config, training)
        first = judged.store.stores[0].artifact
        towers = open_towers(first, model=model.model, pretrained=model.pretrained, device=model.device)
        kind, probe = choose_judge(config.judge, classified, towers), None
        if kind == "probe":
            training = training or _probe_of_choosing(judged, config)
            classified = _classify(judged, run, config, training)
            probe = fit_probe(training, classified.names, towers.vision, batch_size=model.batch_size)
        return _open(judged, run, classified, towers, kind, probe, config, model, on_progress)
    except PipelineError as error:
        return Skipped(NAME, " ".join(str(error).split()))


def _open(
    judged: Judged, run: Run, classified: ClassifiedImages, towers: Towers, kind: str, probe: LinearProbe | None,
    config: StudyConfig, model: ModelOptions, on_progress: Callable[[int, int], None] | None,
) -> Task:  # fmt: skip
    judge = open_judge(kind, classified, towers, probe=probe)
    classifier = Classifier.of(classified, towers.vision, judge)
    places = np.searchsorted(judged.images, classifier.images)
    task = Task(towers, classifier, config, model.batch_size, places, {})
    references = compare_variants(study_of(task, run), on_progress, names=REFERENCES)
    return Task(towers, classifier, config, model.batch_size, places, references)


def study_of(task: Task, run: Run) -> Study:
    """A study of a run, or of a baseline, by the judge of the task on its images."""
    store = task.classifier.store
    sae, tokens = run.sae().to(task.classifier.vision.device), choose_tokens(run, store.layout, task.config.tokens)
    seen = Seen(np.zeros(store.n_images, dtype=bool))  # the judged images are chosen already
    return Study(run, seen, sae, task.towers, task.classifier, task.config, tokens, task.batch_size)


def _classify(judged: Judged, run: Run, config: StudyConfig, training: ProbeTraining | None) -> ClassifiedImages:
    """The labeled judged images that no probe has learned from. Raises SettingsError."""
    images = judged.images
    if training is not None:
        images = images[~training.seen_in(judged.store).images[images]]
    return choose_classes(
        judged.store, run.hook_point, templates=config.templates, class_names=config.class_names, within=images
    )


def _probe_of_store(judged: Judged, config: StudyConfig) -> ProbeTraining:
    return choose_training(judged.store, config, other=config.probe_store, seed=config.seed)


def _probe_of_choosing(judged: Judged, config: StudyConfig) -> ProbeTraining:
    names = label_names(judged.store)
    wanted = names.astype(bool)
    if config.probe_where is not None:
        wanted &= select_images(judged.store.images, config.probe_where, flag="--probe-where")
    images = sample_images(judged.choosing[wanted[judged.choosing]], N_PROBE, config.seed)
    return ProbeTraining(judged.store, images, names[images], config.probe_features, config.seed)


def measure_task(
    subject: Subject, judged: Judged, task: Task | Skipped, on_progress: Callable[[int, int], None] | None = None
) -> list[Measured | Skipped]:
    """The four numbers of a subject."""
    if isinstance(task, Skipped):
        return [task]
    outcome = compare_variants(study_of(task, subject.run), on_progress, names=("sae",))["sae"]
    return describe_task(outcome, task.references, task.places, judged)


def describe_task(
    outcome: Outcome, references: Mapping[str, Outcome], places: NDArray[np.int64], judged: Judged
) -> list[Measured | Skipped]:
    """The four numbers from what the judge answered for each image [I'].

    Args:
        places: [I'] as in `Task`.
    """
    original, mean = references["original"], references["mean"]
    columns = [outcome.right, outcome.predicted == original.predicted, outcome.loss, original.right, mean.right]
    values, replicates = judged.resamples.means(np.stack(columns, axis=1).astype(np.float64), places)
    facts: dict[str, object] = {
        "n_images": len(places),
        "accuracy": {name: float(each.right.mean()) for name, each in references.items()},
        "loss": {name: float(each.loss.mean()) for name, each in references.items()},
    }
    of_sae, whole, ablated = (np.append(values[i], replicates[:, i]) for i in (0, 3, 4))
    shares = divide(of_sae - ablated, whole - ablated, whole > ablated)
    if np.isfinite(shares[0]):
        recovered = Measured("task recovered", float(shares[0]), shares[1:], True, facts)
    else:
        reason = "the mean token does no harm, so there is nothing to recover"
        recovered = Measured("task recovered", None, None, True, {**facts, "no_interval": reason})
    return [
        Measured("task accuracy", float(values[0]), replicates[:, 0], True, facts),
        Measured("task agreement", float(values[1]), replicates[:, 1], True, facts),
        Measured("task loss", float(values[2]), replicates[:, 2], False, facts),
        recovered,
    ]
