"""What is concluded of a comparison, on outcomes and counts that are written down here."""

from collections.abc import Sequence

import numpy as np
import pytest

from analysis.classifier.outcomes import Outcome
from analysis.comparison.verdict import Round, share_with_base_latents
from analysis.interventions.latent_choice import LatentCounts
from analysis.interventions.latent_masks import Condition, add_predicted, make_masks
from analysis.results import Share


def judged(n_right: Sequence[int], seed: int = 0) -> Round:
    """200 images, of which the first are told right by base with its own latents, adapted with base's, with its own."""
    label = np.zeros(200, dtype=np.int64)
    conditions = (("base", "base"), ("adapted", "base"), ("adapted", "adapted"))
    outcomes = {
        Condition(model, chosen_by, "class", 5, 0, True): Outcome(label, (np.arange(200) >= n).astype(int), label * 1.0)
        for (model, chosen_by), n in zip(conditions, n_right, strict=True)
    }
    return Round(seed, np.arange(200, 400), np.arange(200), outcomes)


def test_the_share_is_of_the_gain_that_the_adapted_model_makes_with_its_own_latents() -> None:
    found = share_with_base_latents([judged((40, 90, 140))], 5, 0)
    assert found.share == pytest.approx((90 - 40) / (140 - 40))
    assert found.low < 0.5 < found.high  # type: ignore[operator]
    found = share_with_base_latents([judged((40, 90, 140)), judged((20, 110, 140), seed=1)], 5, 0)
    assert found.share == pytest.approx((50 + 90) / (100 + 120))


def test_without_a_certain_gain_there_is_no_share() -> None:
    assert share_with_base_latents([judged((100, 101, 101))], 5, 0) == Share(None, None, None)


def test_masks_hold_the_most_frequent_latents_of_each_class_and_of_all_images() -> None:
    counts, rng = LatentCounts(np.array([[3, 0, 2, 0], [0, 1, 2, 0]], dtype=np.int32)), np.random.default_rng(0)
    lists = {mask.selection: mask.lists.tolist() for mask in make_masks(counts, [1], 0, rng)}
    assert lists == {"class": [[0], [2]], "dataset": [[2]]}


def test_random_masks_are_other_latents_and_left_out_where_none_are_left() -> None:
    counts, rng = LatentCounts(np.array([[3, 0, 2, 1], [0, 1, 2, 4]], dtype=np.int32)), np.random.default_rng(0)
    masks = make_masks(counts, [1, 3], 2, rng)
    assert [(m.selection, m.k, m.draw) for m in masks] == [
        ("class", 1, 0), ("dataset", 1, 0), ("random", 1, 0), ("random", 1, 1), ("class", 3, 0), ("dataset", 3, 0)
    ]  # fmt: skip
    for mask in masks[2:4]:
        assert (mask.lists >= 0).all()
        assert (mask.lists != masks[0].lists).all()


def test_the_mask_of_the_predicted_class_comes_after_that_of_the_true_class() -> None:
    counts, rng = LatentCounts(np.array([[3, 0, 2, 0], [0, 1, 2, 0]], dtype=np.int32)), np.random.default_rng(0)
    masks = add_predicted(make_masks(counts, [1], 0, rng))
    assert [mask.selection for mask in masks] == ["class", "predicted", "dataset"]
    assert masks[1].lists is masks[0].lists
    (listed,) = add_predicted(make_masks(counts, [2], 0, rng, listed=[3, 1]))
    assert (listed.selection, listed.lists.tolist()) == ("list", [[3, 1]])
