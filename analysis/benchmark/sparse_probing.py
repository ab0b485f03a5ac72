"""Measure 3, k-sparse probing: how well the label of an image can be told from the scores of k latents.

    k-sparse accuracy          the mean over log k, by the trapezoid rule, for k = 1, 4, 16, 64, 256
    k-sparse k=4               of one k
    k-sparse above random      the mean over log k, minus that of random latents that fire on as many images

Latents are ranked by F over the classes and probes fitted on the choosing images, as `probe` does. Where fewer latents
fire than k, all of them stand for k, so the mean covers the same range for every subject. Raw activations, PCA and the
untrained SAE are subjects of their own.
"""

import importlib.util

import numpy as np
from numpy.typing import NDArray

from actcache import SettingsError
from actcache.progress import Progress
from analysis.benchmark.measured import Measured, Skipped
from analysis.benchmark.subject import Judged, Subject
from analysis.probing import Scores, Task, make_split, measure_curve, read_target

NAME = "k-sparse accuracy"
ABOVE = "k-sparse above random"
GRID = (1, 4, 16, 64, 256)
COLUMN = "label_name"
N_LISTED = 16


def measure_sparse_probing(
    subject: Subject, judged: Judged, on_progress: Progress | None = None
) -> list[Measured | Skipped]:
    """Probe the labels of the judged images.

    Args:
        on_progress: called with (tasks done, tasks in all) of each pass over the codes, and then of the probes.
    """
    if importlib.util.find_spec("sklearn") is None:
        return [Skipped(NAME, "it needs the package scikit-learn: pip install 'patchsae[quality]'")]
    try:
        target = read_target(judged.store.images, COLUMN, "class")
        split = make_split(target, judged.choosing, judged.images, judged.seed)
        curve = measure_curve(
            subject.codes, Task.of(split, judged.seed), GRID, score="max", n_random=1, n_shuffled=0, seed=judged.seed,
            on_progress=on_progress,
        )  # fmt: skip
    except SettingsError as error:
        return [Skipped(NAME, str(error))]
    places = np.searchsorted(judged.images, split.judged)

    def resample(values: NDArray[np.float64]) -> NDArray[np.float64]:
        means, replicates = judged.resamples.means(values, places)
        return np.concatenate([means[None], replicates])

    largest = max(k for _, k in curve.outcomes)
    chosen = {("chosen", k): curve.outcomes["chosen", min(k, largest)] for k in GRID}
    scores = Scores(chosen, None, resample)
    assert split.names is not None
    facts = {
        "n_judged": len(split.judged), "n_choosing": len(split.choosing), "n_classes": len(split.names),
        "n_classes_left_out": split.n_classes_left_out, "n_firing": int((curve.ranked.n_images > 0).sum()),
    }  # fmt: skip
    mean = scores.mean("chosen")
    assert mean is not None
    scored = {str(k): float(scores.of(("chosen", k))[0]) for k in GRID}
    found: list[Measured | Skipped] = [_measured(NAME, mean, {**facts, "scores": scored})]
    for k in (k for k in GRID if k <= largest):
        details: dict[str, object] = {"latents": curve.latents[:k].tolist()} if k <= N_LISTED else {}
        found.append(_measured(f"k-sparse k={k}", scores.of(("chosen", k)), details))
    shared = [k for name, k in curve.outcomes if name == "random"]
    if not shared:
        return [*found, Skipped(ABOVE, "too few latents fire to draw random ones beside the chosen")]
    both = Scores({c: curve.outcomes[c] for k in shared for c in (("chosen", k), ("random", k))}, None, resample)
    difference = both.mean("chosen"), both.mean("random")
    assert difference[0] is not None
    assert difference[1] is not None
    return [*found, _measured(ABOVE, difference[0] - difference[1], {"k": shared, "random": float(difference[1][0])})]


def _measured(name: str, values: NDArray[np.float64], details: dict[str, object]) -> Measured:
    return Measured(name, float(values[0]), values[1:], True, details)
