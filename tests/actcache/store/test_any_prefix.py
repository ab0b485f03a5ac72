"""A store of any prefix gives every token back from where the tower had it, by every way of reading.

The values name the place where they belong (any_prefix.py), so a token that moved by one is seen.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from any_prefix import D_MODEL, encode_places, write_places
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_store import make_settings, write_store

from actcache import (
    ActivationStore,
    CorruptError,
    HookPoint,
    ParentMismatchError,
    SchemaError,
    SettingsError,
    describe,
    open_stores,
    verify,
)
from actcache.artifacts import begin_artifact, file_digest, open_artifact
from actcache.artifacts.files import digest, encode_json
from actcache.artifacts.opening import Parent, artifact_id
from actcache.store import StoreLayout, seal_store, statistics_of_images

HOOKS = ["blocks.3.hook_resid_post", "blocks.7.hook_resid_post"]
PREFIXES = ([], ["cls"], ["reg"], ["cls", "dist"], ["cls", "reg", "reg", "reg", "reg"], ["reg", "dist", "reg"])


@st.composite
def prefixes(draw: st.DrawFn) -> list[str]:
    special = draw(st.lists(st.sampled_from(["reg", "dist"]), max_size=5))
    return ["cls", *special] if draw(st.booleans()) else special


@pytest.mark.slow
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), prefix=prefixes())
def test_every_way_of_reading_gives_every_token_from_its_place(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, prefix: list[str]
) -> None:
    grid = (data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5)))
    n_images, n_extra = data.draw(st.integers(1, 70)), data.draw(st.integers(0, 3))
    failed = data.draw(st.sets(st.integers(0, n_images - 1), max_size=3))
    path = tmp_path_factory.mktemp("prefix") / "x.acts"
    write_places(
        path, prefix, n_images=n_images, grid=grid, n_extra=n_extra, hook_points=HOOKS,
        failed=dict.fromkeys(failed, "broken"),
        dtype=data.draw(st.sampled_from(["float16", "float32"])), codec=data.draw(st.sampled_from(["raw", "zstd"])),
        chunk_images=data.draw(st.sampled_from([16, 64])), shard_images=64,
    )  # fmt: skip
    store, group = ActivationStore.open(path), open_stores(path)
    images = data.draw(st.lists(st.integers(0, n_images - 1), max_size=9))
    n_cls, first, n_patches = int("cls" in prefix), len(prefix), grid[0] * grid[1]
    for number, hook in enumerate(map(HookPoint.parse, HOOKS)):
        x = encode_places(n_images, prefix, grid, n_extra, number)
        x[list(failed)] = 0
        patches, cls = x[:, first : first + n_patches], x[:, :n_cls]
        wanted = {"patch": patches, "all": np.concatenate([cls, patches], 1)} | ({"cls": cls} if n_cls else {})
        for chosen in (slice(None), images, slice(n_images // 2, None)):
            for check in (False, True):
                for tokens, values in wanted.items():
                    got = store.read(hook, images=chosen, tokens=tokens, check=check)  # type: ignore[arg-type]
                    np.testing.assert_array_equal(got, values[chosen])
                registers, stream = (
                    read(hook, images=chosen, check=check) for read in (store.read_registers, group.read_stream)
                )
                np.testing.assert_array_equal(registers, x[chosen, n_cls:first])
                np.testing.assert_array_equal(stream, x[chosen])
            np.testing.assert_array_equal(store.read_extra(hook, images=chosen), x[chosen, first + n_patches :])
        layout = store.layout
        block = np.empty(layout.chunk_shape("patches"), store.dtype)
        last = layout.n_images - (-(-n_images // layout.chunk_images) - 1) * layout.chunk_images
        for row in range(grid[0]):
            store.read_chunk(hook, -(-n_images // layout.chunk_images) - 1, row, block)
            np.testing.assert_array_equal(block[:last], patches[-last:, row * grid[1] : (row + 1) * grid[1]])
            assert not block[last:].any()
        for tokens, values in wanted.items():
            rows = values[store.valid].reshape(-1, D_MODEL).astype(np.float64)
            found = store.statistics(hook, tokens)  # type: ignore[arg-type]
            assert found.count == len(rows)  # registers and prompts are counted nowhere
            np.testing.assert_array_equal(found.sum, rows.sum(0))
            np.testing.assert_array_equal(found.sum_squares, (rows**2).sum(0))
    assert verify(path).problems == ()
    arrays = {name for name, _ in zarr.open_group(path / "activations.zarr", mode="r")[HOOKS[0]].arrays()}  # type: ignore[union-attr]
    assert arrays == {
        "patches",
        *prefix[:n_cls],
        *(["registers"] if first > n_cls else []),
        *(["extra"] if n_extra else []),
    }


@pytest.mark.parametrize("prefix", PREFIXES, ids=str)
def test_the_prefix_alone_decides_the_schema(tmp_path: Path, prefix: list[str]) -> None:
    write_places(tmp_path / "x.acts", prefix)
    body = json.loads((tmp_path / "x.acts" / "artifact.json").read_text())
    plain = prefix == ["cls"]
    assert (body["schema"], body["settings"].get("prefix")) == ((1, None) if plain else (2, prefix))
    assert body["id"] == artifact_id(
        "acts", body["settings"], {"images": Parent("fedcba9876543210", "")}, body["schema"]
    )
    group: Any = zarr.open_group(tmp_path / "x.acts" / "activations.zarr", mode="r")
    assert ("prefix" in group.attrs["actcache"]) == (not plain)
    facts = describe(tmp_path / "x.acts")
    assert facts.get("prefix", ["cls"]) == prefix


@pytest.mark.parametrize("kind", ["run", "codes", "concepts", "prompts"])
def test_other_artifacts_have_no_second_schema(tmp_path: Path, kind: Any) -> None:
    begin_artifact(tmp_path / "x", kind, settings={}, parents={}, provenance={})
    body = json.loads((tmp_path / "x" / "artifact.json").read_text())
    (tmp_path / "x" / "artifact.json").write_bytes(encode_json({**body, "schema": 2}))
    with pytest.raises(SchemaError, match=r"has schema 2; this version reads up to 1\."):
        open_artifact(tmp_path / "x")


def test_a_prefix_of_cls_alone_keeps_the_identity_that_it_had(tmp_path: Path) -> None:
    write_store(tmp_path / "x.acts", make_settings())
    write_store(tmp_path / "y.acts", {**make_settings(), "prefix": ["cls"]})
    ids = [ActivationStore.open(tmp_path / f"{name}.acts").store_id for name in "xy"]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("prefix", [prefix for prefix in PREFIXES if "cls" not in prefix], ids=str)
def test_cls_is_refused_with_one_sentence_where_there_is_none(tmp_path: Path, prefix: list[str]) -> None:
    write_places(tmp_path / "x.acts", prefix)
    store = open_stores(tmp_path / "x.acts")
    said = rf"the model of this store has none \(its special tokens: {', '.join(prefix) or 'none'}\). Use --tokens all"
    for ask in (
        lambda: store.read(tokens="cls"), lambda: store.statistics(None, "cls"), lambda: store.n_read_tokens("cls"),
        lambda: statistics_of_images(store, None, "cls", np.arange(3)),
    ):  # fmt: skip
        with pytest.raises(SettingsError, match=said) as refused:
            ask()
        assert "\n" not in str(refused.value)
    chunk = np.empty((16, D_MODEL), np.float16)
    with pytest.raises(SettingsError, match=r"has no array cls. It has patches"):
        store.stores[0].read_chunk(None, 0, 0, chunk, array="cls")
    with pytest.raises(SettingsError, match="must be one of all, patch, cls, got 'registers'"):
        store.read(tokens="registers")  # type: ignore[arg-type]
    assert store.n_read_tokens("all") == store.n_read_tokens("patch") == 6
    assert store.n_tokens == 7  # what separates the numbers of two images' tokens
    assert "40 images x 6 tokens x 4" in repr(store.stores[0])


@pytest.mark.parametrize("prefix", PREFIXES, ids=str)
def test_statistics_of_some_images_are_those_of_their_rows(tmp_path: Path, prefix: list[str]) -> None:
    write_places(tmp_path / "x.acts", prefix, n_images=90, failed={4: "broken", 70: "broken"})
    group, images = open_stores(tmp_path / "x.acts"), np.array([0, 1, 4, 33, 34, 60, 70, 89])
    readable = images[group.valid[images]]
    for tokens in ("all", "patch"):
        rows = group.read(images=readable, tokens=tokens).reshape(-1, D_MODEL).astype(np.float64)  # type: ignore[arg-type]
        found = statistics_of_images(group, None, tokens, images)  # type: ignore[arg-type]
        assert found.count == len(rows)
        np.testing.assert_array_equal(found.sum, rows.sum(0))


def test_several_stores_are_read_as_one_if_their_prefix_is_the_same(tmp_path: Path) -> None:
    prefix = ["cls", "reg", "reg"]
    for name, n_images in (("a", 20), ("b", 33)):
        write_places(tmp_path / f"{name}.acts", prefix, n_images=n_images, limit=n_images)
    write_places(tmp_path / "c.acts", ["reg", "reg"], limit=7)
    group = open_stores([tmp_path / "a.acts", tmp_path / "b.acts"])
    x = np.concatenate([encode_places(n, prefix, (2, 3)) for n in (20, 33)])
    images = [52, 3, 19, 20, 21, 0]
    np.testing.assert_array_equal(group.read_stream(images=images), x[images])
    np.testing.assert_array_equal(group.read_registers(images=images), x[images, 1:3])
    with pytest.raises(
        ParentMismatchError, match=r"different special tokens: \['cls', 'reg', 'reg'\] and \['reg', 'reg'\]"
    ):
        open_stores([tmp_path / "a.acts", tmp_path / "c.acts"])


# ---------------------------------------------------------------------------------------------------------------------
# Damage, and files that say something else than the bytes


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_a_flipped_byte_in_the_registers_is_found(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "x.acts"
    write_places(path, ["reg", "reg"], codec=codec)
    shard = path / "activations.zarr" / HOOKS[0] / "registers" / "c" / "1" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[40] ^= 1
    shard.write_bytes(data)
    assert verify(path).shards == (1,)
    store = ActivationStore.open(path)
    for read in (store.read_registers, store.read_stream):
        assert len(read(images=slice(0, 32), check=True)) == 32  # the other shard is whole
        with pytest.raises(CorruptError, match=r"Shard 1 .*registers"):
            read(check=True)
    assert store.read(check=True).shape == (40, 6, 4)  # patches do not need it
    shard.unlink()
    with pytest.raises(CorruptError, match=r"Shard 1 .*registers"):
        ActivationStore.open(path).read_stream()


def forge(path: Path, schema: int | None = None, **fields: Any) -> None:
    """Change settings of a store, and make identity, manifest and zarr's attribute agree with them again."""
    body = json.loads((path / "artifact.json").read_text())
    body["settings"] = {name: value for name, value in {**body["settings"], **fields}.items() if value is not ...}
    body["schema"] = schema or body["schema"]
    parents = {name: Parent(parent["id"], parent["path"]) for name, parent in body["parents"].items()}
    body["id"] = artifact_id("acts", body["settings"], parents, body["schema"])
    (path / "artifact.json").write_bytes(encode_json(body))
    seal = json.loads((path / "manifest.json").read_text())
    seal["files"].pop("artifact.json")
    seal.pop("digest")
    seal["files"]["artifact.json"] = file_digest(path / "artifact.json")
    (path / "manifest.json").write_bytes(encode_json({**seal, "digest": digest(seal)}))


FORGED: list[tuple[list[str], dict[str, Any], tuple[str, ...]]] = [
    (["cls"], {"schema": 2, "prefix": []}, ("lists the arrays patches, cls of", "with the prefix [] and 0")),
    (["cls"], {"schema": 2, "prefix": ["cls", "reg"]}, ("arrays patches, cls of", "patches, cls, registers.")),
    ([], {"schema": 2, "prefix": ["cls"]}, ("lacks the statistics", "by kind (cls, patch)")),
    ([], {"schema": 2, "prefix": ...}, ("lacks the statistics", "by kind (cls, patch)")),
    (["reg"], {"prefix": ["dist", "cls"]}, ("prefix must hold cls, reg, dist, and cls only in front, got",)),
    (["reg"], {"prefix": ["cls", "cls"]}, ("and cls only in front",)),
    (["reg"], {"prefix": ["register"]}, ("prefix[0] should be one of cls, reg, dist, got 'register'",)),
    (["reg"], {"prefix": "reg"}, ("prefix should be",)),
    (["reg"], {"prefix": 1}, ("prefix should be",)),
    (["reg"], {"prefix": [["reg"]]}, ("prefix[0] should be",)),
    (["reg"], {"prefix": None}, ("prefix should be",)),
    (["reg"], {"schema": 1}, ("has schema 1, but its prefix ['reg'] needs schema 2",)),
    (["reg"], {"n_extra": 2}, ("lists the arrays patches, registers of", "patches, registers, extra.")),
]  # fmt: skip


@pytest.mark.parametrize(("prefix", "fields", "said"), FORGED, ids=lambda value: str(value)[:40])
def test_a_prefix_that_the_arrays_contradict_is_refused_in_one_line(
    tmp_path: Path, prefix: list[str], fields: dict[str, Any], said: tuple[str, ...]
) -> None:
    path = tmp_path / "x.acts"
    write_places(path, prefix)
    forge(path, **fields)
    with pytest.raises(CorruptError) as refused:
        ActivationStore.open(path)
    text = str(refused.value)
    assert all(part in text for part in said), text
    assert "\n" not in text
    assert len(text) < 700
    assert not verify(path).ok


def test_registers_of_another_number_than_the_prefix_names_are_an_error(tmp_path: Path) -> None:
    """Also where every file is there: the size of the shard follows from the prefix."""
    path = tmp_path / "x.acts"
    write_places(path, ["reg", "reg", "reg"])
    forge(path, prefix=["reg", "reg"])
    with pytest.raises(CorruptError, match="registers"):
        ActivationStore.open(path).read_registers()
    assert not verify(path).ok


# ---------------------------------------------------------------------------------------------------------------------
# Writers that died


@pytest.mark.parametrize("prefix", PREFIXES, ids=str)
def test_a_shard_without_its_record_is_described_as_it_is(tmp_path: Path, prefix: list[str]) -> None:
    """A second writer finds the shard of one that died before the record, with the failed image in it."""
    path, failed = tmp_path / "x.acts", {20: "broken", 39: "broken"}
    write_places(path, prefix, failed=failed, n_extra=1)
    before = ActivationStore.open(path)
    whole, statistics = before.read_stream(), before.statistics(None, "all")
    (path / "manifest.json").unlink()
    for record in (path / "commits").iterdir():
        record.unlink()
    write_places(path, prefix, n_extra=1)  # what this writer computes for the failed images does not count
    store = ActivationStore.open(path)
    assert sorted(store.failed) == [20, 39]
    np.testing.assert_array_equal(store.read_stream(), whole)
    np.testing.assert_array_equal(store.statistics(None, "all").sum, statistics.sum)
    assert verify(path).ok


def test_an_interrupted_store_is_finished_and_no_other_prefix_continues_it(tmp_path: Path) -> None:
    write_places(tmp_path / "whole.acts", ["cls", "reg"], n_images=90)
    write_places(tmp_path / "x.acts", ["cls", "reg"], n_images=90, n_shards=1)
    assert not open_artifact(tmp_path / "x.acts").complete
    with pytest.raises(SettingsError, match=r"prefix: \['cls', 'reg'\] there, \['reg'\] asked for"):
        write_places(tmp_path / "x.acts", ["reg"], n_images=90)
    write_places(tmp_path / "x.acts", ["cls", "reg"], n_images=90)
    names = [
        file.relative_to(tmp_path / "whole.acts") for file in (tmp_path / "whole.acts").rglob("*") if file.is_file()
    ]
    for name in names:
        assert (tmp_path / "x.acts" / name).read_bytes() == (tmp_path / "whole.acts" / name).read_bytes(), name


def test_sealing_twice_writes_the_same(tmp_path: Path) -> None:
    write_places(tmp_path / "x.acts", [])
    before = (tmp_path / "x.acts" / "manifest.json").read_bytes()
    copy = Path(shutil.copytree(tmp_path / "x.acts", tmp_path / "copy.acts"))
    (copy / "manifest.json").unlink()
    seal_store(copy)
    assert (copy / "manifest.json").read_bytes() == before


@given(prefix=prefixes(), grid=st.tuples(st.integers(1, 9), st.integers(1, 9)), n_extra=st.integers(0, 4))
def test_token_places_are_those_of_the_stream(prefix: list[str], grid: tuple[int, int], n_extra: int) -> None:
    layout = StoreLayout(1, grid, 4, 16, 16, n_extra, prefix=tuple(prefix))
    kinds = np.array([*prefix, *["patch"] * layout.n_patches, *["prompt"] * n_extra])
    assert layout.n_stream == len(kinds)
    for tokens in ("all", "patch", *prefix[: layout.has_cls]):
        places = np.concatenate([np.arange(len(kinds))[part] for part in layout.token_places(tokens)])
        wanted = np.flatnonzero(np.isin(kinds, ["cls", "patch"] if tokens == "all" else [tokens]))
        np.testing.assert_array_equal(places, wanted)
        assert len(places) == layout.n_read_tokens(tokens)
