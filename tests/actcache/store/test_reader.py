"""Reading returns what the model computed, and damage is an error that names the shard, never zeros."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from actcache import ActivationStore, CorruptError, HookPoint, IncompleteError, SettingsError, extract, verify

TOKENS = {"all": slice(None), "cls": slice(0, 1), "patch": slice(1, None)}
ARRAY = "activations.zarr/blocks.2.hook_resid_post/patches"
SHARD = f"{ARRAY}/c/1/0/0"  # images 16 to 31 of tiny_store
Oracle = dict[int, NDArray[np.float16]]


@pytest.fixture(scope="module")
def oracle(
    tiny_store: Path, tiny_images: Path, tiny_model: dict[str, str], plain_forward: Callable[..., Any]
) -> Oracle:
    uris = ActivationStore.open(tiny_store).images["uri"].to_pylist()
    return {layer: plain_forward(tiny_images, uris, tiny_model, layer).astype(np.float16) for layer in (0, 2)}


@pytest.fixture
def copied(tmp_path: Path, tiny_store: Path) -> Path:
    return Path(shutil.copytree(tiny_store, tmp_path / "x.acts"))


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path, tiny_model: dict[str, str]) -> Path:
    """Layer 2 of tiny_store, stored as zstd."""
    path = tmp_path_factory.mktemp("zstd") / "z.acts"
    extract(tiny_images, path, **tiny_model, layers=[2], codec="zstd", shard_images=16, precision="float32")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("tokens", ["all", "patch", "cls"])
@pytest.mark.parametrize("layer", [0, 2])
def test_every_read_equals_a_plain_forward(tiny_store: Path, oracle: Oracle, layer: int, tokens: Any) -> None:
    store, expected = ActivationStore.open(tiny_store), oracle[layer][:, TOKENS[tokens]]
    np.testing.assert_array_equal(store.read(layer, tokens=tokens), expected)
    np.testing.assert_array_equal(store.read(HookPoint(layer), tokens=tokens, check=True), expected)
    np.testing.assert_array_equal(store.read(layer, images=slice(13, 50, 3), tokens=tokens), expected[13:50:3])
    np.testing.assert_array_equal(store.read(layer, images=slice(-9, None), tokens=tokens), expected[-9:])
    np.testing.assert_array_equal(store.read(layer, images=slice(40, 7, -1), tokens=tokens), expected[40:7:-1])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(images=st.lists(st.integers(0, 74), max_size=40), tokens=st.sampled_from(["all", "patch", "cls"]))
def test_any_images_in_any_order_are_gathered(
    tiny_store: Path, compressed: Path, oracle: Oracle, images: list[int], tokens: Any
) -> None:
    expected = oracle[2][images][:, TOKENS[tokens]]
    for path in (tiny_store, compressed):
        got = ActivationStore.open(path).read(2, images=images, tokens=tokens)
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == np.float16


def test_out_is_filled_and_returned(tiny_store: Path, oracle: Oracle) -> None:
    store = ActivationStore.open(tiny_store)
    out = np.full((35, 9, 32), np.nan, dtype=np.float16)
    assert store.read(0, images=slice(5, 40), tokens="patch", out=out) is out
    np.testing.assert_array_equal(out, oracle[0][5:40, 1:])
    for wrong in (out.astype(np.float32), out[:34], np.empty((35, 9, 64), np.float16)[..., ::2]):
        with pytest.raises(SettingsError, match=r"C-contiguous float16 array of shape \(35, 9, 32\)"):
            store.read(0, images=slice(5, 40), tokens="patch", out=wrong)


def test_statistics_are_those_of_the_stored_values(tiny_store: Path, oracle: Oracle) -> None:
    store = ActivationStore.open(tiny_store)
    for tokens, part in TOKENS.items():
        rows = oracle[2][:, part].reshape(-1, 32).astype(np.float64)
        statistics = store.statistics(2, tokens)  # type: ignore[arg-type]
        assert statistics.count == len(rows)
        np.testing.assert_allclose(statistics.mean, rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(statistics.variance, rows.var(0), rtol=1e-9)
        assert statistics.absmax == abs(rows).max()


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_a_plain_zarr_reader_gets_the_same_values(
    tiny_store: Path, compressed: Path, oracle: Oracle, codec: str
) -> None:
    import zarr

    group: Any = zarr.open_group((tiny_store if codec == "raw" else compressed) / "activations.zarr", mode="r")
    np.testing.assert_array_equal(group["blocks.2.hook_resid_post/patches"][:], oracle[2][:, 1:])
    np.testing.assert_array_equal(group["blocks.2.hook_resid_post/cls"][:], oracle[2][:, 0])
    assert group["blocks.2.hook_resid_post/patches"].metadata.dimension_names == ("image", "patch", "channel")


def test_compression_changes_bytes_not_values(
    tmp_path: Path, tiny_images: Path, tiny_model: dict[str, str], oracle: Oracle
) -> None:
    store = extract(
        tiny_images, tmp_path / "x.acts", **tiny_model, layers=[2], codec="zstd", shard_images=32, precision="float32"
    )
    np.testing.assert_array_equal(store.read(images=[3, 70, 31, 32], check=True), oracle[2][[3, 70, 31, 32]])
    np.testing.assert_array_equal(store.read(tokens="cls"), oracle[2][:, :1])
    assert store.statistics(None, "cls").count == 75
    assert verify(store.path).ok


def test_float32_storage_keeps_float32(
    tmp_path: Path, tiny_images: Path, tiny_model: dict[str, str], plain_forward: Callable[..., Any]
) -> None:
    store = extract(tiny_images, tmp_path / "x.acts", **tiny_model, layers=[1], dtype="float32", precision="float32")
    expected = plain_forward(tiny_images, store.images["uri"].to_pylist(), tiny_model, 1)
    np.testing.assert_array_equal(store.read(), expected)
    assert store.read().dtype == np.float32
    assert not np.array_equal(expected, expected.astype(np.float16))


# ---------------------------------------------------------------------------------------------------------------------
# Questions a store cannot answer


def test_a_layer_that_is_not_stored_is_answered_with_those_that_are(tiny_store: Path) -> None:
    store = ActivationStore.open(tiny_store)
    with pytest.raises(
        SettingsError, match=r"blocks\.1\..* Stored: blocks\.0\.hook_resid_post, blocks\.2\.hook_resid_post"
    ):
        store.read(1)
    with pytest.raises(SettingsError, match=r"several hook points .* --layer"):
        store.read()
    with pytest.raises(SettingsError, match="tokens must be one of all, patch, cls"):
        store.read(0, tokens="register")  # type: ignore[arg-type]


def test_images_out_of_range_are_refused(tiny_store: Path) -> None:
    store = ActivationStore.open(tiny_store)
    for images in ([75], [-1], [0, 3, 80]):
        with pytest.raises(SettingsError, match=r"0\.\.74"):
            store.read(0, images=images)


@pytest.mark.parametrize("images", [np.ones(75, dtype=bool), np.array([1.0]), 3, [[1, 2]]])
def test_images_that_are_no_list_of_whole_numbers_are_refused(tiny_store: Path, images: Any) -> None:
    """A Boolean array taken as indices would silently read images 0 and 1."""
    with pytest.raises(SettingsError, match="list of integers"):
        ActivationStore.open(tiny_store).read(0, images=images)


def test_no_images_give_no_rows(tiny_store: Path) -> None:
    assert ActivationStore.open(tiny_store).read(0, images=[]).shape == (0, 10, 32)


def test_an_incomplete_store_says_how_much_is_missing_and_how_to_finish(copied: Path) -> None:
    (copied / "manifest.json").unlink()
    for shard in (1, 4):
        (copied / "commits" / f"{shard:06d}.json").unlink()
    with pytest.raises(IncompleteError, match=r"2 of 5 shards are missing.*`extract` command again"):
        ActivationStore.open(copied)


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def damage(file: Path, how: str) -> None:
    data = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "flipped":
        file.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    else:
        file.write_bytes(data[: {"empty": 0, "half": len(data) // 2, "short": len(data) - 1}[how]])


@pytest.mark.parametrize("codec", ["raw", "zstd"])
@pytest.mark.parametrize("how", ["missing", "empty", "half", "short"])
def test_a_missing_or_short_shard_is_an_error_never_zeros(
    tmp_path: Path, tiny_store: Path, compressed: Path, oracle: Oracle, codec: str, how: str
) -> None:
    path = shutil.copytree(tiny_store if codec == "raw" else compressed, tmp_path / "x.acts")
    store = ActivationStore.open(path)
    damage(path / SHARD, how)
    for images in ([20], slice(None)):
        with pytest.raises(CorruptError, match=r"Shard 1 .*patches/c/1/0/0.*verify"):
            store.read(2, images=images)
    np.testing.assert_array_equal(store.read(2, images=[15, 32]), oracle[2][[15, 32]])  # the neighbors are whole


@pytest.mark.parametrize("codec", ["raw", "zstd"])
@pytest.mark.parametrize("array", ["patches", "cls"])
def test_check_finds_a_flipped_bit(tmp_path: Path, tiny_store: Path, compressed: Path, codec: str, array: str) -> None:
    path = shutil.copytree(tiny_store if codec == "raw" else compressed, tmp_path / "x.acts")
    store = ActivationStore.open(path)
    damage(path / SHARD.replace("patches/c/1/0/0", "cls/c/1/0" if array == "cls" else "patches/c/1/0/0"), "flipped")
    with pytest.raises(CorruptError, match=r"Shard 1 .*differs from what was written"):
        store.read(2, images=[16], check=True)
    store.read(2, images=[15, 32], check=True)


@pytest.mark.parametrize("record", [None, b"{", b'{"shard": 1, "files": {}}'])
def test_check_without_a_record_is_an_error(copied: Path, record: bytes | None) -> None:
    store, file = ActivationStore.open(copied), copied / "commits" / "000001.json"
    if record is None:
        file.unlink()
    else:
        file.write_bytes(record)
    with pytest.raises(CorruptError):
        store.read(2, images=[16], check=True)


def test_a_damaged_image_table_is_named(copied: Path) -> None:
    damage(copied / "images.parquet", "half")
    with pytest.raises(CorruptError, match=r"images\.parquet"):
        _ = ActivationStore.open(copied).images


def test_a_changed_manifest_is_not_believed(copied: Path) -> None:
    file = copied / "manifest.json"
    file.write_text(file.read_text().replace('"count": 75', '"count": 74'))
    with pytest.raises(CorruptError, match=r"manifest\.json"):
        ActivationStore.open(copied)
