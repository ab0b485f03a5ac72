"""Spatial coherence in the atlas: the plain double sum over dense maps, and made once, beside a server."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from explorer import serving
from numpy.typing import NDArray
from small_codes import write_codes

from analysis import ConceptTable, analyze
from analysis.explore import coherence as coherence_module
from analysis.explore.coherence import COHERENCE, FILE, explain_grid, make_coherence, measure_coherence, read_coherence
from analysis.explore.data import Data
from analysis.explore.makers import Maker
from analysis.explore.sources import open_sources

GRID = (5, 8)
SIZES = (30, 40, 20)
N_IMAGES, N_LATENTS = sum(SIZES), 7


@pytest.fixture(scope="module")
def dense() -> NDArray[np.float16]:
    """[I, 1 + P, F] of latents that fire in a block, on random patches, on too few or too many, rarely, or never."""
    rng = np.random.default_rng(0)
    maps = np.zeros((N_IMAGES, *GRID, N_LATENTS))
    for image in range(N_IMAGES):
        row, column = rng.integers(0, 3), rng.integers(0, 5)
        maps[image, row : row + 3, column : column + 3, 0] = 1
        maps[image, :, :, 1] = rng.random(GRID) < 0.3
        maps[image, 0, :4, 2] = 1
        maps[image, :, :, 3] = 1
        maps[image, :, :, 4] = (image % 15 == 0) * (rng.random(GRID) < 0.5)
        maps[image, :, : rng.integers(1, 9), 5] = 1
    maps *= rng.lognormal(0, 0.5, maps.shape)
    cls = rng.random((N_IMAGES, 1, N_LATENTS))
    return np.concatenate([cls, maps.reshape(N_IMAGES, -1, N_LATENTS)], axis=1).astype(np.float16)


@pytest.fixture(scope="module")
def table(dense: NDArray[np.float16], tmp_path_factory: pytest.TempPathFactory) -> ConceptTable:
    folder = tmp_path_factory.mktemp("coherence")
    labels = np.arange(N_IMAGES, dtype=np.int32) % 3
    return analyze(write_codes(folder / "x.codes", dense, SIZES, labels, grid=GRID, failed=[3]), folder / "x.concepts")


def plain_moran(x: NDArray[np.float64]) -> float:
    """Moran's I of a dense map [H, W]: the double loop over patches."""
    places = list(itertools.product(*map(range, x.shape)))
    links = [(p, q) for p in places for q in places if max(abs(p[0] - q[0]), abs(p[1] - q[1])) == 1]
    centered = x - x.mean()
    return float(x.size / len(links) * sum(centered[p] * centered[q] for p, q in links) / np.square(centered).sum())


@pytest.fixture(scope="module")
def morans(dense: NDArray[np.float16]) -> NDArray[np.float64]:
    """[I, F]: Moran's I where 5 patches to 0.9 of all are active, else NaN; image 3 could not be read."""
    maps = dense[:, 1:].astype(np.float64).reshape(N_IMAGES, *GRID, N_LATENTS)
    scores = np.full((N_IMAGES, N_LATENTS), np.nan)
    for image, latent in itertools.product(range(N_IMAGES), range(N_LATENTS)):
        x = maps[image, :, :, latent]
        if 5 <= (x > 0).sum() <= 36 and image != 3:
            scores[image, latent] = plain_moran(x)
    return scores


def mean_above_chance(morans: NDArray[np.float64]) -> NDArray[np.float64]:
    """[F]: with at least ten images."""
    n = np.isfinite(morans).sum(0)
    return np.where(n >= 10, np.nansum(morans, 0) / np.maximum(n, 1) + 1 / 39, np.nan)


def test_it_is_that_of_the_dense_maps(table: ConceptTable, morans: NDArray[np.float64]) -> None:
    sources = open_sources(table)
    assert sources.codes is not None
    values, n_images = measure_coherence(sources.codes)
    expected = mean_above_chance(morans)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    np.testing.assert_array_equal(n_images, np.isfinite(morans).sum(0))
    assert np.isfinite(expected).tolist() == [True, True, False, False, False, True, False]
    assert expected[0] > 0.4 > 0.1 > abs(expected[1])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_latent_with_enough_images_is_left_out_of_further_shards(
    table: ConceptTable, morans: NDArray[np.float64], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    sources = open_sources(table)
    assert sources.codes is not None
    monkeypatch.setattr(coherence_module, "ENOUGH", 25)
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(SIZES))
    starts = np.cumsum([0, *SIZES])
    sample = np.full_like(morans, np.nan)
    for shard in order:
        mine = slice(starts[shard], starts[shard + 1])
        short = np.isfinite(sample).sum(0) < 25
        sample[mine, short] = morans[mine, short]
    values, n_images = measure_coherence(sources.codes, seed=seed)
    np.testing.assert_array_equal(n_images, np.isfinite(sample).sum(0))
    np.testing.assert_allclose(values, mean_above_chance(sample), rtol=1e-5)
    assert n_images[0] < N_IMAGES - 1


def test_a_server_makes_it_and_says_so_until_it_is_there(table: ConceptTable, morans: NDArray[np.float64]) -> None:
    sources = open_sources(table)
    data = Data(sources, live=True)
    assert site(data)["making"] == []
    with serving(sources) as client:
        old = client.ask("data/latents/0.json")
        assert "coherence" not in old.json()[0]["numbers"]
    data.coherence.start()
    try:
        first = site(data)
        assert first["making"] == ["coherence"] or "coherence" in names(first)
        for _ in range(6000):
            if not (now := site(data))["making"]:
                break
            why = {each["name"]: each["why"] for each in now["absent"]}
            assert "coherence" in names(now) or "being made" in why["coherence"]
            time.sleep(0.05)
    finally:
        data.stop()
    assert "coherence" in names(now), data.coherence.state
    assert "coherence" not in {each["name"] for each in now["absent"]}
    columns = np.frombuffer(data.answer("atlas.bin").body, "<f4").reshape(len(names(now)), N_LATENTS)
    np.testing.assert_allclose(columns[names(now).index("coherence")], mean_above_chance(morans), rtol=1e-5)
    for latent, value in enumerate(mean_above_chance(morans).tolist()):
        got = json.loads(data.answer(f"latents/{latent}.json").body)[0]["numbers"]["coherence"]
        assert got is None if np.isnan(value) else got == pytest.approx(value, rel=1e-3)
    with serving(open_sources(table)) as client:  # found again, not made again
        assert "coherence" in names(client.ask("data/site.json").json())
        assert client.ask("data/latents/0.json", If_None_Match=old.headers["etag"]).status == 200
    (table.path / "notes" / FILE).unlink()


def site(data: Data) -> Any:
    return json.loads(data.answer("site.json").body)


def names(facts: Any) -> list[str]:
    return [column["name"] for column in facts["columns"]]


def test_it_is_kept_for_these_codes_only(table: ConceptTable, dense: NDArray[np.float16], tmp_path: Path) -> None:
    other = analyze(write_codes(tmp_path / "y.codes", dense, (90,), grid=GRID, names="y"), tmp_path / "y.concepts")
    made = make_coherence(other, tmp_path / "y.codes")
    np.testing.assert_array_equal(read_coherence(open_sources(other))["coherence"], made["coherence"])
    kept = table.path / "notes" / FILE
    kept.parent.mkdir(exist_ok=True)
    kept.write_bytes((other.path / "notes" / FILE).read_bytes())
    assert read_coherence(open_sources(table)) == {}
    kept.write_bytes(b"broken")
    assert read_coherence(open_sources(table)) == {}
    kept.unlink()


def test_what_cannot_be_measured_says_why(dense: NDArray[np.float16], table: ConceptTable, tmp_path: Path) -> None:
    cls = write_codes(tmp_path / "cls", dense[:, :1].repeat(2, axis=1), (90,), grid=(1, 1), tokens="cls")
    tiny = write_codes(tmp_path / "tiny", dense[:, :6], (90,), grid=(1, 5))
    assert "only CLS" in explain_grid(cls)
    assert "these have 5" in explain_grid(tiny)
    sources = open_sources(analyze(tiny, tmp_path / "tiny.concepts"))
    maker = Maker(sources, COHERENCE)
    maker.make()
    assert maker.columns == {}
    assert "these have 5" in maker.state
    maker.start()
    assert not maker.running
    reasons = {each["name"]: each["why"] for each in site(Data(sources, live=True))["absent"]}
    assert {"top_class", "monosemanticity", "stability", "alignment", "name", "coherence"} <= set(reasons)
    assert "--embeddings clip" in reasons["monosemanticity"]
    shutil.rmtree(tmp_path / "tiny")
    maker = Maker(open_sources(sources.concepts.path), COHERENCE)
    maker.make()
    assert maker.state.startswith("Spatial coherence is measured on the codes. ")


START = """
import sys, time
from explorer import dawdle
from analysis.explore.makers import Maker, Recipe
from analysis.explore.sources import open_sources
if __name__ == "__main__":
    recipe = Recipe("It", lambda sources: {}, lambda sources: "", lambda sources: (), dawdle)
    maker = Maker(open_sources(sys.argv[1]), recipe)
    maker.start()
    print(maker._process.pid, flush=True)
    time.sleep(3600)
"""


def test_what_is_being_made_ends_with_the_server_however_that_ends(table: ConceptTable) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", START, str(table.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as server:
        assert server.stdout is not None
        child = Path("/proc") / server.stdout.readline().strip()
        assert b"dawdle" in (child / "cmdline").read_bytes()
        server.kill()
    for _ in range(6000):
        if not child.exists():
            return
        time.sleep(0.05)
    raise AssertionError("it still runs")
