"""The writer, with plain arrays and no model: committed shards stay, and every shape is read back as it was written."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_store import all_bytes, make_settings, make_values, write_store

from actcache import ActivationStore, HookPoint, IncompleteError, PipelineError, verify
from actcache.store.writer import seal_store


def test_what_was_committed_before_is_not_written_again(tmp_path: Path) -> None:
    write_store(tmp_path / "x.acts", make_settings(), n_shards=1)
    first = [file for file in (tmp_path / "x.acts").rglob("c/0/**/0") if file.is_file()]
    before = [file.stat().st_mtime_ns for file in first]
    write_store(tmp_path / "x.acts", make_settings())
    assert [file.stat().st_mtime_ns for file in first] == before
    assert len(first) == 2


def test_an_unfinished_store_is_refused_and_counts_what_is_missing(tmp_path: Path) -> None:
    write_store(tmp_path / "x.acts", make_settings(n_images=100), n_shards=1)
    with pytest.raises(IncompleteError, match="3 of 4 shards are missing"):
        ActivationStore.open(tmp_path / "x.acts")
    found = verify(tmp_path / "x.acts")
    assert (found.complete, found.problems) == (False, ())
    before = all_bytes(tmp_path / "x.acts")
    seal_store(tmp_path / "x.acts")  # whoever sees all records seals; here nobody does
    assert all_bytes(tmp_path / "x.acts") == before


def test_sealing_again_changes_nothing(tmp_path: Path) -> None:
    write_store(tmp_path / "x.acts", make_settings())
    before = all_bytes(tmp_path / "x.acts")
    seal_store(tmp_path / "x.acts")
    (tmp_path / "x.acts" / "manifest.json").unlink()  # killed just before it was named
    seal_store(tmp_path / "x.acts")
    assert all_bytes(tmp_path / "x.acts") == before


# ---------------------------------------------------------------------------------------------------------------------
# A disk that fails


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(tmp_path / "whole.acts", make_settings())
    pwrite, sizes = os.pwrite, []

    def short(fd: int, data: Any, offset: int) -> int:
        sizes.append(len(data))
        return pwrite(fd, data[:100], offset)

    monkeypatch.setattr(os, "pwrite", short)
    write_store(tmp_path / "x.acts", make_settings())
    assert max(sizes) > 100
    assert all_bytes(tmp_path / "x.acts") == all_bytes(tmp_path / "whole.acts")


def test_an_error_while_beginning_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(PipelineError):
        write_store(tmp_path / "x.acts", make_settings(codec="gzip"))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Values


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    return make_settings(
        n_images=draw(st.integers(1, 70)),
        grid=[draw(st.integers(1, 3)), draw(st.integers(1, 3))],
        d_model=draw(st.integers(1, 5)),
        dtype=draw(st.sampled_from(["float16", "float32"])),
        codec=draw(st.sampled_from(["raw", "raw", "zstd"])),
        shard_images=draw(st.sampled_from([16, 48])),
        n_extra=draw(st.sampled_from([0, 0, 2])),
        hook_points=["blocks.0.hook_resid_post", "blocks.3.hook_resid_post"],
    )


@settings(max_examples=15, deadline=None)
@given(shapes())
def test_any_shape_reads_back_here_and_through_plain_zarr(fields: dict[str, Any]) -> None:
    import zarr

    folder = Path(tempfile.mkdtemp())
    try:
        write_store(folder / "x.acts", fields)
        store = ActivationStore.open(folder / "x.acts")
        group: Any = zarr.open_group(folder / "x.acts" / "activations.zarr", mode="r")
        for hook, x in make_values(fields).items():
            np.testing.assert_array_equal(store.read(HookPoint.parse(hook), check=True), x[:, : store.n_tokens])
            np.testing.assert_array_equal(group[f"{hook}/cls"][:], x[:, 0])
            np.testing.assert_array_equal(group[f"{hook}/patches"][:], x[:, 1 : store.n_tokens])
            if fields["n_extra"]:
                np.testing.assert_array_equal(group[f"{hook}/extra"][:], x[:, store.n_tokens :])
        assert verify(folder / "x.acts").ok
    finally:
        shutil.rmtree(folder)


def test_statistics_and_failures_are_those_of_the_rows(tmp_path: Path) -> None:
    failed = {3: "truncated", 33: "not an image"}
    fields = make_settings()
    write_store(tmp_path / "x.acts", fields, failed=failed)
    store = ActivationStore.open(tmp_path / "x.acts")
    assert store.failed == failed
    assert np.flatnonzero(~store.valid).tolist() == [3, 33]
    assert not store.read(images=[3, 33]).any()
    good = np.delete(make_values(fields)["blocks.3.hook_resid_post"], [3, 33], axis=0).astype(np.float64)
    for tokens, rows in (("all", good), ("cls", good[:, :1]), ("patch", good[:, 1:])):
        flat, statistics = rows.reshape(-1, 4), store.statistics(None, tokens)  # type: ignore[arg-type]
        assert statistics.count == len(flat)
        np.testing.assert_allclose(statistics.sum, flat.sum(0), rtol=1e-12)
        np.testing.assert_allclose(statistics.sum_squares, (flat**2).sum(0), rtol=1e-12)
        assert statistics.absmax == abs(flat).max()
