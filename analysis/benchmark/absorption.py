"""Absorption, held out: how much better four latents tell a class from its siblings than the best one does.

    absorption gap   F1 of a class against its siblings on the 4 best latents minus F1 on the best; mean over classes

As visaebench's `absorption_rate` (visaebench/absorption.py), with its groups, ranking and probe, but latents are ranked
and probes fitted on the choosing images, and F1 is taken on the judged ones. A large gap says that what distinguishes
a class is spread over latents; it does not show which latent fails to fire, which SAEBench's absorption is about.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actcache import SettingsError
from analysis.benchmark.measured import Measured, Skipped
from analysis.benchmark.resamples import divide
from analysis.benchmark.subject import Judged, Subject
from analysis.benchmark.visaebench.absorption import NARROW, WIDE, choose_tests, make_taker
from analysis.benchmark.visaebench.hierarchy import number_groups, read_hierarchy
from analysis.benchmark.visaebench.images import ProtocolImages
from analysis.benchmark.visaebench.pairs import read_pairs, sum_pairs
from analysis.benchmark.visaebench.probes import fit_probe

NAME = "absorption gap"
LARGEST_GAP = 0.1


def measure_absorption(
    subject: Subject, judged: Judged, hierarchy: str | Path | None, on_progress: Callable[[int, int], None]
) -> list[Measured | Skipped]:
    """The gap, from groups of sibling classes.

    Args:
        hierarchy: a file that `read_hierarchy` reads.
        on_progress: called with (tests done, in all).
    """
    if hierarchy is None:
        return [Skipped(NAME, "give groups of sibling classes with --hierarchy")]
    if importlib.util.find_spec("sklearn") is None:
        return [Skipped(NAME, "it needs the package scikit-learn: pip install 'patchsae[quality]'")]
    images, codes = ProtocolImages.of(judged.store), subject.codes
    if images.labels is None or codes.tokens == "cls":
        return [Skipped(NAME, "it needs labels and codes of patches")]
    try:
        groups = number_groups(read_hierarchy(hierarchy), images.names)
    except SettingsError as error:
        return [Skipped(NAME, str(error))]
    numbers, index = images.classes
    fitted, tested = np.isin(images.images, judged.choosing), np.isin(images.images, judged.images)
    totals = sum_pairs(codes, images, np.where(fitted, index, -1), len(numbers))
    tests = choose_tests(totals, images, groups)
    if not tests:
        few = "no group of --hierarchy has three classes, ten choosing images, and three of a class and of its siblings"
        return [Skipped(NAME, few)]
    read_pairs(codes, images, [make_taker(tests, images)])
    drawn = judged.resamples.weights(0, len(judged.images)).astype(np.float32)  # whole numbers far below 2^24
    drawn = np.concatenate([np.ones((1, len(judged.images)), np.float32), drawn])
    gaps: list[NDArray[np.float64]] = []
    for done, test in enumerate(tests, start=1):
        of_group = test.siblings.places
        fit, held = fitted[of_group], tested[of_group]
        weights = drawn[:, np.searchsorted(judged.images, images.images[of_group[held]])]
        y = test.y[held]
        f1 = []
        for k in (NARROW, WIDE):
            x = test.siblings.columns(test.ranked[:k])
            said = fit_probe(x[fit], test.y[fit], 500).predict(x[held])
            both, either = (weights @ each.astype(np.float32) for each in (said & y, said + y))
            f1.append(divide(2 * both.astype(np.float64), either.astype(np.float64), either > 0))
        gap = f1[1] - f1[0]
        if np.isfinite(gap[0]):  # the class, or the answer that it is there, occurs among judged images
            gaps.append(gap)
        on_progress(done, len(tests))
    if not gaps:
        return [Skipped(NAME, "no class of a group of --hierarchy has judged images")]
    stacked = np.stack(gaps)
    mean = np.array([np.nanmean(column) if np.isfinite(column).any() else np.nan for column in stacked.T])
    facts = {"n_tests": len(gaps), "n_tests_left_out": len(tests) - len(gaps), "n_groups": len(groups),
             "share_above_0.1": float((stacked[:, 0] > LARGEST_GAP).mean())}  # fmt: skip
    return [Measured(NAME, float(mean[0]), mean[1:], False, facts)]
