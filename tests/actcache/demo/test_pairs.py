"""Pairs of scenes: they differ in one attribute, and in no pixel that this attribute does not touch."""

import csv
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from actcache import SettingsError
from actcache.demo import concept_names, read_truth, render_pair, sample_pair, write_demo, write_pairs
from actcache.demo.scenes import object_mask

FAMILIES = ("background", "color", "shape", "size", "texture")


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), index=st.integers(0, 10**6), image_size=st.sampled_from((32, 64, 96)))
def test_two_images_differ_only_where_the_changed_attribute_is(seed: int, index: int, image_size: int) -> None:
    pair, before, after = render_pair(seed, index, image_size)
    family = pair.added.split(":")[0]
    assert family == pair.removed.split(":")[0] == FAMILIES[index % 5]
    assert set(pair.before.carriers()) - set(pair.after.carriers()) == {pair.removed}
    assert set(pair.after.carriers()) - set(pair.before.carriers()) == {pair.added}
    (number,) = pair.before.carriers()[pair.removed]
    assert pair.after.carriers()[pair.added] == [number]
    differs = (before.pixels != after.pixels).any(-1)
    assert differs.any()
    if number == 0:
        touched = before.objects == 0
        assert pair.before.objects == pair.after.objects
        np.testing.assert_array_equal(before.objects, after.objects)
    else:
        old, new = (asdict(scene.objects[number - 1]) for scene in (pair.before, pair.after))
        fields = {name for name in old if old[name] != new[name]}
        assert fields == ({"size", "diameter"} if family == "size" else {family})
        for i, thing in enumerate(pair.before.objects):
            assert i == number - 1 or thing == pair.after.objects[i]
        assert pair.before.background == pair.after.background
        touched = (before.objects == number) | (after.objects == number)
        shown = object_mask(pair.after.objects[number - 1], image_size)
        assert (shown | ~(after.objects == number)).all()
        if family in ("color", "texture"):
            np.testing.assert_array_equal(before.objects, after.objects)
    assert not (differs & ~touched).any()
    np.testing.assert_array_equal(before.objects[~touched], after.objects[~touched])
    diameters = [thing.diameter for thing in pair.after.objects]
    assert diameters == sorted(diameters, reverse=True)


def test_pairs_repeat_and_use_every_concept_in_both_directions() -> None:
    pairs = [sample_pair(0, index) for index in range(1500)]
    assert pairs[7] == sample_pair(0, 7) != sample_pair(1, 7)
    for side in ("removed", "added"):
        assert {getattr(pair, side) for pair in pairs} == set(concept_names())


def test_the_folder_holds_the_images_their_truth_and_the_table(tmp_path: Path) -> None:
    truth = write_pairs(tmp_path / "pairs", n_pairs=15, seed=4)
    assert truth.names == concept_names()
    assert len(truth.uris) == 30
    with open(tmp_path / "pairs" / "pairs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [name for row in rows for name in (row["before"], row["after"])] == list(truth.uris)
    for index, row in enumerate(rows):
        pair, *images = render_pair(4, index)
        assert (row["removed"], row["added"]) == (pair.removed, pair.added)
        concepts = []
        for place, image in zip((2 * index, 2 * index + 1), images, strict=True):
            assert truth.uris[place] == image.uri
            assert image.uri.split("/")[0] == image.scene.label
            np.testing.assert_array_equal(np.array(Image.open(truth.path / "images" / image.uri)), image.pixels)
            for concept, name in enumerate(truth.names):
                numbers = image.scene.carriers().get(name, [])
                np.testing.assert_array_equal(truth.masks([place], concept)[0], np.isin(image.objects, numbers))
            concepts.append({name for name, has in zip(truth.names, truth.present[place], strict=True) if has})
        assert concepts[0] - concepts[1] == {row["removed"]}
        assert concepts[1] - concepts[0] == {row["added"]}


def test_the_same_call_returns_the_same_and_other_folders_are_refused(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", n_pairs=3)
    before = {file: file.read_bytes() for file in (tmp_path / "pairs").rglob("*") if file.is_file()}
    assert write_pairs(tmp_path / "pairs", n_pairs=3).uris == read_truth(tmp_path / "pairs").uris
    assert {file: file.read_bytes() for file in (tmp_path / "pairs").rglob("*") if file.is_file()} == before
    longer = write_pairs(tmp_path / "longer", n_pairs=5)
    assert longer.uris[:6] == read_truth(tmp_path / "pairs").uris
    with pytest.raises(SettingsError, match="'n_pairs': 3"):
        write_pairs(tmp_path / "pairs", n_pairs=4)
    with pytest.raises(SettingsError, match="'n_pairs': 3"):
        write_demo(tmp_path / "pairs", n_images=6)
