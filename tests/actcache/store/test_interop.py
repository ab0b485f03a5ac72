"""Other libraries read our stores: zarrs, tensorstore and xarray return the values that were written.

Nothing of actcache reads here. A store of every codec and dtype goes in: two hook points, three shards, the last of
11 images in blocks of 16, one failed image, prompt tokens, and every shape of special tokens. Warnings are errors, as
everywhere in the tests.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from small_store import make_settings, make_values, write_store

HOOKS = ["blocks.3.hook_resid_post", "blocks.7.hook_resid_post"]
N_IMAGES, N_PATCHES, N_EXTRA, FAILED = 75, 6, 2, 40
DIMENSIONS = {
    "patches": ("image", "patch", "channel"),
    "cls": ("image", "channel"),
    "registers": ("image", "register", "channel"),
    "extra": ("image", "extra", "channel"),
}
PREFIXES = (["cls"], [], ["cls", "reg", "reg"], ["reg"])

Arrays = dict[tuple[str, str], NDArray[Any]]
Store = tuple[Path, Arrays]


@pytest.fixture(scope="module", params=["float16", "float32"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=PREFIXES, ids=str)
def prefix(request: pytest.FixtureRequest) -> list[str]:
    return list(request.param)


@pytest.fixture(scope="module", params=["raw", "zstd"])
def store(
    request: pytest.FixtureRequest, dtype: str, prefix: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Store:
    """(the zarr group's folder, {(hook point, array): values that were written})."""
    fields = make_settings(N_IMAGES, codec=request.param, dtype=dtype, hook_points=HOOKS, n_extra=N_EXTRA)
    if prefix != ["cls"]:
        fields["prefix"] = prefix
    path = tmp_path_factory.mktemp("interop") / "x.acts"
    write_store(path, fields, failed={FAILED: "broken"})
    expected: Arrays = {}
    for hook, values in make_values(fields).items():
        values[FAILED] = 0
        n_cls, first = prefix.count("cls"), len(prefix)
        if n_cls:
            expected[hook, "cls"] = values[:, 0]
        if first > n_cls:
            expected[hook, "registers"] = values[:, n_cls:first]
        expected[hook, "patches"] = values[:, first : first + N_PATCHES]
        expected[hook, "extra"] = values[:, first + N_PATCHES :]
    shards = sorted(file.name for file in (path / "activations.zarr" / HOOKS[0] / "patches" / "c").iterdir())
    assert shards == ["0", "1", "2"]
    return path / "activations.zarr", expected


def same(got: Any, expected: NDArray[Any]) -> None:
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)


def test_zarrs_reads_whole_arrays_and_parts(store: Store) -> None:
    import zarr

    zarrs = pytest.importorskip("zarrs")
    folder, expected = store
    # strict: what zarrs cannot do is an error instead of zarr-python's own pipeline
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}):
        group: Any = zarr.open_group(folder, mode="r")
        for (hook, name), values in expected.items():
            array = group[hook][name]
            assert isinstance(array._async_array.codec_pipeline, zarrs.ZarrsCodecPipeline)
            same(array[:], values)
            same(array[20:70], values[20:70])  # across shards, from the middle of a block
            same(array[N_IMAGES - 1], values[-1])  # in the short block
        same(group[HOOKS[1]]["patches"][5:50, 2:5, 1:3], expected[HOOKS[1], "patches"][5:50, 2:5, 1:3])


def test_tensorstore_reads_whole_arrays_and_parts(store: Store) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    folder, expected = store
    for (hook, name), values in expected.items():
        kvstore = {"driver": "file", "path": str(folder / hook / name)}
        array = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, open=True, read=True).result()
        assert array.domain.labels == DIMENSIONS[name]
        assert tuple(array.domain.shape) == values.shape
        same(array.read().result(), values)
        same(array[20:70].read().result(), values[20:70])
        same(array[N_IMAGES - 1].read().result(), values[-1])


def test_xarray_opens_a_hook_point_as_a_dataset_with_named_dimensions(store: Store) -> None:
    """Without `consolidated=False` xarray warns that there is no consolidated copy of the metadata."""
    xarray = pytest.importorskip("xarray")
    folder, expected = store
    lazy = xarray.open_zarr(folder, group=HOOKS[0], consolidated=False)  # dask arrays
    eager = xarray.open_dataset(folder, group=HOOKS[1], engine="zarr", consolidated=False)
    for hook, dataset in zip(HOOKS, (lazy, eager), strict=True):
        with dataset:
            sizes = {"image": N_IMAGES, "patch": N_PATCHES, "extra": N_EXTRA, "channel": 4}
            if (hook, "registers") in expected:
                sizes["register"] = expected[hook, "registers"].shape[1]
            assert dict(dataset.sizes) == sizes
            assert set(dataset.variables) == {name for of, name in expected if of == hook}
            for name in dataset.variables:
                assert dataset[name].dims == DIMENSIONS[name]
                same(dataset[name].values, expected[hook, name])
            same(dataset["patches"].isel(image=slice(20, 70), patch=3).values, expected[hook, "patches"][20:70, 3])
            assert dataset["patches"].attrs == {"grid": [2, 3], "patch_size": [8, 8]}


def test_xarray_opens_all_hook_points_as_a_tree(store: Store) -> None:
    xarray = pytest.importorskip("xarray")
    folder, expected = store
    with xarray.open_datatree(folder, engine="zarr", consolidated=False) as tree:
        assert sorted(tree.children) == HOOKS
        assert tree.attrs["actcache"]["complete"]
        for (hook, name), values in expected.items():
            same(tree[hook][name].values, values)
