"""The plots of a benchmark: their points are the planted numbers, and a browser draws them."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted_benchmark import SETTINGS, make_benchmark, truth

from analysis.report.frontier import choose_styles, cut_curve, draw_frontiers, draw_widths, gather_points
from analysis.report.page import Plot
from analysis.report.sections import show_benchmark
from analysis.results import Benchmark


def scatters(plot: Plot) -> list[dict[str, Any]]:
    """The data of every glyph that has a name for the mouse, as the page holds it."""
    found: list[dict[str, Any]] = []

    def walk(node: object) -> None:
        if isinstance(node, dict):
            if node.get("type") == "map" and "entries" in node:
                entries = dict(node["entries"])
                if "name" in entries:
                    found.append(entries)
            for child in node.values():
                walk(child)
        elif isinstance(node, list):
            for child in node:
                walk(child)

    for text in re.findall(r"const docs_json = '(.*?)';\n", str(plot.html)):
        walk(json.loads(text.encode().decode("unicode_escape")))
    return found


def points(plot: Plot) -> dict[str, tuple[float, float, str]]:
    """What the mouse says of a point -> x, y, range."""
    return {
        name: (x, y, text)
        for glyph in scatters(plot)
        for name, x, y, text in zip(glyph["name"], glyph["x"], glyph["y"], glyph["range"], strict=True)
    }


def test_a_point_is_the_mean_over_seeds_with_its_spread() -> None:
    result = make_benchmark()
    fvu, accuracy = draw_frontiers(result)
    for plot, measure in ((fvu, "fvu"), (accuracy, "k-sparse accuracy")):
        shown = points(plot)
        for variant, n_latents, k in SETTINGS:
            setting = [
                subject
                for subject in result.subjects
                if (subject.variant, subject.n_latents, subject.k, subject.baseline) == (variant, n_latents, k, None)
            ]
            y = [truth(subject, measure) for subject in setting]
            found = shown[f"{variant}, {n_latents:,} latents, k {k}, 3 seeds"]
            assert found[0] == pytest.approx(np.mean([truth(subject, "l0") for subject in setting]))
            assert found[1] == pytest.approx(np.mean(y))
            assert found[2] == f"± {np.std(y, ddof=1):.2g} over seeds"
            assert f"untrained {variant}, {n_latents:,} latents, k {k}, 3 seeds" in shown
        assert shown["PCA, k largest, 384 latents, k 8"][0] == pytest.approx(8)
        assert {name for name in shown if name.startswith("raw")} == {
            f"raw dimensions, 384 latents, k {k}" for k in (8, 16, 32)
        }
        assert not any(name.startswith("k-means") for name in shown)  # a level line
        assert "k-means (its L0 is 1)" in str(plot.html)
    assert "PCA by rank" in str(fvu.html)
    assert "PCA by rank" not in str(accuracy.html)
    assert "over seeds" in fvu.caption


def test_single_runs_have_their_intervals() -> None:
    result = make_benchmark(n_seeds=1)
    (run, *_) = result.subjects
    value = truth(run, "fvu")
    plot = draw_frontiers(result)[0]
    assert points(plot)["topk, 1,536 latents, k 8"] == (8, value, f"{value - 0.01:.4g} to {value + 0.01:.4g}")
    assert "95 % intervals over images" in plot.caption
    assert "seeds" not in plot.caption


def test_widths_are_compared_at_equal_k_only() -> None:
    result = make_benchmark()
    plots = draw_widths(result)
    assert len(plots) == 4  # fvu, l0, dead, k-sparse accuracy; not of CLS alone
    shown = points(plots[0])
    assert set(shown) == {
        f"{kind}topk, {width} latents, k 16, 3 seeds" for kind in ("", "untrained ") for width in ("384", "1,536")
    }
    assert shown["topk, 384 latents, k 16, 3 seeds"][0] == 384
    one_width = [
        subject for subject in result.subjects if subject.n_latents != 384 or subject.baseline in ("pca", "raw")
    ]
    assert draw_widths(replace(result, subjects=tuple(one_width))) == []


def test_runs_without_k_are_matched_by_their_l0() -> None:
    result = make_benchmark()
    no_k = [replace(subject, k=None) if subject.variant == "topk" else subject for subject in result.subjects]
    shown = points(draw_widths(replace(result, subjects=tuple(no_k)))[0])
    assert {name.split(", k")[0] for name in shown if not name.startswith("untrained")} == {
        "topk, 384 latents, 3 seeds", "topk, 1,536 latents, 3 seeds",
    }  # fmt: skip


def test_measures_that_are_missing_are_not_drawn() -> None:
    result = make_benchmark()
    assert draw_frontiers(replace(result, values=())) == []
    without = tuple(value for value in result.values if value.measure != "k-sparse accuracy")
    assert len(draw_frontiers(replace(result, values=without))) == 1
    known = {(value.subject, value.measure): value for value in result.values}
    known["topk-1536-k8-seed1", "fvu"] = replace(known["topk-1536-k8-seed1", "fvu"], value=None)
    first = gather_points(result.subjects, known, "fvu", lambda subject: subject.k)[0]
    assert len(first.members) == 2
    assert first.y == pytest.approx(np.mean([truth(result.subjects[i], "fvu") for i in (0, 2)]))


def test_every_variant_has_its_own_color_and_shape() -> None:
    styles = choose_styles(make_benchmark().subjects)
    assert list(styles) == ["topk", "batchtopk", "matryoshka topk"]
    assert len({color for color, _ in styles.values()}) == len({marker for _, marker in styles.values()}) == 3


def test_a_curve_is_cut_between_its_points() -> None:
    x, y = cut_curve([(1, 1.0), (4, 0.25), (16, 0.0625), (192, 0.0)], 2, 8)
    np.testing.assert_allclose(x, [2, 4, 8])
    np.testing.assert_allclose(y, [0.5, 0.25, 0.125])
    assert cut_curve([(1, 1.0), (4, 0.25)], 8, 16) == ([], [])
    assert cut_curve([(1, 1.0)], 1, 2) == ([], [])
    assert math.isclose(cut_curve([(1, 1.0), (4, 0.25)], 2, 16)[0][-1], 4)


@pytest.fixture(scope="module")
def section(request: pytest.FixtureRequest) -> tuple[Benchmark, str]:
    result = make_benchmark()
    part = show_benchmark(result)
    return result, "".join(str(plot.html) for plot in part.plots) + str(part.more)


def test_the_section_has_the_tables_of_settings_and_of_each_seed(section: tuple[Benchmark, str]) -> None:
    _, page = section
    mean = np.mean([0.9 / 8 + 40 / 1536 + 0.002 * seed for seed in range(3)])
    assert f"<td>{mean:.4g} ± 0.002</td>" in page
    assert "<td>topk-1536-k8-seed1</td>" in page
    assert "topk-1536-k8-seed* minus topk-1536-k16-seed*" in page
    assert "Each measure against the number of latents" in page


def test_a_browser_draws_every_plot(section: tuple[Benchmark, str], tmp_path: Path, browser: Any) -> None:
    from bokeh.resources import Resources

    script = Resources(mode="inline", components=["bokeh", "bokeh-gl"]).render()
    file = tmp_path / "page.html"
    file.write_text(f"<!doctype html><html><head>{script}</head><body>{section[1]}</body></html>")
    page = browser.new_page()
    page.goto(file.as_uri())
    page.wait_for_function("Bokeh.documents.filter(each => each.is_idle).length === 6", timeout=60_000)
    assert page.evaluate("Bokeh.documents.length") == 6
    page.close()
