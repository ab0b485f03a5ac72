"""The compiled pass over a range of latents gives what the statistics give without a compiler."""

import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from small_codes import keep, write_codes

import analysis.concepts.counting
from actcache import StorageError
from actcache.compiler import find_kernels
from analysis import AnalyzeConfig, analyze
from analysis.concepts.counting import range_counter
from analysis.concepts.files import CountsWriter, _summarize_classes, describe_range
from analysis.concepts.histograms import entry_counts_statistic
from analysis.concepts.statistics import class_counts_statistic, top_images_statistic, totals_statistic
from analysis.reduce import reduce_latents
from saetrain import CodeStore

pytestmark = [
    pytest.mark.skipif(find_kernels("analysis.concepts.kernels") is None, reason="there is no compiler"),
    pytest.mark.usefixtures("_few_entries"),
]


@pytest.fixture(scope="module")
def _few_entries() -> Iterator[None]:
    """The kernel counts few entries, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis.concepts.counting, "LEAST_ENTRIES", 0)
        yield


def check_range(codes: CodeStore, latents: range, config: AnalyzeConfig) -> None:
    labels = np.asarray(codes.images["label"])
    statistics = {
        "totals": totals_statistic(), "top": top_images_statistic(config.n_top, config.score),
        "top_patches": top_images_statistic(config.n_top, "patch"), "classes": class_counts_statistic(labels),
        "entries": entry_counts_statistic(),
    }  # fmt: skip
    (plain,) = reduce_latents(codes, [latents], statistics, keep, tau=config.tau)
    found = range_counter(labels, config)(codes, latents)
    assert found is not None
    for name in ("totals", "entries", "top", "top_patches"):
        expected, got = plain[name], found[name]
        fields = expected._fields if hasattr(expected, "_fields") else expected.__dataclass_fields__
        for field in fields:
            one, other = np.asarray(getattr(expected, field)), np.asarray(getattr(got, field))
            np.testing.assert_array_equal(other, one, err_msg=f"{name}.{field}")
            assert one.dtype == other.dtype or not one.shape, (name, field)
    summary = _summarize_classes(plain["classes"], plain["top"], labels, len(latents))
    for one, other in zip(summary.rows, found["classes"].rows, strict=True):
        np.testing.assert_array_equal(other, one)
        assert one.dtype == other.dtype
    np.testing.assert_allclose(found["classes"].top_spread, summary.top_spread, atol=1e-7)
    np.testing.assert_allclose(found["classes"].spread, summary.spread, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 12), st.integers(0, 2**20), st.sampled_from(["all", "patch", "cls"]), st.sampled_from([1, 3, 16]),
    st.sampled_from(["mean", "max"]), st.sampled_from([0.0, 0.2, 5.0]), st.sampled_from([1, 10, 1 << 22]),
    st.data(),
)  # fmt: skip
def test_a_range_is_counted_as_without_a_compiler(
    n_images: int, seed: int, tokens: str, n_top: int, score: str, tau: float, batch: int, data: st.DataObject
) -> None:
    """With ties, silent latents, latents that fire everywhere, images without a label, and batches of one shard."""
    rng = np.random.default_rng(seed)
    values = rng.choice([0.25, 0.5, 1.0, 0.2, 2.0**-24, 3.7e-4, 65504], (n_images, 7, 6))
    dense: NDArray[np.float16] = np.where(rng.random(values.shape) < rng.choice([0, 0.1, 0.5, 1], 6), values, 0)
    dense = dense.astype(np.float16)
    dense[:, {"all": slice(0, 0), "patch": slice(0, 1), "cls": slice(1, None)}[tokens]] = 0
    cuts = sorted(data.draw(st.sets(st.integers(1, n_images - 1)))) if n_images > 1 else []
    labels = rng.integers(-1, 3, n_images).astype(np.int32)
    config = AnalyzeConfig(n_top=n_top, score=score, tau=tau)
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis.concepts.counting, "BATCH_ENTRIES", batch)
        codes = write_codes(
            Path(folder) / "x.codes", dense, np.diff([0, *cuts, n_images]).tolist(), labels, grid=(2, 3), tokens=tokens
        )
        first, last = sorted(data.draw(st.tuples(st.integers(0, 5), st.integers(0, 5))))
        check_range(codes, range(first, last + 1), config)


def test_latents_with_many_entries_in_a_shard_are_counted_alike(tmp_path: Path) -> None:
    """Few entries are gathered from all shards, many are not."""
    rng = np.random.default_rng(0)
    dense = rng.random((40, 7, 4)) * (rng.random((40, 7, 4)) < [0.05, 1, 0.2, 0.9])
    codes = write_codes(tmp_path / "x.codes", dense.astype(np.float16), [20, 20], np.arange(40, dtype=np.int32) % 5)
    check_range(codes, range(4), AnalyzeConfig(n_top=5))


def test_without_a_compiler_the_table_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    dense = (rng.random((30, 7, 9)) * (rng.random((30, 7, 9)) < 0.3)).astype(np.float16)
    codes = write_codes(tmp_path / "x.codes", dense, [11, 19], np.arange(30, dtype=np.int32) % 4, grid=(2, 3))
    one = analyze(codes, tmp_path / "1.concepts")
    monkeypatch.setattr(analysis.concepts.counting, "find_kernels", lambda name: None)
    other = analyze(codes, tmp_path / "2.concepts")
    for name in ("top_images", "top_patches", "class_counts"):
        assert getattr(one, name).equals(getattr(other, name))
    for name in one.table.column_names:
        np.testing.assert_allclose(one.table[name].to_numpy(), other.table[name].to_numpy(), atol=1e-7)


def test_few_entries_are_counted_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading it would take longer."""
    codes = write_codes(tmp_path / "x.codes", np.ones((3, 7, 2), np.float16), [3], np.zeros(3, np.int32), grid=(2, 3))
    for least, is_used in ((codes.n_entries, True), (codes.n_entries + 1, False)):
        monkeypatch.setattr(analysis.concepts.counting, "LEAST_ENTRIES", least)
        found = range_counter(np.zeros(3, np.int32), AnalyzeConfig())(codes, range(2))
        assert (found is not None) == is_used


def test_a_writer_that_is_left_by_an_error_leaves_no_file(tmp_path: Path) -> None:
    def fail() -> None:
        with CountsWriter(tmp_path, 2, None):
            raise KeyError("a task")

    with pytest.raises(KeyError, match="a task"):
        fail()
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_ends_the_count_at_the_next_range(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    dense = (rng.random((30, 7, 9)) * (rng.random((30, 7, 9)) < 0.3)).astype(np.float16)
    codes = write_codes(tmp_path / "x.codes", dense, [11, 19], np.arange(30, dtype=np.int32) % 4, grid=(2, 3))
    labels, config = np.asarray(codes.images["label"]), AnalyzeConfig()
    found = range_counter(labels, config)(codes, range(9))
    assert found is not None
    part = describe_range(codes, range(9), found)
    n_added = 0

    def add_all() -> None:
        nonlocal n_added
        with CountsWriter(tmp_path / "nowhere", 1000, codes.images) as writer:
            for number in range(1000):
                writer.add(number, part)
                n_added += 1
                time.sleep(0.01)

    with pytest.raises(StorageError, match="nowhere"):
        add_all()
    assert n_added < 1000


def test_a_latent_of_a_single_class_has_no_spread(tmp_path: Path) -> None:
    """Whatever its scores are: means over 197 tokens do not add up to exactly 1."""
    rng = np.random.default_rng(0)
    dense = np.zeros((20, 197, 6), np.float16)
    for latent in range(6):
        dense[:, rng.integers(1, 197, 9), latent] = rng.random((20, 9))
    codes = write_codes(tmp_path / "x.codes", dense, [20], np.full(20, 907, np.int32), grid=(14, 14))
    table = analyze(codes, tmp_path / "x.concepts").table
    spreads = [name for name in table.column_names if "label_std" in name]
    assert spreads
    for name in spreads:
        assert set(table[name].to_pylist()) == {0.0}
