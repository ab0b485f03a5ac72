"""docs/reference/format.md is true: every artifact is read with json, numpy, zarr, pyarrow, safetensors and it alone.

Nothing of actcache or saetrain reads here; the fixtures wrote what is read.
"""

import hashlib
import json
import os
import re
import struct
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from safetensors.numpy import load_file

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "format.md"
ABSENT = 2**64 - 1
HOOK = "blocks.2.hook_resid_post"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def canonical_hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def held_out(n_images: int) -> range:
    n = min(n_images - 1, max(1, round(0.05 * n_images)))  # halves to even
    return range(n_images - n, n_images)


@pytest.fixture(params=["tiny_store", "tiny_run", "tiny_codes"])
def artifact(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture(scope="module")
def long_shards(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path, tiny_model: dict[str, str]) -> Path:
    """75 images in shards of three blocks: one full, one of two blocks, the second of them short."""
    from actcache import extract

    path = tmp_path_factory.mktemp("long") / "long.acts"
    extract(tiny_images, path, **tiny_model, layers=[2], shard_images=48, precision="float32")
    return path


def test_the_page_is_of_the_schema_that_is_written(artifact: Path) -> None:
    assert f"schema {read(artifact / 'artifact.json')['schema']}" in PAGE.read_text().splitlines()[0]


def test_the_identity_is_the_hash_the_page_says(artifact: Path) -> None:
    value = read(artifact / "artifact.json")
    assert set(value) == {"kind", "schema", "id", "settings", "parents", "provenance"}
    parents = {name: parent["id"] for name, parent in value["parents"].items()}
    fields = {key: value[key] for key in ("kind", "schema", "settings")} | {"parents": parents}
    assert value["id"] == canonical_hash(fields)
    for parent in value["parents"].values():
        assert not os.path.isabs(parent["path"])


def test_the_manifest_and_the_records_name_every_file_once_and_their_digests_hold(artifact: Path) -> None:
    manifest = read(artifact / "manifest.json")
    body = {key: value for key, value in manifest.items() if key != "digest"}
    assert manifest["digest"] == canonical_hash(body)
    named = list(manifest["files"].items())
    for record in sorted((artifact / "commits").glob("*.json")):
        value = read(record)
        assert record.name == f"{value['shard']:06d}.json"
        assert f"commits/{record.name}" in manifest["files"]
        named += value["files"].items()
    names = [name for name, _ in named]
    there = {str(file.relative_to(artifact)) for file in artifact.rglob("*") if file.is_file()}
    assert sorted(names) == sorted(there - {"manifest.json", "places.json"})
    for name, digest in named:
        data, position = (artifact / name).read_bytes(), 0
        assert digest["bytes"] == len(data)
        for n_bytes, checksum in digest["pieces"]:
            assert google_crc32c.value(data[position : position + n_bytes]) == checksum
            position += n_bytes
        assert position == len(data)


def test_every_setting_is_on_the_page(artifact: Path) -> None:
    page = PAGE.read_text()
    value = read(artifact / "artifact.json")
    section = {"acts": "## x.acts/", "run": "## A run", "codes": "## x.codes/"}[value["kind"]]
    text = re.split(r"^## ", page.split(section)[1], flags=re.MULTILINE)[0]
    assert [name for name in value["settings"] if f"`{name}`" not in text] == []
    assert [name for name in value["parents"] if f"`{name}`" not in text] == []


# ---------------------------------------------------------------------------------------------------------------------
# x.acts/


def test_the_image_table_has_the_pages_columns(tiny_store: Path) -> None:
    table = pq.read_table(tiny_store / "images.parquet")
    assert [(field.name, str(field.type)) for field in table.schema] == [
        ("source_index", "int64"), ("uri", "string"), ("label", "int32"), ("label_name", "string"), ("bytes", "int64"),
    ]  # fmt: skip
    settings = read(tiny_store / "artifact.json")["settings"]
    order = np.random.Generator(np.random.Philox(settings["seed"])).permutation(75)[: settings["limit"]]
    assert table["source_index"].to_pylist() == order.tolist()
    listing = sorted(zip(*(table[column].to_pylist() for column in ("uri", "bytes")), strict=True))
    fields = {"images": [list(row) for row in listing], "seed": settings["seed"], "limit": settings["limit"]}
    assert settings["rows_id"] == canonical_hash(fields)
    assert read(tiny_store / "artifact.json")["parents"]["images"]["id"] == settings["rows_id"]
    classes = sorted(set(table["label_name"].to_pylist()))
    assert [classes[label] for label in table["label"].to_pylist()] == table["label_name"].to_pylist()


def test_the_zarr_group_is_as_the_page_says(tiny_store: Path) -> None:
    value = read(tiny_store / "artifact.json")
    s = value["settings"]
    group: Any = zarr.open_group(tiny_store / "activations.zarr", mode="r")
    assert group.attrs["actcache"] == {**s, "store_id": value["id"], "complete": True}
    assert sorted(group.group_keys()) == sorted(s["hook_points"])
    rows, columns = s["grid"]
    for hook in s["hook_points"]:
        patches, cls = group[f"{hook}/patches"], group[f"{hook}/cls"]
        assert patches.shape == (s["n_images"], rows * columns, s["d_model"])
        assert patches.chunks == (s["chunk_images"], columns, s["d_model"])
        assert patches.shards == (s["shard_images"], rows * columns, s["d_model"])
        assert patches.metadata.dimension_names == ("image", "patch", "channel")
        assert dict(patches.attrs) == {"grid": s["grid"], "patch_size": s["patch_size"]}
        assert cls.shape == (s["n_images"], s["d_model"])
        assert cls.chunks == (s["chunk_images"], s["d_model"])
        assert cls.metadata.dimension_names == ("image", "channel")
        assert patches.dtype == cls.dtype == np.dtype(f"<f{2 if s['dtype'] == 'float16' else 4}")


@pytest.mark.parametrize("name", ["tiny_store", "long_shards"])
def test_a_raw_shard_is_read_by_arithmetic_alone(name: str, request: pytest.FixtureRequest) -> None:
    """Every value of an array, read by chunk offsets; the index and its checksum at the end agree."""
    store: Path = request.getfixturevalue(name)
    s = read(store / "artifact.json")["settings"]
    (rows, columns), chunk, d_model = s["grid"], s["chunk_images"], s["d_model"]
    arrays: Any = zarr.open_group(store / "activations.zarr", mode="r")[HOOK]
    for array, n_rows, shape in (
        ("patches", rows, (chunk, columns, d_model)),
        ("cls", 1, (chunk, d_model)),
    ):
        expected, chunk_bytes = arrays[array][:], int(np.prod(shape)) * 2
        for shard in range(-(-s["n_images"] // s["shard_images"])):
            first, stop = shard * s["shard_images"], min((shard + 1) * s["shard_images"], s["n_images"])
            tail = "0" if array == "cls" else "0/0"
            data = (store / "activations.zarr" / HOOK / array / "c" / str(shard) / tail).read_bytes()
            n_blocks, slots = -(-(stop - first) // chunk), s["shard_images"] // chunk
            index_bytes = 16 * slots * n_rows + 4
            assert len(data) == n_blocks * n_rows * chunk_bytes + index_bytes
            index = np.frombuffer(data[-index_bytes:-4], "<u8").reshape(slots, n_rows, 2)
            assert struct.unpack("<I", data[-4:])[0] == google_crc32c.value(data[-index_bytes:-4])
            for block in range(slots):
                for row in range(n_rows):
                    if block >= n_blocks:
                        assert index[block, row].tolist() == [ABSENT, ABSENT]
                        continue
                    offset = (row * n_blocks + block) * chunk_bytes
                    assert index[block, row].tolist() == [offset, chunk_bytes]
                    got = np.frombuffer(data[offset : offset + chunk_bytes], "<f2").reshape(shape)
                    low = first + block * chunk
                    n = min(chunk, stop - low)
                    part = expected[low : low + n]
                    if array == "patches":
                        part = part[:, row * columns : (row + 1) * columns]
                    np.testing.assert_array_equal(got[:n], part)
                    assert not got[n:].any()  # padding


def test_result_add_up_to_the_statistics_of_the_seal(tiny_store: Path) -> None:
    records = [read(file) for file in sorted((tiny_store / "commits").glob("*.json"))]
    assert [record["images"] for record in records] == [[0, 16], [16, 32], [32, 48], [48, 64], [64, 75]]
    group: Any = zarr.open_group(tiny_store / "activations.zarr", mode="r")
    manifest = read(tiny_store / "manifest.json")
    assert manifest["failed"] == {}
    for hook, kinds in manifest["statistics"].items():
        for kind, array in (("patch", "patches"), ("cls", "cls")):
            x = group[f"{hook}/{array}"][:].reshape(-1, 32).astype(np.float64)
            assert kinds[kind]["count"] == len(x) == sum(r["statistics"][hook][kind]["count"] for r in records)
            np.testing.assert_allclose(kinds[kind]["sum"], x.sum(0), rtol=1e-10, atol=1e-9)
            np.testing.assert_allclose(kinds[kind]["sum_squares"], (x * x).sum(0), rtol=1e-12)
            assert kinds[kind]["absmax"] == abs(x).max()


# ---------------------------------------------------------------------------------------------------------------------
# A run and x.codes/


def dense_codes(run: Path, store: Path) -> np.ndarray:
    """Code of every token [I * T, F], in float64 by the page's formula."""
    sae = {name: tensor.astype(np.float64) for name, tensor in load_file(run / "sae.safetensors").items()}
    config = read(run / "artifact.json")["settings"]["sae"]
    arrays: Any = zarr.open_group(store / "activations.zarr", mode="r")[HOOK]
    x = np.concatenate([arrays["cls"][:][:, None], arrays["patches"][:]], 1).reshape(-1, 32).astype(np.float64)
    z = ((x - sae["mean"]) * sae["scale"] - sae["b_dec"]) @ sae["encoder"].T + sae["b_enc"]
    floor = np.sort(z, axis=1)[:, -config["k"]][:, None]
    return np.where(z >= floor, np.maximum(z, 0), 0)


def test_a_run_is_its_tensors_and_its_metrics(tiny_run: Path, tiny_store: Path) -> None:
    s = read(tiny_run / "artifact.json")["settings"]
    n_latents, d_model = s["sae"]["n_latents"], s["d_model"]
    tensors = load_file(tiny_run / "sae.safetensors")
    assert {name: (tensor.shape, tensor.dtype.name) for name, tensor in tensors.items()} == {
        "encoder": ((n_latents, d_model), "float32"),
        "decoder": ((n_latents, d_model), "float32"),
        "b_enc": ((n_latents,), "float32"),
        "b_dec": ((d_model,), "float32"),
        "mean": ((d_model,), "float32"),
        "scale": ((), "float32"),
    }
    np.testing.assert_allclose(np.linalg.norm(tensors["decoder"], axis=1), 1, rtol=1e-5)
    steps = [json.loads(line)["step"] for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert steps[-1] == s["train"]["n_steps"]
    assert read(tiny_run / "artifact.json")["parents"]["store"]["id"] == read(tiny_store / "artifact.json")["id"]
    # the seal's quality is that of the held-out images, by the page's formula
    code = dense_codes(tiny_run, tiny_store).reshape(75, 10, n_latents)[list(held_out(75))].reshape(-1, n_latents)
    arrays: Any = zarr.open_group(tiny_store / "activations.zarr", mode="r")[HOOK]
    x = np.concatenate([arrays["cls"][:][:, None], arrays["patches"][:]], 1)[list(held_out(75))]
    x = x.reshape(-1, d_model).astype(np.float64)
    guess = (code @ tensors["decoder"] + tensors["b_dec"]) / tensors["scale"] + tensors["mean"]
    fvu = ((x - guess) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert read(tiny_run / "manifest.json")["quality"]["all"]["fvu"] == pytest.approx(fvu, rel=1e-3)


def test_codes_are_the_runs_formula_in_both_orders(tiny_codes: Path, tiny_run: Path, tiny_store: Path) -> None:
    s = read(tiny_codes / "artifact.json")["settings"]
    expected = dense_codes(tiny_run, tiny_store)
    n_tokens, n_entries = s["n_tokens"], 0
    assert sum(s["shard_sizes"]) == s["n_images"]
    for shard, n_images in enumerate(s["shard_sizes"]):
        group: Any = zarr.open_group(tiny_codes / "codes.zarr" / str(shard), mode="r")
        indptr, latent, value, latent_indptr, row, latent_value = (
            group[name][:] for name in ("indptr", "latent", "value", "latent_indptr", "row", "latent_value")
        )
        for name, dtype in s["dtypes"].items():
            assert group[name].dtype == np.dtype(dtype)
            assert group[name].nchunks == 1
            raw = np.fromfile(tiny_codes / "codes.zarr" / str(shard) / name / "c" / "0", dtype)
            np.testing.assert_array_equal(raw, group[name][:])
        first = sum(s["shard_sizes"][:shard]) * n_tokens
        part = expected[first : first + n_images * n_tokens]
        assert len(indptr) == len(part) + 1
        assert len(latent_indptr) == s["n_latents"] + 1
        by_row, by_latent = np.zeros_like(part), np.zeros_like(part)
        for r in range(len(part)):
            entries = slice(indptr[r], indptr[r + 1])
            assert (np.diff(latent[entries].astype(int)) > 0).all()
            by_row[r, latent[entries]] = value[entries]
        for f in range(s["n_latents"]):
            entries = slice(latent_indptr[f], latent_indptr[f + 1])
            assert (np.diff(row[entries].astype(int)) > 0).all()
            by_latent[row[entries].astype(int) - first, f] = latent_value[entries]
        np.testing.assert_array_equal(by_row, by_latent)
        np.testing.assert_allclose(by_row, part, rtol=2e-3, atol=2e-3)
        assert read(tiny_codes / "commits" / f"{shard:06d}.json")["n_entries"] == len(latent)
        n_entries += len(latent)
    manifest = read(tiny_codes / "manifest.json")
    assert (manifest["n_entries"], manifest["failed"]) == (n_entries, {})
    assert (tiny_codes / "images.parquet").read_bytes() == (tiny_store / "images.parquet").read_bytes()
