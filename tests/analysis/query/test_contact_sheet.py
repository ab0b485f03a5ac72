"""Contact sheets show the images that were asked for, darkened where the latent is silent."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from actcache import ParentMismatchError, SettingsError
from analysis import draw_sheet, heat_maps, query_class, query_image, query_images, query_latent, threshold_heat_maps
from analysis.pictures import CELL, GAP, LINE, MARGIN
from analysis.query.contact_sheet import Cell, choose_cells
from saetrain import CodeStore


@pytest.fixture(scope="module")
def codes(tiny_codes: Path) -> CodeStore:
    return CodeStore.open(tiny_codes)


def cell_pixels(path: Path, row: int, column: int) -> NDArray[np.float64]:
    top, left = MARGIN + row * (CELL + 2 * LINE + GAP), MARGIN + column * (CELL + GAP)
    return np.asarray(Image.open(path), dtype=float)[top : top + CELL, left : left + CELL]


def test_a_cell_is_the_image_where_the_latent_is_strongest_and_dark_where_it_is_silent(
    tmp_path: Path, codes: CodeStore, tiny_images: Path
) -> None:
    latent = query_class(codes, "class0")["latent"][0].as_py()
    answer = query_latent(codes, latent, n_top=10)
    out = draw_sheet(codes, answer, tmp_path / "x" / "sheet.png", latents=[latent])
    with Image.open(out) as sheet:
        assert sheet.size == (2 * MARGIN + 8 * (CELL + GAP) - GAP, 2 * MARGIN + 2 * (CELL + 2 * LINE + GAP))
    maps = heat_maps(codes, latent, np.asarray(answer["image"]))
    strongest = np.unravel_index(int(maps.argmax()), maps.shape)
    k = int(strongest[0])
    image = Image.open(tiny_images / answer["uri"][k].as_py()).resize((CELL, CELL), Image.Resampling.NEAREST)
    shown, original = cell_pixels(out, k // 8, k % 8), np.asarray(image, dtype=float)
    for row in range(3):
        for column in range(3):
            part = np.s_[
                row * CELL // 3 + 4 : (row + 1) * CELL // 3 - 4, column * CELL // 3 + 4 : (column + 1) * CELL // 3 - 4
            ]
            ratio = shown[part].mean() / original[part].mean()
            share = maps[k, row, column] / maps.max()
            assert ratio == pytest.approx(1 - 215 / 255 * 0.8 * (1 - np.sqrt(share)), abs=0.03)


def test_each_kind_of_answer_has_its_cells(codes: CodeStore) -> None:
    latents = query_class(codes, "class0", n_top=3)
    cells = choose_cells(codes, latents, where="label == 0")
    assert [cell.latent for cell in cells if cell.row == 1] == [latents["latent"][1].as_py()] * 6
    top = query_latent(codes, latents["latent"][1].as_py(), n_top=6, where="label == 0")
    assert [cell.image for cell in cells if cell.row == 1] == top["image"].to_pylist()
    one = query_image(codes, 5, n_top=10)
    assert choose_cells(codes, one, images=[5]) == [
        Cell(i // 8, 5, latent) for i, latent in enumerate(one["latent"].to_pylist())
    ]
    two = query_images(codes, 5, 9, n_top=6)
    cells = choose_cells(codes, two, images=[5, 9])
    assert len(cells) == 2 * two.num_rows
    first = [cell for cell in cells if cell.row == 0]
    assert [(cell.latent, cell.note) for cell in first] == [(row["latent"], row["kind"]) for row in two.to_pylist()[:8]]
    assert {cell.image for cell in cells if cell.row % 2} == {9}


def test_a_latent_mask_is_where_the_upsampled_heat_map_exceeds_the_threshold(codes: CodeStore) -> None:
    latent = query_class(codes, "class0")["latent"][0].as_py()
    images = np.array([4, 0, 31])
    maps = heat_maps(codes, latent, images)
    masks = threshold_heat_maps(codes, latent, images, size=(24, 24), threshold=0.5)
    centers = masks[:, 4::8, 4::8] & masks[:, 3::8, 3::8]  # around a patch's center the map is nearly its value
    assert (centers <= (maps > 0.4)).all()
    assert (masks[:, 4::8, 4::8] >= (maps > 0.75 * maps.max())).all()


@pytest.fixture
def moved(tmp_path: Path, tiny_codes: Path) -> CodeStore:
    """Codes whose images cannot be found."""
    copy = Path(shutil.copytree(tiny_codes, tmp_path / "far" / "away" / "x.codes"))
    (copy / "places.json").unlink()
    return CodeStore.open(copy)


def test_absent_images_are_an_error_and_can_be_given(tmp_path: Path, moved: CodeStore, tiny_images: Path) -> None:
    answer = query_image(moved, 0)
    with pytest.raises(SettingsError, match=r"no longer exists\. Give the new path of the images with --images"):
        draw_sheet(moved, answer, tmp_path / "a.png", images=[0])
    assert not (tmp_path / "a.png").exists()
    assert draw_sheet(moved, answer, tmp_path / "a.png", images=[0], folder=tiny_images).is_file()


def test_another_store_or_other_images_are_refused(
    tmp_path: Path, codes: CodeStore, table_codes: CodeStore, make_images: Callable[..., Path]
) -> None:
    answer = query_image(codes, 0)
    other = table_codes.path.parent / "x.acts"
    with pytest.raises(ParentMismatchError, match="Give the store"):
        draw_sheet(codes, answer, tmp_path / "a.png", images=[0], store=other)
    folder = make_images(tmp_path / "images", 75, seed=9)
    with pytest.raises(ParentMismatchError, match="--images"):
        draw_sheet(codes, answer, tmp_path / "a.png", images=[0], folder=folder)


def test_an_empty_answer_cannot_be_drawn(tmp_path: Path, codes: CodeStore) -> None:
    with pytest.raises(SettingsError, match="The answer is empty"):
        draw_sheet(codes, query_latent(codes, 0).slice(0, 0), tmp_path / "a.png", latents=[0])


def test_images_of_two_stores_come_from_two_folders(
    tmp_path: Path, tiny_run: Path, tiny_store: Path, tiny_model: dict[str, str], make_images: Callable[..., Path]
) -> None:
    from actcache import extract
    from saetrain import encode

    folder = make_images(tmp_path / "more", 16, seed=4)
    extract(folder, tmp_path / "more.acts", **tiny_model, layers=[2], shard_images=16, precision="float32")
    codes = encode(tiny_run, [str(tiny_store), str(tmp_path / "more.acts")], tmp_path / "both.codes")
    out = draw_sheet(codes, query_image(codes, 80, n_top=1), tmp_path / "a.png", images=[80])
    original = np.asarray(Image.open(folder / codes.images["uri"][80].as_py()), dtype=float)
    assert np.corrcoef(cell_pixels(out, 0, 0).mean((0, 1)), original.mean((0, 1)))[0, 1] > 0.95
