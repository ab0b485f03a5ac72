"""`publish --site`: the files are what the server answers, on any web host and under a sub-path."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from explorer import Client
from typer.testing import CliRunner

import cli
from actcache import SettingsError
from analysis.explore import site as site_module
from analysis.explore.data import Data
from analysis.explore.maps import read_map
from analysis.explore.site import choose_block, write_site
from analysis.explore.sources import open_sources

pytestmark = pytest.mark.usefixtures("page")


@pytest.fixture
def table(golden: Path, tmp_path: Path) -> Path:
    """A copy of everything, because a map is kept in the table."""
    return Path(shutil.copytree(golden, tmp_path / "pipeline")) / "a.concepts"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_site_holds_what_the_server_answers(table: Path, tmp_path: Path) -> None:
    plans = []
    made = write_site(
        table, tmp_path / "site", compare=table.parent / "compare.json", results=[table.parent / "rules.json"],
        on_plan=plans.append,
    )  # fmt: skip
    files = files_of(tmp_path / "site")
    assert (made.n_files, made.n_bytes) == (len(files), sum(map(len, files.values())))
    assert (plans[0].n_bytes, plans[0].written, made.written) == (made.n_bytes, False, True)
    assert all(len(data) <= 512_000 for name, data in files.items() if name != "data/results.html")
    sources = open_sources(table, compare=table.parent / "compare.json", results=[table.parent / "rules.json"])
    live, facts = Data(sources, live=True), json.loads(files["data/site.json"])
    assert "coherence" in {color["name"] for color in facts["columns"]}
    assert [facts["live"], *(facts["has"][part] for part in ("map", "edit", "notes"))] == [False, True, False, False]
    assert "patchsae explore" in facts["missing"]["upload"]
    for name in ("atlas.bin", "names.json", "images.json", "comparison.json"):
        assert files[f"data/{name}"] == live.answer(name).body
    for name, n in (("latents", 64), ("images", 48)):
        for number in range(n):
            block, place = divmod(number, facts["block"][name])
            record = json.loads(files[f"data/{name}/{block}.json"])[place]
            assert record == json.loads(live.answer(f"{name}/{number}.json").body)[0]
    block = facts["block"]["pictures"]
    for number in range(48):
        pack = files[f"data/pictures/{number // block}.bin"]
        n = int.from_bytes(pack[:4], "little")
        lengths = np.frombuffer(pack[4 : 4 + 4 * n], "<u4")
        start = 4 + 4 * n + int(lengths[: number % block].sum())
        assert pack[start : start + int(lengths[number % block])] == live.answer(f"pictures/{number}.bin").body[8:]


def test_the_same_command_again_changes_nothing_and_another_one_asks(table: Path, tmp_path: Path) -> None:
    from analysis.naming import set_name

    target = tmp_path / "site"
    write_site(table, target, results=[table.parent / "intervene-set.json"])
    before = {name: (target / name).stat().st_mtime_ns for name in files_of(target)}
    assert not write_site(table, target, results=[table.parent / "intervene-set.json"]).written
    assert {name: (target / name).stat().st_mtime_ns for name in files_of(target)} == before
    set_name(open_sources(table).concepts, 3, name="dots")
    with pytest.raises(SettingsError, match="differs in"):
        write_site(table, target)
    assert write_site(table, target, overwrite=True).written
    assert "data/results.html" not in files_of(target)
    assert not [name for name in tmp_path.iterdir() if name.name.startswith(".")]


@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_else_is_ever_replaced(table: Path, tmp_path: Path, overwrite: bool) -> None:
    other = tmp_path / "mine"
    (other / "data").mkdir(parents=True)
    (other / "data" / "site.json").write_text("{}")
    (other / "thesis.txt").write_text("three years")
    with pytest.raises(SettingsError, match="something else"):
        write_site(table, other, overwrite=overwrite)
    assert (other / "thesis.txt").read_text() == "three years"
    with pytest.raises(SettingsError, match="inside the artifact"):
        write_site(table, table / "site", overwrite=overwrite)
    with pytest.raises(SettingsError, match="something else"):
        write_site(table, tmp_path / "pipeline" / "words.txt", overwrite=overwrite)


def test_a_dry_run_writes_nothing(table: Path, tmp_path: Path) -> None:
    plan = write_site(table, tmp_path / "site", dry_run=True)
    assert plan.n_bytes > 0
    assert not plan.written
    assert not (tmp_path / "site").exists()


def test_a_large_table_is_cut_and_says_so(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_module, "MAX_LATENTS", 10)
    monkeypatch.setattr(site_module, "MAX_IMAGES", 30)
    made = write_site(table, tmp_path / "site")
    files = files_of(tmp_path / "site")
    facts = json.loads(files["data/site.json"])
    assert made.n_latents == (10, 64)
    assert made.n_images == (30, 48)
    assert "10 of 64 latents" in facts["missing"]["left_out"]
    records = [r for i in range(64) if i % facts["block"]["latents"] == 0
               for r in json.loads(files[f"data/latents/{i // facts['block']['latents']}.json"])]  # fmt: skip
    kept = [record["latent"] for record in records if record is not None]
    assert len(kept) == 10
    gallery = set(open_sources(table).concepts.gallery["latent"].to_pylist())
    assert gallery <= set(kept) or set(kept) <= gallery
    images = [r for i in range(48) if i % facts["block"]["images"] == 0
              for r in json.loads(files[f"data/images/{i // facts['block']['images']}.json"])]  # fmt: skip
    assert sum(record is not None for record in images) == 30
    assert len(np.frombuffer(files["data/atlas.bin"], "<f4")) == 64 * len(facts["columns"])


def test_blocks_fit_their_limit() -> None:
    assert choose_block([10] * 1000, 1000) == 64
    assert choose_block([10] * 999 + [990], 1000) == 1
    assert choose_block([], 100) == 256


def test_a_site_works_under_a_sub_path_of_pythons_own_server(table: Path, tmp_path: Path) -> None:
    write_site(table, tmp_path / "www" / "deep" / "site")
    command = [
        sys.executable,
        "-u",
        "-m",
        "http.server",
        "0",
        "--bind",
        "127.0.0.1",
        "--directory",
        str(tmp_path / "www"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline().split("port ")[1].split()[0])
            client = Client(f"http://127.0.0.1:{port}/deep/site/")
            assert client.ask("").body.startswith(b"<!doctype html>")
            for name, data in files_of(tmp_path / "www" / "deep" / "site").items():
                assert client.ask(name).body == data
        finally:
            process.terminate()


def test_the_verb(table: Path, tmp_path: Path) -> None:
    def ask(*words: str) -> Any:
        return CliRunner().invoke(cli.app, ["--json", "publish", *words])

    done = ask(str(table), "--site", str(tmp_path / "site"), "--run", str(table.parent / "run"))
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["written"] is True
    for wrong in (
        [str(table)], [str(table), str(tmp_path / "x"), "--site", str(tmp_path / "y")],
        [str(table), "--site", str(tmp_path / "y"), "--license", "mit"],
        [str(table), str(tmp_path / "x"), "--result", str(table.parent / "rules.json")],
    ):  # fmt: skip
        assert ask(*wrong).exit_code == 2, wrong
    assert ask(str(table.parent / "run"), "--site", str(tmp_path / "z")).exit_code == 1


def test_the_map_keeps_neighbors_and_is_made_once(table: Path) -> None:
    from analysis.concepts import unit_decoder
    from analysis.explore.makers import Maker
    from analysis.explore.maps import MAP, embed_directions_in_2d

    sources = open_sources(table)
    assert read_map(sources) == {}
    maker = Maker(sources, MAP)
    maker.make()
    kept = read_map(sources)
    for name, values in kept.items():
        np.testing.assert_array_equal(values, maker.columns[name])
        np.testing.assert_array_equal(np.isfinite(values), sources.n_fired > 0)
    assert sources.run is not None
    again = embed_directions_in_2d(unit_decoder(sources.run), sources.n_fired > 0)
    np.testing.assert_array_equal(again[:, 0], kept["map_x"])
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(4), 20)
    directions = np.eye(4, 16)[groups] + 0.1 * rng.standard_normal((80, 16))
    directions = (directions / np.linalg.norm(directions, axis=1)[:, None]).astype(np.float32)
    place = embed_directions_in_2d(directions, np.ones(80, dtype=bool))
    distance = np.linalg.norm(place[:, None] - place[None], axis=2) + np.eye(80) * 1e9
    assert (groups[distance.argmin(1)] == groups).mean() > 0.95


def test_a_map_of_another_run_is_not_shown(table: Path) -> None:
    from analysis.explore.maps import make_map
    from saetrain import Run

    sources = open_sources(table)
    make_map(sources.concepts, Run.open(table.parent / "runs" / "variantrelu"))
    assert read_map(sources) == {}
    (table / "notes" / "map.parquet").write_bytes(b"broken")
    assert read_map(sources) == {}
