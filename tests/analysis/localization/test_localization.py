"""AP, pointing and IoU equal a computation on every pixel; masks are seen as the model sees images."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import average_precision_score
from typer.testing import CliRunner

import cli
from actcache import SettingsError
from actcache.options import JudgingConfig
from actcache.preprocess import Preprocess
from actcache.sources import resize_image, resize_mask
from analysis import heat_maps, localize
from analysis.localization.pixel_masks import read_masks
from analysis.localization.scores import average_precision, choose_threshold, mean_iou, score_latents
from saetrain import CodeStore

USE = JudgingConfig(on_seen="use")
"""The images of table_codes are those that its run was trained on."""


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 4))
def test_average_precision_is_that_of_all_pixels(seed: int, n_latents: int, n_concepts: int) -> None:
    rng = np.random.default_rng(seed)
    n_images, n_patches, n_pixels = 4, 6, 5
    values = rng.choice([0, 0, 0, 0.5, 1, 2], (n_latents, n_images, n_patches)).astype(np.float32)
    truth = rng.random((n_images, n_patches, n_pixels, n_concepts)) < rng.choice([0.0, 0.3, 0.8])
    coverage = truth.mean(2).astype(np.float32)
    latent, image, patch = np.nonzero(values)
    found = average_precision(latent, values[latent, image, patch], coverage[image, patch], coverage, n_latents)
    for f in range(n_latents):
        for c in range(n_concepts):
            pixels = truth[..., c].ravel()
            if not pixels.any():
                assert np.isnan(found[f, c])
                continue
            want = average_precision_score(pixels, np.repeat(values[f].ravel(), n_pixels))
            assert found[f, c] == pytest.approx(want, abs=1e-6)


def test_a_mask_is_cut_as_its_image_is() -> None:
    rng = np.random.default_rng(0)
    blocks = np.kron(rng.integers(0, 5, (6, 9)), np.ones((10, 10))).astype(np.uint8)
    for mode in ("shortest", "squash", "longest"):
        preprocess = Preprocess(size=(30, 30), resize_mode=mode)
        mask = resize_mask(blocks, preprocess)
        picture = np.asarray(resize_image(Image.fromarray(blocks * 50).convert("RGB"), preprocess), dtype=float)[..., 0]
        assert mask.shape == (30, 30)
        assert set(np.unique(mask)) <= set(np.unique(blocks)) | {0}
        assert (abs(mask * 50.0 - picture) < 30).mean() > 0.75  # all but pixels at the edges of blocks


def test_masks_of_the_image_table_are_found_and_numbers_are_concepts(table_codes: CodeStore) -> None:
    masks = read_masks(table_codes)
    given = np.array([bool(name) for name in table_codes.images["mask"].to_pylist()])
    assert masks.images.tolist() == np.flatnonzero(given & table_codes.valid).tolist()
    assert masks.names == ("1", "2", "3")  # 0 is background
    assert masks.numbers.shape[1:] == (24, 24)
    pixels = masks.pixels(np.array([0]), 1)[0]
    assert pixels[12:, :12].all()
    assert pixels.sum() == 144
    coverage = masks.coverage((3, 3))[0].reshape(3, 3, 3)
    np.testing.assert_allclose(coverage[..., 0], [[0, 0.5, 1], [0, 0.25, 0.5], [0, 0, 0]])
    assert masks.centers((3, 3))[0].reshape(3, 3, 3)[1, 1].tolist() == [False, False, True]  # pixel (12, 12)


def test_scores_equal_a_computation_on_pixels(
    table_codes: CodeStore, dense_values: Callable[[CodeStore], NDArray[np.float64]]
) -> None:
    masks, dense = read_masks(table_codes), dense_values(table_codes)
    found = score_latents(table_codes, masks)
    assert found.ap.shape == found.pointing.shape == (64, 3)
    for latent in range(0, 64, 7):
        heat = dense[masks.images, 1:, latent].reshape(-1, 3, 3)
        pixels = np.kron(heat, np.ones((8, 8)))
        peak = heat.reshape(len(heat), -1).argmax(1)
        row, column = np.divmod(peak, 3)
        for concept in range(3):
            truth = masks.pixels(np.arange(len(masks.images)), concept)
            want = average_precision_score(truth.ravel(), pixels.ravel())
            assert found.ap[latent, concept] == pytest.approx(want, abs=1e-6)
            hit = truth[np.arange(len(heat)), row * 8 + 4, column * 8 + 4] & (heat.max((1, 2)) > 0)
            assert found.pointing[latent, concept] == pytest.approx(hit.mean())
    some = score_latents(table_codes, masks, latents=[5, 21])
    np.testing.assert_array_equal(some.ap, found.ap[[5, 21]])


def test_a_latent_whose_own_map_is_the_truth_is_found_and_perfect(tmp_path: Path, table_codes: CodeStore) -> None:
    planted = int(np.argmax(score_latents(table_codes, read_masks(table_codes)).pointing.sum(1)))
    images = np.flatnonzero(table_codes.valid)
    fires = np.kron(heat_maps(table_codes, planted, images) > 0, np.ones((8, 8))).astype(np.uint8)
    folder = tmp_path / "masks"
    for uri, mask in zip(table_codes.images["uri"].take(images).to_pylist(), fires * 7, strict=True):
        (folder / uri).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save((folder / uri).with_suffix(".png"))
    moved = _move_alone(table_codes, tmp_path / "far" / "away" / "x.codes")
    (tmp_path / "legend.csv").write_text("number,name\n7,planted\n9,never\n")
    (found,) = localize(moved, masks=folder, legend=tmp_path / "legend.csv", judging=USE).concepts
    assert (found.concept, found.latent) == ("planted", planted)
    assert found.ap == pytest.approx(1)
    assert found.chosen_ap == pytest.approx(1)
    assert found.pointing == pytest.approx(1)
    assert 0.4 < found.iou <= 1  # bilinear edges
    assert found.chance < found.ap
    legend = tmp_path / "legend.csv"
    other = localize(moved, masks=folder, legend=legend, latent=(planted + 1) % 64, judging=USE).concepts
    assert other[0].latent == (planted + 1) % 64
    assert other[0].ap < 1


def test_iou_is_the_mean_over_images(table_codes: CodeStore) -> None:
    masks = read_masks(table_codes)
    latent = int(np.argmax(np.diff(table_codes.read_shard(0).latent_indptr)))
    which = np.arange(10)
    truth = masks.pixels(which, 2)
    threshold = choose_threshold(table_codes, latent, masks.images[which], truth)
    best = mean_iou(table_codes, latent, masks.images[which], truth, threshold)
    maximum = heat_maps(table_codes, latent, masks.images[which]).max()
    for cut in (0.02, 0.1, 0.3, 0.6):
        assert mean_iou(table_codes, latent, masks.images[which], truth, cut * maximum) <= best


def legend_file(folder: Path, table: dict[str, Any]) -> Path:
    pq.write_table(pa.table(table), folder / "legend.parquet")
    return folder / "legend.parquet"


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"a": [1]}, ["not a legend", "number and name"]),
        ({"number": [1, 1], "name": ["x", "y"]}, ["twice"]),
        ({"number": [300], "name": ["x"]}, ["0..255"]),
        ({"uri": ["z"], "sky": [[1]]}, ["no row for"]),
    ],
)
def test_a_legend_that_says_nothing_is_refused(
    tmp_path: Path, table_codes: CodeStore, table: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(SettingsError) as caught:
        localize(table_codes, legend=legend_file(tmp_path, table))
    for word in words:
        assert word in str(caught.value)


def _move_alone(codes: CodeStore, to: Path) -> CodeStore:
    """A copy that finds nothing of what it was made from, as on another machine."""
    copy = Path(shutil.copytree(codes.path, to))
    (copy / "places.json").unlink()
    return CodeStore.open(copy)


def test_wrong_questions_are_told_what_is_missing(tmp_path: Path, table_codes: CodeStore, tiny_codes: Path) -> None:
    with pytest.raises(SettingsError, match=r"0\.\.63"):
        localize(table_codes, latent=64)
    with pytest.raises(SettingsError, match="--masks"):
        localize(CodeStore.open(tiny_codes))
    with pytest.raises(SettingsError, match="none of the"):
        localize(table_codes, where="weight > 7")
    (tmp_path / "legend.txt").touch()
    with pytest.raises(SettingsError, match="--legend must be"):
        localize(table_codes, legend=tmp_path / "legend.txt")
    moved = _move_alone(table_codes, tmp_path / "far" / "away" / "x.codes")
    with pytest.raises(SettingsError, match="--masks, --images or --store"):
        localize(moved)
    with pytest.raises(SettingsError, match="both halves"):
        localize(table_codes, legend=legend_file(tmp_path, {"number": [9], "name": ["never"]}), judging=USE)


def test_the_demo_is_localized_by_a_command(tmp_path: Path) -> None:
    """Scenes, their own masks by default, and the truth table as the legend."""
    from actcache import extract
    from actcache.demo import MODEL, PRETRAINED, write_demo
    from saetrain import SAEConfig, TrainConfig, encode, train

    truth = write_demo(tmp_path / "scenes", n_images=96)
    store = extract(truth.path / "images", tmp_path / "a.acts", model=MODEL, pretrained=PRETRAINED, layers=[3],
                    masks=truth.path / "objects", precision="float32")  # fmt: skip
    config = TrainConfig(n_steps=60, batch_size=512, lr=3e-3, dead_tokens=20_000)
    run = train(store, tmp_path / "run", sae=SAEConfig(n_latents=64, k=4), config=config)
    encode(run, store, tmp_path / "a.codes")
    done = CliRunner().invoke(
        cli.app,
        ["--json", "-q", "localize", str(tmp_path / "a.codes"), "--legend", str(truth.path / "truth.parquet"),
         "--out", str(tmp_path / "a.csv")],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["rows"]
    assert {row["concept"] for row in rows} <= set(truth.names)
    assert len((tmp_path / "a.csv").read_text().splitlines()) == len(rows) + 1 > 15
    gain = np.mean([row["ap"] - row["chance"] for row in rows])
    assert gain > 0.15, rows
    masks = read_masks(CodeStore.open(tmp_path / "a.codes"), legend=truth.path / "truth.parquet")
    order = [truth.uris.index(uri) for uri in store.images["uri"].to_pylist()]
    concept = truth.names.index(rows[0]["concept"])
    which = np.array([0, 5, 50])
    np.testing.assert_array_equal(
        masks.pixels(which, masks.names.index(rows[0]["concept"])), truth.masks([order[i] for i in which], concept)
    )


def test_codes_of_several_stores_are_localized_with_the_masks_of_each(
    tmp_path: Path, table_codes: CodeStore, make_images: Callable[..., Path], tiny_model: dict[str, str], tiny_run: Path
) -> None:
    """The second store has masks elsewhere, left and right instead of quarters, and lends a name of the first."""
    from actcache import extract
    from saetrain import encode

    more = make_images(tmp_path / "more", 30, seed=5)
    masks = tmp_path / "halves"
    for file in more.rglob("*.png"):
        (masks / file.parent.name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.kron([[0, 7]], np.ones((24, 12))).astype(np.uint8)).save(masks / file.relative_to(more))
    options: dict[str, Any] = {"layers": [2], "shard_images": 16, "precision": "float32"}
    extract(more, tmp_path / "more.acts", **tiny_model, **options, masks=masks)
    first = table_codes.artifact.parent_path("store")
    both = encode(tiny_run, [first, tmp_path / "more.acts"], tmp_path / "both.codes")
    found, alone = read_masks(both), read_masks(table_codes)
    assert found.names == ("1", "2", "3", "7")
    n = len(alone.images)
    np.testing.assert_array_equal(found.images[:n], alone.images)
    np.testing.assert_array_equal(found.numbers[:n], alone.numbers)
    np.testing.assert_array_equal(found.images[n:], 76 + np.arange(30))
    np.testing.assert_array_equal(
        found.pixels(np.arange(n, n + 30), 3), np.arange(24)[None, None] >= np.full((30, 24, 1), 12)
    )
    rows = {row.concept: row for row in localize(both, judging=USE).concepts}
    assert rows["7"].n_images == 15  # of each store one half is judged
    assert rows["7"].chance == pytest.approx(0.5 * 15 / (15 + n - n // 2))
    kept = _copy(tmp_path, more, tiny_model, options)
    again = encode(tiny_run, [tmp_path / "more.acts", kept], tmp_path / "again.codes")
    with pytest.raises(SettingsError, match="--where"):  # two images of one name, one place to look
        read_masks(again, masks=masks)
    assert len(read_masks(again, masks=masks, where="store == 1").images) == 12


def _copy(folder: Path, images: Path, model: dict[str, str], options: dict[str, Any]) -> Path:
    """Some of the images again, under the same names."""
    from actcache import extract

    kept = Path(shutil.copytree(images, folder / "kept"))
    for file in sorted(kept.rglob("*.png"))[12:]:
        file.unlink()
    extract(kept, folder / "kept.acts", **model, **options)  # type: ignore[arg-type]
    return folder / "kept.acts"
