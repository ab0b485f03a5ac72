"""Measure 5, attributes of images: up to three latents that together answer whether an image has one.

    MATCHScore                 mean over the attributes of the F1 of the answers; see coalitions.py
    MATCHScore above untrained minus that of the run's untrained SAE on the same resamples. Wide dictionaries have more
                               latents to choose among, trained or not, so this is the number to read
    TAPAScore                  what the coalitions do where one attribute of an image is changed; see image_pairs.py

Coalitions are chosen on the choosing images. The details hold what the F1 is of answers that are always yes (`always`),
and that of the answers for other images (`shuffled`). Source: sae-concept-eval (arXiv 2606.24716).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from actcache.progress import Progress
from analysis.benchmark.attributes import Attributes, Marked
from analysis.benchmark.coalitions import MOST, answer_coalitions, choose_coalitions
from analysis.benchmark.image_pairs import ImagePairs, measure_pairs
from analysis.benchmark.measured import Measured, Skipped
from analysis.benchmark.ranked_patches import draw_weights
from analysis.benchmark.resamples import divide
from analysis.benchmark.subject import Judged, Subject

Array = NDArray[np.float64]

NAME = "MATCHScore"
N_LISTED = 256


@dataclass(frozen=True)
class Matching:
    """What all subjects are measured with, and what has been found of them.

    Attributes:
        untrained: the untrained SAE of each run, by the run's name.
        pairs: images that differ in one attribute; None where none were given.
    """

    judged: Judged
    attributes: Attributes | Skipped
    untrained: Mapping[str, Subject]
    pairs: ImagePairs | Skipped | None = None
    _found: dict[str, "Found"] = field(default_factory=dict)

    def find(self, subject: Subject, attributes: Attributes, on_progress: Progress | None = None) -> "Found":
        """The coalitions of a subject, which are chosen once."""
        if subject.name not in self._found:
            self._found[subject.name] = find_coalitions(subject, self.judged, attributes, on_progress)
        return self._found[subject.name]


@dataclass(frozen=True)
class Found:
    """The coalitions [A, 3] of a subject, F1 [A, n + 1] of the judged images and their resamples, `shuffled` [A]."""

    coalitions: NDArray[np.int64]
    f1: Array
    shuffled: Array


def measure_matching(
    subject: Subject, matching: Matching, on_progress: Progress | None = None
) -> list[Measured | Skipped]:
    """The three numbers of a subject, as far as they exist.

    Args:
        on_progress: called with (images done, in all).
    """
    attributes, pairs = matching.attributes, matching.pairs
    if isinstance(attributes, Skipped):
        return [attributes]
    found = matching.find(subject, attributes, on_progress)
    mean = found.f1.mean(0)
    measured: list[Measured | Skipped] = [Measured(NAME, float(mean[0]), mean[1:], True, describe(attributes, found))]
    if (untrained := matching.untrained.get(subject.name)) is not None:
        other = matching.find(untrained, attributes, on_progress).f1.mean(0)
        above = mean - other
        about = {"untrained": float(other[0])}
        measured.append(Measured(f"{NAME} above untrained", float(above[0]), above[1:], True, about))
    if isinstance(pairs, ImagePairs):
        measured.append(measure_pairs(subject, matching.judged, attributes, found.coalitions, pairs))
    elif pairs is not None:
        measured.append(pairs)
    return measured


def find_coalitions(
    subject: Subject, judged: Judged, attributes: Attributes, on_progress: Progress | None = None
) -> Found:
    """Choose coalitions on the choosing images, and judge them on the others."""
    choosing, marked = attributes.choosing, attributes.judged
    n_images = MOST * len(choosing.images) + len(marked.images)

    def report(done: int) -> None:
        if on_progress:
            on_progress(done, n_images)

    coalitions = choose_coalitions(subject.codes, choosing, report)
    answer = answer_coalitions(subject.codes, marked.images, coalitions)
    report(n_images)
    weights = draw_weights(judged.resamples, np.arange(len(judged.images))).astype(np.float64)
    order = np.random.Generator(np.random.Philox(judged.seed)).permutation(len(answer))
    return Found(
        coalitions,
        score_answers(answer, marked, weights).T,
        score_answers(answer, Marked(marked.images, marked.values[order]), weights[:1])[0],
    )


def score_answers(answer: NDArray[np.bool_], marked: Marked, weights: Array) -> Array:
    """[n + 1, A]: F1 of answers [I, A]; where a resample has no image with an attribute, that of the images themselves.

    Args:
        weights: [n + 1, I]; the images themselves are the first row.
    """
    known, truth = marked.values >= 0, marked.values == 1
    n_hit, n_answer, n_true = (weights @ each.astype(np.float64) for each in (answer & truth, answer & known, truth))
    f1 = divide(2 * n_hit, n_answer + n_true, n_true > 0)
    return np.where(np.isnan(f1), f1[:1], f1)


def describe(attributes: Attributes, found: Found) -> dict[str, object]:
    """The details of a MATCHScore."""
    marked = attributes.judged.values
    rates = (marked == 1).sum(0) / (marked >= 0).sum(0)
    listed = {
        name: {"latents": [latent for latent in found.coalitions[i].tolist() if latent >= 0],
               "f1": float(found.f1[i, 0])}
        for i, name in enumerate(attributes.names[:N_LISTED])
    }  # fmt: skip
    return {
        "n_attributes": len(attributes.names), "n_images": len(attributes.judged.images),
        "n_choosing": len(attributes.choosing.images), "always": float((2 * rates / (1 + rates)).mean()),
        "shuffled": float(found.shuffled.mean()), "attributes": listed,
    }  # fmt: skip
