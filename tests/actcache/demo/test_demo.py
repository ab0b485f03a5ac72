"""The demo: scenes follow from their seed, the ground truth is right for every pixel, and the shipped CLIP loads."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from actcache import SettingsError
from actcache.demo import MODEL, PRETRAINED, concept_names, read_truth, render_scene, sample_scene, write_demo
from actcache.demo.scenes import COLORS, caption_scene


def test_a_scene_repeats_and_does_not_depend_on_others() -> None:
    first = render_scene(3, 17)
    again = render_scene(3, 17)
    assert first[0] == again[0] == sample_scene(3, 17)
    np.testing.assert_array_equal(first[1], again[1])
    assert render_scene(3, 18)[0] != first[0]
    assert render_scene(4, 17)[0] != first[0]


def test_the_object_map_agrees_with_the_pixels() -> None:
    """A solid object's pixels are its color, within lighting and noise; no object is hidden by its neighbors."""
    checked = 0
    for index in range(60):
        scene, pixels, objects = render_scene(0, index)
        for number, thing in enumerate(scene.objects, start=1):
            mine = objects == number
            assert mine.sum() > 20
            if thing.texture == "solid":
                mean = pixels[mine].mean(0)
                assert abs(mean - np.array(COLORS[thing.color])).max() < 40
                checked += 1
            y, x = np.nonzero(mine)
            assert abs(x.mean() / 64 - thing.x) < 0.1
            assert abs(y.mean() / 64 - thing.y) < 0.1
    assert checked > 10


def test_captions_name_what_is_there() -> None:
    scene = sample_scene(0, 5)
    caption = caption_scene(scene)
    for thing in scene.objects:
        assert f"{thing.size} {thing.texture} {thing.color} {thing.shape}" in caption
    assert caption.endswith(scene.background)


def test_files_and_truth_round_trip(tmp_path: Path) -> None:
    truth = write_demo(tmp_path / "demo", n_images=12, seed=5)
    longer = write_demo(tmp_path / "longer", n_images=15, seed=5)
    assert truth.uris == longer.uris[:12]
    assert truth.names == concept_names()
    for index, uri in enumerate(truth.uris):
        scene, pixels, objects = render_scene(5, index)
        np.testing.assert_array_equal(np.array(Image.open(tmp_path / "demo" / "images" / uri)), pixels)
        assert uri.split("/")[0] == scene.label
        for concept, name in enumerate(truth.names):
            numbers = scene.carriers().get(name, [])
            assert truth.present[index, concept] == bool(numbers)
            np.testing.assert_array_equal(truth.masks([index], concept)[0], np.isin(objects, numbers))
    assert read_truth(tmp_path / "demo").carriers == truth.carriers


def test_the_same_call_returns_the_same_and_others_are_refused(tmp_path: Path) -> None:
    write_demo(tmp_path / "demo", n_images=3)
    before = {file: file.read_bytes() for file in (tmp_path / "demo").rglob("*") if file.is_file()}
    write_demo(tmp_path / "demo", n_images=3)
    write_demo(tmp_path / "other", n_images=3)
    assert {file: file.read_bytes() for file in (tmp_path / "demo").rglob("*") if file.is_file()} == before
    for file, data in before.items():
        assert (tmp_path / "other" / file.relative_to(tmp_path / "demo")).read_bytes() == data
    with pytest.raises(SettingsError, match="'n_images': 3"):
        write_demo(tmp_path / "demo", n_images=4)


def test_the_model_is_small_and_knows_its_words() -> None:
    """Zero-shot on unseen single objects: far above chance for every family, so the weights are the trained ones."""
    import open_clip

    from actcache.demo.training import zero_shot

    assert Path(MODEL).stat().st_size + Path(PRETRAINED).stat().st_size <= 8_000_000
    import json

    clip = open_clip.CLIP(**json.loads(Path(MODEL).read_text()))
    open_clip.load_checkpoint(clip, PRETRAINED, strict=True, weights_only=True)
    accuracy = zero_shot(clip.eval(), open_clip.SimpleTokenizer(context_length=48), 300)
    assert accuracy["color"] > 0.9
    assert accuracy["background"] > 0.9
    assert accuracy["texture"] > 0.9
    assert accuracy["shape"] > 0.6
    assert accuracy["size"] > 0.9
    assert min(accuracy[f"patch_{family}"] for family in ("background", "color", "shape", "size", "texture")) > 0.8
