"""The current code opens, reads and verifies stores of every schema so far. See tests/golden/README.md.

What is expected is written here a second time, apart from the script that made the stores.
"""

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from actcache import ActivationStore, HookPoint, SchemaError, describe, verify
from actcache.artifacts.opening import SCHEMA

GOLDEN = Path(__file__).parents[2] / "golden"
MAKE = "python tests/golden/make.py --overwrite"

SETTINGS: dict[int, dict[str, Any]] = {
    1: {
        "model_id": "0123456789abcdef",
        "rows_id": "274d7dd76e5b0dfd",
        "hook_points": ["blocks.2.hook_resid_post", "blocks.11.hook_resid_post"],
        "dtype": "float16",
        "precision": "float32",
        "codec": "raw",
        "n_images": 39,
        "grid": [2, 3],
        "patch_size": [16, 16],
        "d_model": 8,
        "n_extra": 2,
        "chunk_images": 16,
        "shard_images": 16,
        "seed": 4,
        "limit": 39,
        "preprocess": {
            "size": [32, 48],
            "mode": "RGB",
            "mean": [0.48145466, 0.4578275, 0.40821073],
            "std": [0.26862954, 0.26130258, 0.27577711],
            "interpolation": "bicubic",
            "resize_mode": "shortest",
            "fill_color": 0,
        },
    }
}
SETTINGS[2] = {**SETTINGS[1], "prefix": ["reg", "dist"]}
STORE_IDS = {1: "875fa534b0b428df", 2: "2d63b309c0c72c12"}
N_SPECIAL = {1: 1, 2: 2}
FAILED = {20: "truncated file"}


def expected_values(layer: int, schema: int) -> np.ndarray:
    """float16 [39, special tokens + 6 + 2, 8], by the formula of the README."""
    image, token, channel = np.ogrid[:39, : N_SPECIAL[schema] + 8, :8]
    x = ((37 * image + 11 * token + 5 * channel + 3 * layer) % 251) / 16 - 5
    x[list(FAILED)] = 0
    return x.astype(np.float16)


def parts_of(x: np.ndarray, schema: int) -> dict[str, np.ndarray]:
    """What each `tokens` reads of values in the order of the stream."""
    patches = x[:, N_SPECIAL[schema] : N_SPECIAL[schema] + 6]
    return {"all": x[:, :7], "patch": patches, "cls": x[:, :1]} if schema == 1 else {"all": patches, "patch": patches}


@pytest.fixture(params=sorted(SETTINGS))
def schema(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def golden(schema: int) -> Path:
    return GOLDEN / f"schema-{schema}" / "tiny.acts"


def test_there_is_a_store_of_the_present_schema_and_no_unknown_one() -> None:
    folders = sorted(folder.name for folder in GOLDEN.glob("schema-*"))
    assert folders == [f"schema-{schema}" for schema in sorted(SETTINGS)]
    assert max(SETTINGS) == SCHEMA, f"schema {SCHEMA} has no golden store: {MAKE}, then describe it here"


def test_it_says_which_schema_it_is(golden: Path, schema: int) -> None:
    body = json.loads((golden / "artifact.json").read_text())
    assert (body["schema"], body["kind"], body["id"]) == (schema, "acts", STORE_IDS[schema])
    assert body["parents"] == {"images": {"id": SETTINGS[schema]["rows_id"], "path": "../images"}}


def test_it_is_small(golden: Path) -> None:
    assert sum(file.stat().st_size for file in golden.rglob("*") if file.is_file()) <= 200_000


def test_every_settings_field_is_read(golden: Path, schema: int) -> None:
    settings = SETTINGS[schema]
    store = ActivationStore.open(golden)
    assert dict(store.artifact.settings) == settings
    assert store.store_id == STORE_IDS[schema]
    assert store.model_id == settings["model_id"]
    assert (store.n_images, store.n_tokens) == (39, 7)
    assert store.dtype == np.dtype("<f2")
    assert store.hook_points == (HookPoint(2), HookPoint(11))
    layout = store.layout
    for field in ("n_images", "d_model", "n_extra", "chunk_images", "shard_images"):
        assert getattr(layout, field) == settings[field]
    assert (layout.grid, layout.n_shards) == ((2, 3), 3)
    assert describe(golden)


@pytest.mark.parametrize("check", [False, True])
def test_every_value_is_read(golden: Path, schema: int, check: bool) -> None:
    store = ActivationStore.open(golden)
    for layer in (2, 11):
        x = expected_values(layer, schema)
        for tokens, part in parts_of(x, schema).items():
            got = store.read(layer, tokens=tokens, check=check)  # type: ignore[arg-type]
            assert got.dtype == np.float16
            np.testing.assert_array_equal(got, part)
        some = [38, 0, 20, 15, 16]
        np.testing.assert_array_equal(store.read(layer, images=some, check=check), parts_of(x, schema)["all"][some])
        np.testing.assert_array_equal(store.read_stream(layer, images=some, check=check), x[some])
        registers = x[:, :2] if schema == 2 else x[:, :0]
        np.testing.assert_array_equal(store.read_registers(layer, check=check), registers)
        group: Any = zarr.open_group(golden / "activations.zarr", mode="r")[str(HookPoint(layer))]
        np.testing.assert_array_equal(group["extra"][:], x[:, -2:])
        assert ("cls" in group, "registers" in group) == (schema == 1, schema == 2)


def test_the_failed_image_and_the_statistics_are_read(golden: Path, schema: int) -> None:
    store = ActivationStore.open(golden)
    assert store.failed == FAILED
    assert np.flatnonzero(~store.valid).tolist() == list(FAILED)
    for layer in (2, 11):
        x = expected_values(layer, schema)[store.valid].astype(np.float64)
        for tokens, part in parts_of(x, schema).items():
            found = store.statistics(layer, tokens)  # type: ignore[arg-type]
            rows = part.reshape(-1, 8)
            assert (found.count, found.absmax) == (len(rows), np.abs(rows).max())
            np.testing.assert_allclose(found.sum, rows.sum(0), rtol=1e-12)
            np.testing.assert_allclose(found.sum_squares, (rows**2).sum(0), rtol=1e-12)


def test_the_images_are_read_in_their_order(golden: Path) -> None:
    images = ActivationStore.open(golden).images
    order = np.random.Generator(np.random.Philox(4)).permutation(50)[:39].tolist()
    assert images["source_index"].to_pylist() == order
    assert images["uri"].to_pylist() == [f"{'ville' if i % 2 else 'forêt'}/{i:03d}.png" for i in order]
    assert images["label"].to_pylist() == [i % 2 for i in order]
    assert images["label_name"].to_pylist() == ["ville" if i % 2 else "forêt" for i in order]
    assert images["bytes"].to_pylist() == [1000 + i for i in order]
    assert images["camera"].to_pylist() == [f"camera {i % 3}" for i in order]


def test_it_is_whole(golden: Path) -> None:
    found = verify(golden)
    assert found.problems == ()
    assert found.ok
    assert found.n_files == sum(file.is_file() for file in golden.rglob("*")) - 1  # all but the manifest


def test_a_changed_byte_is_found(golden: Path, tmp_path: Path) -> None:
    """Verification means something only if it can fail."""
    copy = shutil.copytree(golden, tmp_path / "tiny.acts")
    shard = copy / "activations.zarr" / "blocks.2.hook_resid_post" / "patches" / "c" / "1" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    assert verify(copy).shards == (1,)


def test_a_newer_schema_is_refused(golden: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(golden, tmp_path / "tiny.acts")
    body = json.loads((copy / "artifact.json").read_text())
    (copy / "artifact.json").write_text(json.dumps({**body, "schema": SCHEMA + 1}))
    with pytest.raises(SchemaError, match=f"schema {SCHEMA + 1}"):
        ActivationStore.open(copy)


def files_of(folder: Path) -> dict[str, Path]:
    """All files but places.json, which holds the paths of one machine."""
    files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    return {name: file for name, file in files.items() if name != "places.json"}


def test_the_script_still_makes_it(tmp_path: Path, golden: Path, schema: int) -> None:
    """The format has not changed: shards and records made now equal those of the golden store byte for byte."""
    runpy.run_path(str(GOLDEN / "make.py"))["write_golden"](tmp_path / "tiny.acts", schema=schema)
    kept, made = files_of(golden), files_of(tmp_path / "tiny.acts")
    advice = f"the format changed: a new schema, or, while this one is not released, {MAKE}"
    assert sorted(kept) == sorted(made), advice
    for name in kept:
        if name.startswith("commits/") or "/c/" in name:
            assert kept[name].read_bytes() == made[name].read_bytes(), f"{name}: {advice}"
        elif name.endswith("json"):
            before, now = (json.loads(files[name].read_text()) for files in (kept, made))
            assert before.keys() == now.keys(), f"{name}: {advice}"
