"""A latent's histogram of activation values as a small SVG inside the page. numpy only.

In: counts of bins of equal width in the logarithm. Out: SVG text, about half a kilobyte. Heights are logarithms of
counts, so that a bin with one token is seen beside one with thousands.
"""

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from analysis.page import trust

WIDTH, HEIGHT, AXIS = 250, 58, 14


def choose_bins(counts: NDArray[np.int64]) -> slice:
    """The bins from the first to the last that any of some latents [n, B] uses: all are drawn on one axis."""
    used = np.flatnonzero(counts.any(axis=0))
    return slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, counts.shape[1])


def draw_strengths(counts: NDArray[np.int64], edges: NDArray[np.float32]) -> Markup:
    """SVG of counts [B] over values; edges are [B + 1], the first possibly 0 and the last possibly infinite."""
    n_bins = len(counts)
    if not counts.any():
        return Markup()
    heights = np.where(counts > 0, 2 + (HEIGHT - 3) * np.log1p(counts) / np.log1p(counts.max()), 0)
    step = WIDTH / n_bins
    bars = "".join(
        f"M{i * step:.1f} {HEIGHT}v{-height:.1f}h{step * 0.9:.1f}v{height:.1f}z"
        for i, height in enumerate(heights)
        if height
    )
    axis = "".join(
        f'<path d="M{x:.1f} {HEIGHT}v3" stroke="#5b6875"/>'
        f'<text x="{x:.1f}" y="{HEIGHT + AXIS - 2}" text-anchor="{anchor}">{value:g}</text>'
        for value, x, anchor in _ticks(edges, step)
    )
    return trust(
        f'<svg class="strengths" viewBox="0 0 {WIDTH} {HEIGHT + AXIS}" role="img" aria-label="histogram of activation">'
        f"<title>tokens by activation, both logarithmic; the fullest bin has {int(counts.max()):,}</title>"
        f'<path class="bars" d="{bars}"/><path d="M0 {HEIGHT}H{WIDTH}" stroke="#dde3ea"/>{axis}</svg>'
    )


def _ticks(edges: NDArray[np.float32], step: float) -> list[tuple[float, float, str]]:
    """(value, x, anchor) of powers of ten, or of two where there are fewer than two of these."""
    known = np.flatnonzero((edges > 0) & np.isfinite(edges))
    if len(known) < 2:
        return []
    logs = np.log2(edges[known].astype(np.float64))
    ticks: list[tuple[float, float, str]] = []
    for candidates in (10.0 ** np.arange(-4, 6), 2.0 ** np.arange(-12, 17)):
        inside = candidates[(np.log2(candidates) >= logs[0]) & (np.log2(candidates) <= logs[-1])]
        places = np.interp(np.log2(inside), logs, known) * step
        ticks = [
            (float(value), float(x), "start" if x < 8 else "end" if x > WIDTH - 8 else "middle")
            for value, x in zip(inside, places, strict=True)
        ]
        if len(ticks) >= 2:
            break
    return ticks
