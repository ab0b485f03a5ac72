"""Every record equals what is computed plainly from the dense codes, also at the corners and edges of the grid."""

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from actcache import SettingsError
from analysis.explore import latents as latents_module
from analysis.explore.atlas import COLUMNS
from analysis.explore.data import Data
from analysis.explore.latents import GROUPS, N_STRONGEST, choose_groups, describe_latent, read_fired
from analysis.explore.sources import open_sources


@pytest.fixture(scope="module")
def dense(sources: Any) -> NDArray[np.float64]:
    """[I, T, F] from the entries by row."""
    codes = sources.codes
    out = np.zeros((codes.n_images, codes.n_tokens, codes.n_latents))
    for shard in range(codes.n_shards):
        part = codes.read_shard(shard)
        row = np.repeat(np.arange(len(part.indptr) - 1), np.diff(part.indptr)) + part.first_row
        out.reshape(-1, codes.n_latents)[row, part.latent] = part.value
    return out


def near(got: Any, expected: Any) -> None:
    """Equal up to four significant digits."""
    np.testing.assert_allclose(np.array(got, dtype=float), np.array(expected, dtype=float), rtol=6e-4, atol=1e-12)


def read(data: Data, path: str) -> Any:
    return json.loads(data.answer(path).body)


def check_shot(shot: dict[str, Any], dense: NDArray[np.float64], latent: int) -> None:
    values = dense[shot["image"], :, latent]
    patches = np.flatnonzero(values[1:])
    assert shot["at"] == patches.tolist()
    near(shot["heat"], values[1:][patches])
    near(shot["cls"], values[0])
    near(shot["peak"], values.max())


@pytest.mark.parametrize("latent", [19, 18, 3, 40, 63])
def test_the_images_of_a_latent_are_those_of_the_dense_codes(
    sources: Any, dense: NDArray[np.float64], latent: int
) -> None:
    record = read(Data(sources), f"latents/{latent}.json")[0]
    score = dense[:, :, latent].mean(1)
    order = np.lexsort((np.arange(len(score)), -score))
    order = order[score[order] > 0]
    rank = {int(image): place for place, image in enumerate(order)}
    shares = {title: (low, high) for title, low, high in GROUPS}
    seen: set[int] = set()
    for group in record["groups"]:
        images = [shot["image"] for shot in group["shots"]]
        assert not seen & set(images)
        seen |= set(images)
        if group["title"] == "Strongest":
            assert images == order[:N_STRONGEST].tolist()
        else:
            low, high = shares[group["title"]]
            places = [rank[image] for image in images]
            assert places == sorted(places)
            assert min(places) >= max(round(low * len(order)), N_STRONGEST)
            assert max(places) < round(high * len(order))
        for shot in group["shots"]:
            check_shot(shot, dense, latent)
            near(shot["score"], score[shot["image"]])
    for group in record["counter"] or []:
        for shot in group["shots"]:
            check_shot(shot, dense, latent)
            assert group["kind"].startswith("silent") == (not shot["at"] and not shot["cls"])
    for patch in record["patches"]:
        token = 1 + patch["row"] * sources.concepts.grid[1] + patch["column"]
        near(patch["value"], dense[patch["image"], token, latent])
    rows = [*record["groups"], *(record["counter"] or [])]
    shown = {shot["image"] for group in rows for shot in group["shots"]} | {each["image"] for each in record["patches"]}
    table = sources.concepts.images
    assert record["images"] == {
        str(image): [table["uri"][image].as_py(), table["label_name"][image].as_py()] for image in shown
    }


def test_the_numbers_of_a_latent_are_those_of_the_table_and_of_the_codes(
    sources: Any, dense: NDArray[np.float64]
) -> None:
    latent = 19
    record, table = describe_latent(sources, latent), sources.concepts.table
    fires = dense[:, :, latent] > 0
    assert record["numbers"]["n_tokens"] == fires.sum()
    near(record["numbers"]["density"], fires.mean())
    near(record["numbers"]["max_activation"], dense[:, :, latent].max())
    assert set(record["numbers"]) == set(table.column_names) - {"latent"}
    assert sum(record["histogram"]["counts"]) == fires.sum()
    values = dense[:, :, latent][fires]
    np.testing.assert_array_equal(record["histogram"]["counts"], np.histogram(values, record["histogram"]["edges"])[0])
    assert record["position"] == fires[:, 1:].sum(0).tolist()
    near(record["kinds"]["cls"]["density"], fires[:, 0].mean())
    near(record["kinds"]["patch"]["max"], dense[:, 1:, latent].max())
    above = (dense[:, :, latent] > sources.concepts.config.tau).sum(1)
    labels = np.array(sources.concepts.images["label_name"].to_pylist())
    for row in record["classes"]:
        mine = above[labels == row["name"]]
        assert (row["n_tokens"], row["n_images"]) == (mine.sum(), (mine > 0).sum())
        near(row["share"], mine.sum() / above.sum())
    both = (fires[..., None] & (dense > 0)).sum((0, 1))
    for row in record["cofiring"]:
        assert row["n_tokens"] == both[row["latent"]]
        either = fires.sum() + (dense[:, :, row["latent"]] > 0).sum() - both[row["latent"]]
        near(row["jaccard"], both[row["latent"]] / either)
        near(row["share"], both[row["latent"]] / fires.sum())
    assert record["nearest"][0][0] == sources.concepts.nearest(latent)[0][0]


@pytest.mark.parametrize("image", [0, 17, 47])
def test_an_image_has_the_codes_of_each_token(sources: Any, dense: NDArray[np.float64], image: int) -> None:
    record = read(Data(sources), f"images/{image}.json")[0]
    assert (record["n_tokens"], record["tokens"]) == (dense.shape[1], 0)
    for token in range(dense.shape[1]):  # CLS, the four corners, the edges
        part = slice(record["indptr"][token], record["indptr"][token + 1])
        assert record["latent"][part] == np.flatnonzero(dense[image, token]).tolist()
        near(record["value"][part], dense[image, token][dense[image, token] > 0])
    near(record["maxima"], dense.max((0, 1))[sorted(set(record["latent"]))])


def test_the_atlas_holds_the_columns_that_site_json_names(sources: Any, dense: NDArray[np.float64]) -> None:
    data = Data(sources)
    site, values = read(data, "site.json"), np.frombuffer(data.answer("atlas.bin").body, "<f4")
    columns = dict(zip((c["name"] for c in site["columns"]), values.reshape(-1, sources.n_latents), strict=True))
    assert list(columns) == [column.name for column in COLUMNS if column.name in columns]
    np.testing.assert_allclose(columns["density"], (dense > 0).mean((0, 1)), rtol=1e-6)
    for name in ("mean_activation", "label_entropy"):
        np.testing.assert_allclose(columns[name], sources.concepts.table[name].to_numpy(), rtol=1e-6)
    labels = np.array(sources.concepts.images["label_name"].to_pylist())
    top = sources.concepts.top_images
    counts = np.zeros((len(site["classes"]), sources.n_latents))
    for latent, image in zip(top["latent"].to_pylist(), top["image"].to_pylist(), strict=True):
        counts[site["classes"].index(labels[image]), latent] += 1
    expected = np.where(counts.any(0), counts.argmax(0), -1)
    np.testing.assert_array_equal(columns["top_class"], expected)
    assert (site["n_images"], site["grid"], site["block"]) == (48, [3, 3], {"latents": 1, "images": 1, "pictures": 1})
    assert all(site["missing"].get(part) for part, there in site["has"].items() if not there)


def test_blocks_hold_the_same_records_as_single_files(sources: Any) -> None:
    single = Data(sources)
    blocks = Data(sources, block={"latents": 7, "images": 5, "pictures": 4})
    for name, n, size in (("latents", 64, 7), ("images", 48, 5)):
        joined = [record for i in range(math.ceil(n / size)) for record in read(blocks, f"{name}/{i}.json")]
        assert joined == [read(single, f"{name}/{i}.json")[0] for i in range(n)]
        with pytest.raises(SettingsError, match="no block"):
            blocks.answer(f"{name}/{math.ceil(n / size)}.json")
    pack = blocks.answer("pictures/11.bin").body
    n, *lengths = np.frombuffer(pack[:20], "<u4").tolist()
    assert (n, sum(lengths) + 20) == (4, len(pack))
    assert pack[20 : 20 + lengths[0]] == single.answer("pictures/44.bin").body[8:]
    assert pack[20:22] == b"\xff\xd8"


def test_a_server_packs_the_pictures_that_are_asked_for_together(sources: Any) -> None:
    live = Data(sources, live=True)
    images = [44, 3, 7]
    body = live.answer(f"pictures/{','.join(map(str, images))}.bin").body
    n, *lengths = np.frombuffer(body[:16], "<u4").tolist()
    assert (n, sum(lengths) + 16) == (3, len(body))
    for image, length, start in zip(images, lengths, np.cumsum([16, *lengths]).tolist(), strict=False):
        assert body[start : start + length] == live.answer(f"pictures/{image}.bin").body[8:]
    for wrong in ("3,", ",3", "3,-1", "3,x", "3,48", "3,1e1", "1,\uff11", ",".join("1" * 65), "9" * 12 + ",1"):
        with pytest.raises(SettingsError):
            live.answer(f"pictures/{wrong}.bin")
    with pytest.raises(SettingsError, match="There is no"):
        Data(sources).answer("pictures/3,7.bin")  # a folder of files has blocks


def test_a_latent_with_many_entries_is_read_from_some_shards(sources: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    latent, codes = 19, sources.codes
    n = int(sources.n_fired[latent])
    monkeypatch.setattr(latents_module, "MAX_ENTRIES", n // 2)
    before = codes.bytes_read
    fired = read_fired(codes, latent, n, "mean")
    whole = codes.read_latent(latent)[0]
    assert codes.bytes_read > before
    assert 0 < len(fired.rows) < n
    assert set(fired.rows) < set(whole)
    assert fired.images.sum() < codes.n_images
    assert "drawn at random" in fired.note
    record = describe_latent(sources, latent)
    top = sources.concepts.rows_of("top_images", latent)["image"].to_pylist()
    assert [shot["image"] for shot in record["groups"][0]["shots"]] == top[:N_STRONGEST]
    monkeypatch.undo()
    monkeypatch.setattr(latents_module, "MAX_COFIRING", 70)
    rough = {row["latent"]: row["jaccard"] for row in describe_latent(sources, latent)["cofiring"]}
    monkeypatch.undo()
    exact = {row["latent"]: row["jaccard"] for row in describe_latent(sources, latent)["cofiring"]}
    assert rough != exact
    for other in set(rough) & set(exact):
        assert abs(rough[other] - exact[other]) < 0.25


def test_groups_cover_all_images_of_a_latent_once(sources: Any) -> None:
    fired = read_fired(sources.codes, 19, int(sources.n_fired[19]), "mean")
    groups = choose_groups(fired, seed=3)
    assert groups == choose_groups(fired, seed=3)
    images = [image for _, of in groups for image in of]
    assert len(set(images)) == len(images)
    assert set(images) <= set(fired.pairs.image.tolist())


def test_without_codes_the_table_alone_is_shown(golden: Path, tmp_path: Path) -> None:
    table = Path(shutil.copytree(golden / "a.concepts", tmp_path / "a.concepts"))
    sources = open_sources(table)
    data = Data(sources)
    site = read(data, "site.json")
    assert sources.codes is None
    assert not site["has"]["images"]
    assert "--codes" in site["missing"]["images"]
    latent = sources.concepts.gallery["latent"][0].as_py()
    record = read(data, f"latents/{latent}.json")[0]
    assert record["cofiring"] is None
    assert record["counter"] is None
    top = sources.concepts.rows_of("top_images", latent)["image"].to_pylist()
    assert [shot["image"] for shot in record["groups"][0]["shots"]] == top[:N_STRONGEST]
    kept = sources.concepts.gallery.to_pylist()
    heats = {line["image"]: line["heat"] for line in kept if line["latent"] == latent}
    assert heats
    for shot in record["groups"][0]["shots"]:
        if shot["image"] in heats:
            heat = np.zeros(9)
            heat[shot["at"]] = shot["heat"]
            near(heat, heats[shot["image"]])
    with pytest.raises(SettingsError):
        data.answer("images/0.json")
    for latent in range(sources.n_latents):
        assert read(data, f"latents/{latent}.json")[0]["latent"] == latent


def test_a_table_of_an_older_version_says_what_it_lacks(golden: Path, tmp_path: Path) -> None:
    """Without the files that came later: sealed again without histograms, positions, neighbors and kinds."""
    from actcache.artifacts import digest

    table = Path(shutil.copytree(golden / "a.concepts", tmp_path / "a.concepts"))
    gone = ["histogram.npy", "histogram_edges.npy", "position_map.npy", "nearest.npy", "nearest_cosine.npy"]
    for name in gone:
        (table / name).unlink()
    manifest = json.loads((table / "manifest.json").read_text())
    manifest.pop("digest", None)
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if name not in gone}
    (table / "manifest.json").write_text(json.dumps({**manifest, "digest": digest(manifest)}))
    data = Data(open_sources(table))
    record, site = read(data, "latents/19.json")[0], read(data, "site.json")
    assert (record["histogram"], record["position"], record["nearest"]) == (None, None, [])
    assert {"histogram", "position", "nearest"} <= set(site["missing"])
    assert "nearest_cosine" not in {column["name"] for column in site["columns"]}


def test_hostile_texts_are_data(golden: Path, tmp_path: Path) -> None:
    """A label with a script, and a mark that turns the direction of writing, pass as text, the latter visible."""
    folder = Path(shutil.copytree(golden, tmp_path / "pipeline"))
    sources = open_sources(folder / "a.concepts")
    images = sources.concepts.images
    hostile = "</script><img src=x onerror=alert(1)>\u202e\x1b[2J"
    column = images.column_names.index("label_name")
    changed = images.set_column(column, "label_name", [[hostile] * len(images)])
    sources.concepts.__dict__["images"] = changed
    body = Data(sources).answer("images.json").body
    assert body.isascii()
    assert json.loads(body)["label"][0] == "</script><img src=x onerror=alert(1)>\\u202e\\x1b[2J"


def test_every_number_of_a_parquet_column_is_strict_json(sources: Any) -> None:
    for latent in range(sources.n_latents):
        body = Data(sources).answer(f"latents/{latent}.json").body
        assert b"NaN" not in body
        assert b"Infinity" not in body
    assert pq.ParquetFile(sources.concepts.path / "concepts.parquet").metadata.num_rows == sources.n_latents


@pytest.mark.parametrize("path", ["latents/64.json", "latents/-1.json", "latents/1e3.json", "latents/\uff11.json",
                                  "latents/0.bin", "pictures/48.bin", "../site.json", "", "latents", "x/0.json",
                                  "latents/99999999999999999999.json"])  # fmt: skip
def test_what_is_not_there_is_refused(sources: Any, path: str) -> None:
    with pytest.raises(SettingsError, match="There is no"):
        Data(sources).answer(path)


def test_comparison_and_results(golden: Path) -> None:
    sources = open_sources(golden / "a.concepts", compare=golden / "compare.json", results=[golden / "rules.json"])
    data = Data(sources)
    record = read(data, "comparison.json")
    counts = {n: (a, b) for n, a, b in zip(*sources.comparison[0].overlap.scatter, strict=True)}
    assert record["latents"]
    weights = []
    for row in record["latents"]:
        base, adapted = counts.get(row["latent"], (0, 0))
        assert (row["base_tokens"], row["adapted_tokens"]) == (base, adapted)
        near(row["change"], (adapted - base) / max(adapted + base, 1))
        weights.append(abs(row["change"]) * (base + adapted))
    assert all(a >= b - 1e-2 for a, b in pairwise(weights))
    adapted = open_sources(golden / "adapted.concepts")
    shots = record["latents"][0]["adapted"]
    assert shots == describe_latent(adapted, record["latents"][0]["latent"])["groups"][0]["shots"][: len(shots)]
    page = data.answer("results.html")
    assert page.kind.startswith("text/html")
    assert b"Rules" in page.body
    assert b"What maple changed" in page.body
