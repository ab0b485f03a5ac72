"""Every corner patch is where it belongs, and no token is counted that the model does not have.

Codes are made by `encode` from stores of any prefix whose values name their places (any_prefix.py), with the identity
as SAE: latent `token` fires on that token of every image, with the value image + 1.
"""

from typing import NamedTuple

import numpy as np
import pytest
from any_prefix import write_one_hot
from typer.testing import CliRunner

import cli
from actcache import open_stores
from analysis import ConceptTable, analyze
from analysis.heat_maps import heat_maps, threshold_heat_maps
from analysis.interventions.latent_choice import count_in_codes
from analysis.localization.pixel_masks import PixelMasks
from analysis.localization.recovery import patch_scores
from analysis.localization.scores import mean_iou, score_latents
from analysis.query.cofiring import sample_rows
from analysis.query.entries import read_entries
from analysis.query.images import query_image
from analysis.query.latents import query_latent, query_patches
from analysis.reduce import tokens_per_image
from saetrain import CodeStore, encode

PREFIXES = ([], ["cls"], ["reg"], ["cls", "dist"], ["cls", "reg", "reg", "reg", "reg"])
GRID, N_IMAGES, FAILED, PATCH = (3, 5), 40, 9, 4
N_PATCHES = GRID[0] * GRID[1]
CORNERS = {(0, 0): 1, (0, 4): 5, (2, 0): 11, (2, 4): 15}
"""(row, column) -> number of the token, and of the latent that fires there."""


class Made(NamedTuple):
    prefix: list[str]
    codes: CodeStore
    concepts: ConceptTable

    @property
    def has_cls(self) -> bool:
        return "cls" in self.prefix


@pytest.fixture(scope="module", params=PREFIXES, ids=str)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    from place_run import write_place_run

    folder = tmp_path_factory.mktemp("corners")
    write_one_hot(folder / "x.acts", request.param, n_images=N_IMAGES, grid=GRID, failed={FAILED: "broken"})
    run = write_place_run(folder / "run", folder / "x.acts")
    codes = encode(run, folder / "x.acts", folder / "x.codes")
    return Made(request.param, codes, analyze(codes, folder / "x.concepts"))


def test_heat_maps_are_lit_at_one_patch(made: Made) -> None:
    images = np.array([0, 5, 39])
    for (row, column), latent in CORNERS.items():
        wanted = np.zeros((3, *GRID), np.float32)
        wanted[:, row, column] = images + 1
        np.testing.assert_array_equal(heat_maps(made.codes, latent, images), wanted)
        pixels = threshold_heat_maps(made.codes, latent, images, size=(3 * PATCH, 5 * PATCH), threshold=0.6)
        assert pixels[:, PATCH * row + PATCH // 2, PATCH * column + PATCH // 2].all()
        assert not pixels[:, (3 * PATCH - 1) - PATCH * row - PATCH // 2, PATCH * column + PATCH // 2].any() or row == 1


def test_queries_name_the_patch(made: Made) -> None:
    for (row, column), latent in CORNERS.items():
        for answer in (query_latent(made.codes, latent, n_top=50), query_patches(made.codes, latent, n_top=50)):
            assert answer["image"].to_pylist() == [i for i in range(N_IMAGES - 1, -1, -1) if i != FAILED]
            assert set(zip(answer["row"].to_pylist(), answer["column"].to_pylist(), strict=True)) == {(row, column)}
            assert set(answer["at"].to_pylist()) == {f"{row},{column}"}
        at = query_image(made.codes, 5, at=(row, column))
        assert (at["latent"].to_pylist(), at["peak"].to_pylist()) == ([latent], [6.0])
    whole = query_image(made.codes, 5, n_top=100)
    assert sorted(whole["latent"].to_pylist()) == list(range(0 if made.has_cls else 1, 1 + N_PATCHES))
    assert set(whole["score"].to_pylist()) == {6.0 / (N_PATCHES + made.has_cls)}  # the mean over tokens that exist


def test_cls_is_named_where_there_is_one_and_silent_elsewhere(made: Made) -> None:
    answer = query_latent(made.codes, 0, n_top=3)
    assert answer["at"].to_pylist() == (["CLS"] * 3 if made.has_cls else [])
    assert query_patches(made.codes, 0).num_rows == 0


def test_statistics_count_the_tokens_that_exist(made: Made) -> None:
    n_read, n_valid = N_PATCHES + made.has_cls, N_IMAGES - 1
    assert tokens_per_image(made.codes) == n_read
    assert made.concepts.summary_numbers()["n_tokens"] == n_valid * n_read
    table = made.concepts.table
    values = np.array([i + 1 for i in range(N_IMAGES) if i != FAILED], dtype=np.float64)
    for latent in (0, *range(1, 1 + N_PATCHES)):
        row = {name: table[name][latent].as_py() for name in table.column_names}
        n = n_valid if latent or made.has_cls else 0
        assert (row["n_tokens"], row["n_images"]) == (n, n)
        assert row["density"] == pytest.approx(n / (n_valid * n_read))
        assert row["cls_density"] == (1.0 if made.has_cls and latent == 0 else 0.0)
        assert row["patch_density"] == pytest.approx(n / (n_valid * N_PATCHES) if latent else 0.0)
        assert row["mean_activation"] == pytest.approx(values.mean() if n else 0.0)
        assert row["image_activation"] == pytest.approx(values.mean() / n_read if n else 0.0)
    assert not np.asarray(table["n_tokens"])[1 + N_PATCHES :].any()  # registers are in no codes
    for (row_number, column), latent in CORNERS.items():
        wanted = np.zeros(GRID, int)
        wanted[row_number, column] = n_valid
        np.testing.assert_array_equal(made.concepts.position_map[latent], wanted)
    top = made.concepts.top_patches.to_pylist()
    assert {(row["latent"] - 1) for row in top} == {row["row"] * GRID[1] + row["column"] for row in top}
    assert all(row["latent"] - 1 == row["row"] * GRID[1] + row["column"] for row in top)


def test_localization_scores_a_corner_as_perfect(made: Made) -> None:
    images = np.array([0, 5, 20])
    numbers = np.zeros((3, GRID[0] * PATCH, GRID[1] * PATCH), np.uint8)
    carriers = np.zeros((1, 256, 4), bool)
    for concept, (row, column) in enumerate(CORNERS):
        numbers[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] = concept + 1
        carriers[0, concept + 1, concept] = True
    masks = PixelMasks(tuple("abcd"), images, numbers, carriers)
    scores = score_latents(made.codes, masks, latents=list(CORNERS.values()))
    np.testing.assert_array_equal(scores.ap.argmax(0), range(4))
    np.testing.assert_allclose(np.diag(scores.ap), 1)
    np.testing.assert_array_equal(scores.pointing, np.eye(4))
    for concept, latent in enumerate(CORNERS.values()):
        assert mean_iou(made.codes, latent, images, masks.pixels(np.arange(3), concept), 0.45) > 0.5
    wanted = np.zeros((made.codes.n_latents, N_IMAGES), np.float32)
    wanted[1 : 1 + N_PATCHES] = np.arange(1, N_IMAGES + 1)
    wanted[:, FAILED] = 0
    np.testing.assert_array_equal(patch_scores(made.codes), wanted)


def test_samples_and_entries_hold_the_numbers_of_tokens_that_exist(made: Made) -> None:
    rows = sample_rows(made.codes, 10**6, 0)
    numbers = set(range(0 if made.has_cls else 1, 1 + N_PATCHES))
    assert len(rows) == (N_IMAGES - 1) * len(numbers)
    assert set((rows % made.codes.n_tokens).tolist()) == numbers
    entries = read_entries(made.codes, 0)
    assert entries["token"].to_pylist() == entries["latent"].to_pylist()
    labels = np.zeros(N_IMAGES, np.int64)
    for tokens, cls in (("all", made.has_cls), ("patch", False)):
        counts = count_in_codes(made.codes, labels, 1, tokens=tokens, tau=0).by_class[0]
        assert counts[: 1 + N_PATCHES].tolist() == [N_IMAGES - 1 if cls else 0, *[N_IMAGES - 1] * N_PATCHES]


def test_the_terminal_and_the_report_count_the_same(made: Made) -> None:
    store = made.codes.path.parent / "x.acts"
    page = made.codes.path.parent / "page.html"
    done = CliRunner().invoke(cli.app, ["--json", "report", str(made.concepts.path), str(page)])
    assert done.exit_code == 0, done.output
    assert f"{(N_IMAGES - 1) * (N_PATCHES + made.has_cls):,}" in page.read_text()
    told = CliRunner().invoke(cli.app, ["info", str(store)])
    assert told.exit_code == 0, told.output
    if made.prefix != ["cls"]:
        assert f"prefix{' ' * 2}" in told.output
        assert (", ".join(made.prefix) or "none") in told.output
    assert open_stores(store).n_read_tokens("all") == N_PATCHES + made.has_cls


def test_inspection_samples_tokens_that_exist(made: Made) -> None:
    from analysis.dictionary.inspection import sample_tokens
    from saetrain import Run

    folder = made.codes.path.parent
    run = Run.open(folder / "run")
    images = np.delete(np.arange(N_IMAGES), FAILED)
    rows = sample_tokens(run, open_stores(folder / "x.acts"), 10**6, 0, images)
    assert set(rows.argmax(1).tolist()) == set(range(0 if made.has_cls else 1, 1 + N_PATCHES))
    assert len(rows) == len(images) * (N_PATCHES + made.has_cls)
