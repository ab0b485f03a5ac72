"""predict_classes(): which class the model behind some codes predicts for each of their images."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from actcache.progress import Progress
from actcache.prompts import open_towers
from actcache.seen import Seen
from analysis.classifier.classifier import Classifier
from analysis.classifier.judge import choose_judge, open_judge
from analysis.classifier.labeled_images import choose_classes
from analysis.classifier.probe import fit_probe
from analysis.classifier.probe_training import ProbeTraining, choose_training
from analysis.classifier.streams import as_numpy, batches
from analysis.config import ModelOptions, ProbeConfig
from analysis.lineage import open_parents
from analysis.results import JudgeFacts
from saetrain import CodeStore

PROBE = ProbeConfig()


class Answers(NamedTuple):
    """What a model says about images.

    Attributes:
        classes: [I] class names, "" for an image without a label or that could not be read.
        seen: the images that a probe has learned from; None of another judge.
        training: of the probe, to ask it about other images.
    """

    classes: NDArray[Any]
    judge: JudgeFacts
    seen: Seen | None
    training: ProbeTraining | None


@torch.no_grad()
def predict_classes(
    codes: CodeStore, judge: str = "zero-shot", *, config: ProbeConfig = PROBE,
    training: ProbeTraining | None = None, store: str | Path | None = None, model: ModelOptions = ModelOptions(),
    on_progress: Progress | None = None,
) -> Answers:  # fmt: skip
    """Ask the model.

    Args:
        judge: auto, zero-shot, probe or head.
        config, training: what a probe reads and is trained on; by default the training split of the codes' store.
        store: where the activations of the codes are; by default where the codes say they are.

    Raises:
        ParentMismatchError: something else lies where the store was. Others as `choose_classes`, `open_judge` and
            `fit_probe`.
    """
    opened = open_parents(codes, store)
    labeled = choose_classes(opened, codes.hook_point)
    towers = open_towers(opened.stores[0].artifact, model=model.model, pretrained=model.pretrained, device=model.device)
    kind, probe = choose_judge(judge, labeled, towers), None
    if kind == "probe":
        training = training or choose_training(opened, config)
        probe = fit_probe(training, labeled.names, towers.vision, batch_size=model.batch_size)
    classifier = Classifier.of(labeled, towers.vision, open_judge(kind, labeled, towers, probe=probe))
    names, predicted = np.array(classifier.names, dtype=object), np.full(codes.n_images, "", dtype=object)
    for images in batches(classifier.images, model.batch_size, on_progress):
        predicted[images] = names[as_numpy(classifier.logits(classifier.read(images)).argmax(1))]
    if probe is None or training is None:
        return Answers(predicted, classifier.judge.facts, None, None)
    return Answers(predicted, classifier.judge.facts, training.seen_in(opened), training)
