"""The memory of analyze does not grow with the tokens: tracemalloc counts numpy's own allocations."""

import tracemalloc
from collections.abc import Callable

import dask
import numpy as np
import pytest
from small_codes import write_codes

import analysis.reduce.reduction
from analysis.concepts.files import describe_range
from analysis.concepts.histograms import entry_counts_statistic
from analysis.concepts.statistics import class_counts_statistic, top_images_statistic, totals_statistic
from analysis.reduce.reduction import cut_latents, reduce_latents
from saetrain import CodeStore

N_LATENTS = 48


def peak_bytes(run: Callable[[], object]) -> int:
    with dask.config.set(scheduler="synchronous"):
        run()  # modules and caches
        tracemalloc.start()
        try:
            run()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[CodeStore, CodeStore]:
    """Codes of 128 and of 1,024 images, in shards of 32: 35,000 and 280,000 entries."""
    folder = tmp_path_factory.mktemp("two")
    rng = np.random.default_rng(0)
    made = []
    for n_images in (128, 1024):
        dense = np.where(rng.random((n_images, 17, N_LATENTS)) < 0.33, rng.random((n_images, 17, N_LATENTS)), 0)
        labels = (np.arange(n_images) % 40).astype(np.int32)
        path = folder / f"{n_images}.codes"
        made.append(write_codes(path, dense.astype(np.float16), [32] * (n_images // 32), labels, grid=(4, 4)))
    return made[0], made[1]


def test_peak_memory_does_not_grow_with_the_tokens(
    two: tuple[CodeStore, CodeStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(codes: CodeStore) -> int:
        statistics = {
            "totals": totals_statistic(),
            "top": top_images_statistic(4, "mean"),
            "top_patches": top_images_statistic(4, "patch"),
            "classes": class_counts_statistic(np.asarray(codes.images["label"])),
            "entries": entry_counts_statistic(),
        }
        return peak_bytes(lambda: reduce_latents(codes, cut_latents(codes, 1 << 20), statistics, describe_range))

    monkeypatch.setattr(analysis.reduce.reduction, "FIRST_ENTRIES", 1 << 12)
    monkeypatch.setattr(analysis.reduce.reduction, "HELD_ENTRIES", 1 << 13)
    peaks = [measure(codes) for codes in two]
    assert two[1].n_entries > 7 * two[0].n_entries
    assert peaks[1] < 1.2 * peaks[0], peaks
    monkeypatch.setattr(analysis.reduce.reduction, "FIRST_ENTRIES", 1 << 30)
    assert measure(two[1]) > 3 * peaks[1]  # without partial counts, memory would grow
