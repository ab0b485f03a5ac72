"""The small histogram: one bar per used bin, logarithmic heights, and ticks at their values."""

import re
from xml.etree import ElementTree

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from analysis.concepts.histograms import EntryCounts, to_histogram
from analysis.report.latents import HEIGHT, WIDTH, choose_bins, draw_strengths


@given(
    st.integers(0, 150), st.lists(st.integers(0, 10**7), min_size=1, max_size=60).filter(any)
)  # the last bin ends at infinity
def test_bars_and_ticks_are_at_their_values(first: int, row: list[int]) -> None:
    counts = np.array(row[: 169 - first])
    if not counts.any():
        return
    edges = to_histogram(EntryCounts(first, counts[None].astype(np.uint32), np.zeros((1, 1), np.uint16))).edges
    svg = draw_strengths(counts, edges)
    ElementTree.fromstring(svg)
    step = WIDTH / len(counts)
    bars = [(float(x), float(height)) for x, height in re.findall(r"M([\d.]+) \d+v-([\d.]+)h", svg)]
    full = np.flatnonzero(counts)
    assert np.allclose([x for x, _ in bars], full * step, atol=0.051)
    heights = np.array([height for _, height in bars])
    assert (heights <= HEIGHT).all()
    assert np.all((np.diff(heights) > 0.11) <= (np.diff(counts[full]) > 0))
    for x, value in re.findall(r'<text x="([\d.]+)"[^>]*>([^<]+)</text>', svg):
        place = float(x) / step
        low, high = int(max(np.floor(place - 0.06 / step), 0)), int(np.ceil(place + 0.06 / step))
        assert edges[low] <= float(value) * (1 + 1e-5)
        assert float(value) <= edges[min(high, len(edges) - 1)] * (1 + 1e-5)


def test_all_latents_share_one_axis() -> None:
    counts = np.array([[0, 0, 3, 0, 0, 0], [0, 1, 0, 0, 2, 0]])
    assert choose_bins(counts) == slice(1, 5)
    assert choose_bins(np.zeros((2, 6), dtype=np.int64)) == slice(0, 6)
    assert draw_strengths(np.zeros(4, dtype=np.int64), np.ones(5, dtype=np.float32)) == ""
