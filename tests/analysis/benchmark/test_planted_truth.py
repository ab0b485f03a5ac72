"""The measures where the truth is known: the concepts themselves, a trained SAE, an untrained one, and shuffled truth.

The world is that of docs/recipes/planted_truth.py, smaller. The margins that are asserted here stand in
docs/results/benchmark-demo.md.
"""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest

from analysis.results import Benchmark

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[3] / "docs" / "recipes"
PLANTED, TRAINED, UNTRAINED = "planted", "trained0", "untrained trained0"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("planted_truth", RECIPES / "planted_truth.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Results(NamedTuple):
    """Of the same runs and activations, told the truth, and told that of other images."""

    true: Benchmark
    shuffled: Benchmark


@pytest.fixture(scope="module")
def world(recipe: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return recipe.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def results(recipe: ModuleType, world: Any, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results(*recipe.measure(world, tmp_path_factory.mktemp("results")))


def value_of(result: Benchmark, subject: str, measure: str) -> float:
    found = result.find(subject, measure)
    assert found is not None, (subject, measure)
    assert found.value is not None, (subject, measure)
    return found.value


def test_the_planted_dictionary_is_the_truth(recipe: ModuleType, world: Any) -> None:
    """Its codes are the shares of the patches, but for noise, and exactly the concepts that are there fire."""
    from actcache.demo import read_truth

    truth = read_truth(world.train.path.parent / "scenes")
    position = {uri: i for i, uri in enumerate(truth.uris)}
    assert set(world.train.images["label_name"].to_pylist()) == {
        "circle",
        "cross",
        "ring",
        "square",
        "star",
        "triangle",
    }
    atoms = recipe.atoms(len(truth.names))
    inverse = np.linalg.pinv(atoms)
    x = world.train.read(recipe.LAYER, images=np.arange(20))
    for image, uri in enumerate(world.train.images["uri"].to_pylist()[:20]):
        share = recipe.cover(truth, position[uri])
        code = x[image].astype(np.float64) @ inverse
        there = share >= recipe.LEAST_SHARE
        assert ((code > recipe.THRESHOLD) == there).mean() > 0.999
        assert abs(code[there] / share[there] - 1).mean() < 0.2


# ---------------------------------------------------------------------------------------------------------------------
# Trained above untrained

MARGINS = {
    "fvu": 0.5, "cosine": 0.3, "probe ratio": 0.4,
    "k-sparse accuracy": 0.12, "k-sparse k=4": 0.2, "k-sparse k=16": 0.12, "k-sparse above random": 0.2,
    "patch mAP": 0.35, "patch probe R": 0.3, "patch coverage@0.3": 0.2, "pixel mAP": 0.3, "pointing": 0.2,
    "MATCHScore": 0.15, "TAPAScore": 0.2, "spatial coherence": 0.08,
    "stability cosine": 0.25, "stability share > 0.7": 0.3, "stability above random": 0.25, "stability jaccard": 0.2,
    "transfer fvu": 0.5, "transfer k-sparse accuracy": 0.1,
}  # fmt: skip
"""By how much a trained SAE is better than an untrained one, at least."""


@pytest.mark.parametrize("measure", MARGINS)
def test_a_trained_sae_is_better_than_an_untrained_one(results: Results, measure: str) -> None:
    trained = results.true.find(TRAINED, measure)
    assert trained is not None
    sign = 1 if trained.higher_is_better else -1
    difference = value_of(results.true, TRAINED, measure) - value_of(results.true, UNTRAINED, measure)
    assert sign * difference > MARGINS[measure]
    for each in results.true.differences:
        if (each.first, each.second, each.measure) == (TRAINED, UNTRAINED, measure):
            assert each.verdict == "better"


def test_purity_cannot_tell_a_trained_sae_from_an_untrained_one(results: Results) -> None:
    """A finding: the 16 strongest patches of nearly any direction share a concept, so this says nothing by itself."""
    for subject in (PLANTED, TRAINED, UNTRAINED):
        assert value_of(results.true, subject, "patch purity@16") > 0.9


def test_monosemanticity_hardly_tells_the_truth_from_anything(results: Results) -> None:
    """A finding, as in the literature: the concepts themselves are less than 0.05 above an untrained SAE."""
    of = {subject: value_of(results.true, subject, "monosemanticity") for subject in (PLANTED, TRAINED, UNTRAINED)}
    assert max(of.values()) - min(of.values()) < 0.05
    assert min(of.values()) > 0.08  # and all are far above images at random, at 0


# ---------------------------------------------------------------------------------------------------------------------
# The truth near the ceiling

CEILINGS = {
    "fvu": (0.0, 0.03), "cosine": (1.0, 0.02), "probe ratio": (1.0, 0.03), "k-sparse k=16": (1.0, 0.02),
    "patch mAP": (1.0, 0.03), "patch probe R": (1.0, 0.08), "patch coverage@0.3": (1.0, 0.0),
    "patch purity@16": (1.0, 0.02), "pointing": (1.0, 0.03), "MATCHScore": (1.0, 0.02),
    "TAPAScore": (2.0, 0.1), "transfer fvu": (0.0, 0.03),
}  # fmt: skip
"""The best possible value, and how near the planted dictionary comes."""


@pytest.mark.parametrize("measure", CEILINGS)
def test_the_concepts_themselves_are_near_the_ceiling(results: Results, measure: str) -> None:
    best, near = CEILINGS[measure]
    assert value_of(results.true, PLANTED, measure) == pytest.approx(best, abs=near)


def test_a_few_concepts_tell_as_many_classes(results: Results) -> None:
    """Four latents are four of six shapes, and images of the two others are taken for one of them."""
    assert value_of(results.true, PLANTED, "k-sparse k=4") == pytest.approx(5 / 6, abs=0.08)
    assert value_of(results.true, PLANTED, "k-sparse k=1") == pytest.approx(2 / 6, abs=0.06)


# ---------------------------------------------------------------------------------------------------------------------
# Shuffled truth at chance

CHANCE = {
    "k-sparse accuracy": (1 / 6, 0.07), "k-sparse above random": (0.0, 0.05), "patch mAP": (0.06, 0.03),
    "patch probe R": (0.0, 0.04), "patch coverage@0.3": (0.0, 0.05), "pixel mAP": (0.06, 0.03), "TAPAScore": (0.0, 0.2),
}  # fmt: skip
"""What a measure is worth when its labels belong to other images, and how far from it it may lie: the share of a class
among the images, and of a concept among the patches."""


@pytest.mark.parametrize("subject", [PLANTED, TRAINED, UNTRAINED])
@pytest.mark.parametrize("measure", CHANCE)
def test_with_the_truth_of_other_images_a_measure_is_at_chance(results: Results, subject: str, measure: str) -> None:
    chance, near = CHANCE[measure]
    assert value_of(results.shuffled, subject, measure) == pytest.approx(chance, abs=near)
    if measure == "patch mAP":
        found = results.shuffled.find(subject, measure)
        assert found is not None
        assert found.details["chance"] == pytest.approx(chance, abs=0.01)


@pytest.mark.parametrize("subject", [PLANTED, TRAINED, UNTRAINED])
def test_with_the_attributes_of_other_images_a_match_is_no_better_than_always_yes(
    results: Results, subject: str
) -> None:
    found = results.shuffled.find(subject, "MATCHScore")
    assert found is not None
    assert found.value is not None
    always = found.details["always"]
    assert isinstance(always, float)
    assert found.value < always < 0.4


def test_measures_without_labels_do_not_change_when_labels_are_shuffled(results: Results) -> None:
    for measure in ("fvu", "l0", "cosine", "dead", "dense", "spatial coherence", "transfer fvu"):
        for subject in (PLANTED, TRAINED, UNTRAINED):
            assert value_of(results.true, subject, measure) == value_of(results.shuffled, subject, measure)


def test_the_probe_ratio_hides_that_the_probe_is_at_chance(results: Results) -> None:
    """A finding: of two accuracies at chance the ratio is about 1, so it is read beside the accuracies."""
    for subject in (PLANTED, TRAINED, UNTRAINED):
        found = results.shuffled.find(subject, "probe ratio")
        assert found is not None
        assert found.value is not None
        assert found.value > 0.6
        for what in ("accuracy_original", "accuracy_reconstructed"):
            assert found.details[what] == pytest.approx(1 / 6, abs=0.1)
