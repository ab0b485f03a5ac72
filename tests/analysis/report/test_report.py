"""The page needs no other file, escapes what it shows, and agrees with the table; its list sorts and searches."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from damage import reseal
from PIL import Image

from actcache import CorruptError
from actcache.artifacts import seal_artifact
from analysis import AnalyzeConfig, ConceptTable, analyze, set_name, write_report


@pytest.fixture(scope="module")
def concepts(tmp_path_factory: pytest.TempPathFactory, tiny_codes: Path) -> ConceptTable:
    path = tmp_path_factory.mktemp("report") / "x.concepts"
    return analyze(tiny_codes, path, config=AnalyzeConfig(n_gallery=6), embeddings="clip", device="cpu")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, concepts: ConceptTable) -> str:
    return write_report(concepts, tmp_path_factory.mktemp("page") / "report.html").read_text()


@pytest.fixture(scope="module")
def latents(page: str, concepts: ConceptTable) -> dict[int, str]:
    """The HTML of each gallery entry."""
    entries = re.findall(r'<section class="latent" id="latent-(\d+)"(.*?)</section>', page, flags=re.DOTALL)
    assert [int(latent) for latent, _ in entries] == shown(concepts)
    return {int(latent): text for latent, text in entries}


def shown(concepts: ConceptTable) -> list[int]:
    return pc.unique(concepts.gallery["latent"]).to_pylist()


def without_scripts(page: str) -> str:
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)  # bokeh's own script names its home page


class Anchors(HTMLParser):
    """The links and the anchors of a page. It also checks that tags are closed in order."""

    VOID = ("meta", "img", "br", "input", "path", "i-none")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.hrefs: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if "id" in given:
            self.ids.append(str(given["id"]))
        if "href" in given:
            self.hrefs.append(str(given["href"]))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else(page: str) -> None:
    body = without_scripts(page)
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", body)
    assert "http" not in body
    assert "url(" not in body


def test_links_lead_somewhere_and_tags_are_closed(page: str) -> None:
    anchors = Anchors(without_scripts(page))
    assert anchors.open == []
    assert len(anchors.ids) == len(set(anchors.ids))
    assert anchors.hrefs
    assert {link.removeprefix("#") for link in anchors.hrefs} <= set(anchors.ids)


def test_every_gallery_latent_is_there_with_its_pictures(
    page: str, latents: dict[int, str], concepts: ConceptTable
) -> None:
    assert sum(text.count('<img class="heat"') for text in latents.values()) == concepts.gallery.num_rows
    for image in pc.unique(concepts.gallery["image"]).to_pylist():
        assert page.count(base64.b64encode(concepts.thumbnail(image) or b"").decode()) == 1
    assert f"{concepts.artifact.provenance['quality']['all']['fvu']:.4f}" in page


def test_numbers_are_those_of_the_table(latents: dict[int, str], concepts: ConceptTable) -> None:
    for latent, text in latents.items():
        row = concepts.table.slice(latent, 1).to_pylist()[0]
        for text_shown in (
            f"on {100 * row['image_frequency']:.2f} % of images, {100 * row['density']:.3f} % of tokens",
            f"mean {row['mean_activation']:.2f}, max {row['max_activation']:.2f}",
            f"label entropy {row['label_entropy']:.2f} (all images {row['label_entropy_all']:.2f})",
            f"label std {row['label_std']:.2f} ({row['label_std_all']:.2f})",
            f"monosemanticity {row['monosemanticity']:.3f}",
            f">median</span> {row['q50_activation']:.2f}",
            f">99 %</span> {row['q99_activation']:.2f}",
            f"<td>density</td><td>{100 * row['cls_density']:.2f} %</td><td>{100 * row['patch_density']:.2f} %</td>",
            f"<td>mean</td><td>{row['cls_mean_activation']:.2f}</td><td>{row['patch_mean_activation']:.2f}</td>",
            f"<td>max</td><td>{row['cls_max_activation']:.2f}</td><td>{row['patch_max_activation']:.2f}</td>",
        ):
            assert text_shown in text, (latent, text_shown)


def test_classes_and_neighbors_are_those_of_the_table(latents: dict[int, str], concepts: ConceptTable) -> None:
    for latent, text in latents.items():
        counts = concepts.class_counts.filter(pc.equal(concepts.class_counts["latent"], latent)).to_pylist()
        total = sum(line["n_tokens"] for line in counts)
        shares = re.findall(r'<span title="on ([\d,]+) of its images">(.*?)</span><i.*?</i><span>([\d.]+) %', text)
        wanted = {line["label_name"]: (f"{line['n_images']:,}", 100 * line["n_tokens"] / total) for line in counts}
        assert {name for _, name, _ in shares} == set(wanted)
        for n_images, name, share in shares:
            assert n_images == wanted[name][0]
            assert float(share) == pytest.approx(wanted[name][1], abs=0.051)
        near = re.search(r'<div class="near">(.*?)</div>', text, flags=re.DOTALL)
        assert near
        neighbors = re.findall(r'<span title="">(?:<a href="#latent-\d+">)?(\d+)(</a>)? (-?[\d.]+)</span>', near[1])
        assert [(int(n), cosine) for n, _, cosine in neighbors] == [
            (n, f"{c:.2f}") for n, c in concepts.nearest(latent)
        ]
        assert [bool(link) for _, link, _ in neighbors] == [int(n) in latents for n, _, _ in neighbors]


def test_histograms_and_position_maps_are_those_of_the_table(latents: dict[int, str], concepts: ConceptTable) -> None:
    counts, _ = concepts.histogram
    for latent, text in latents.items():
        drawn = re.findall(r"M([\d.]+) 58v-([\d.]+)h", text)
        full = counts[latent][counts[latent] > 0]
        assert len(drawn) == len(full)
        assert f"the fullest bin has {full.max():,}" in text
        heights = np.array([float(height) for _, height in drawn])
        assert np.allclose(heights, 2 + 55 * np.log1p(full) / np.log1p(full.max()), atol=0.06)
        bins = [float(x) for x, _ in drawn]
        assert np.allclose(np.diff(bins) / np.diff(np.flatnonzero(counts[latent])), bins_width(concepts), atol=0.11)
        picture = re.search(r'<img class="places".*?base64,(.*?)"', text)
        assert picture
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture[1]))))
        places = concepts.position_map[latent]
        assert pixels.shape[:2] == concepts.grid
        assert np.allclose(255 - pixels[..., 0], 244 * places / places.max(), atol=0.51)
        assert f"up to {places.max():,}" in text


def bins_width(concepts: ConceptTable) -> float:
    used = np.flatnonzero(concepts.histogram.counts[shown(concepts)].any(axis=0))
    return 250 / (used[-1] - used[0] + 1)


def test_few_top_images_bound_the_entropy(tmp_path: Path, tiny_codes: Path) -> None:
    page = write_report(
        analyze(tiny_codes, tmp_path / "x.concepts", config=AnalyzeConfig(n_top=2)), tmp_path / "r.html"
    ).read_text()
    assert f"{np.log(2):.2f} (dashed) is the entropy of 2 top images spread evenly over 3 labels" in page


def test_the_overview_shows_what_the_table_has(page: str, concepts: ConceptTable) -> None:
    silent = pc.sum(pc.equal(concepts.table["density"], 0)).as_py()
    assert f"{silent:,} of {concepts.table.num_rows:,} latents fire on none of these images" in page
    assert f"{np.log(3):.2f} (dashed) is the entropy of 16 top images spread evenly over 3 labels" in page
    embeddings = np.load(concepts.path / "image_embeddings.npy").astype(np.float64)
    likeness = embeddings @ embeddings.T
    mean = likeness[np.triu_indices(len(embeddings), 1)].mean()
    assert f"The dashed line, {mean:.2f}, is what random images would score" in page


def test_the_list_shows_every_latent(page: str, concepts: ConceptTable) -> None:
    rows = re.findall(r'<tr data-latent="(\d+)">(.*?)</tr>', page)
    assert [int(latent) for latent, _ in rows] == shown(concepts)
    heads = re.findall(r'title="sort by (.*?)"', page)
    assert heads == [
        "latent", "density", "images", "mean", "max", "label entropy", "label std", "monosemanticity", "top images",
    ]  # fmt: skip
    for latent, cells in rows:
        value = re.findall(r'data-value="(.*?)"', cells)[heads.index("density")]
        assert float(value) == concepts.table["density"][int(latent)].as_py()


def test_the_curves_of_training_are_shown_if_there_are_any(tmp_path: Path, page: str, concepts: ConceptTable) -> None:
    curves = concepts.artifact.provenance["curves"]
    assert set(curves) == {"step", "loss", "fvu", "l0", "dead"}
    assert len(curves["step"]) == len(curves["loss"]) >= 1
    assert ">Training</h2>" in page
    assert '"text":"FVU of the batch"' in page
    fields = json.loads((concepts.path / "artifact.json").read_bytes())
    del fields["provenance"]["curves"]  # as in older tables
    older = Path(shutil.copytree(concepts.path, tmp_path / "older.concepts"))
    reseal(older, older / "artifact.json", fields)
    assert ">Training</h2>" not in write_report(older, tmp_path / "older.html").read_text()


NEWER_COLUMNS = (
    "label_std", "label_entropy_all", "label_std_all", "q10_activation", "q50_activation", "q90_activation",
    "q99_activation", "monosemanticity", *(f"{kind}_{what}" for kind in ("cls", "patch") for what in (
        "density", "mean_activation", "max_activation")),
)  # fmt: skip


def test_an_older_table_makes_a_page_that_says_what_it_lacks(tmp_path: Path, concepts: ConceptTable) -> None:
    older = Path(shutil.copytree(concepts.path, tmp_path / "older.concepts"))
    for name in ("histogram", "histogram_edges", "position_map", "nearest", "nearest_cosine", "image_embeddings"):
        (older / f"{name}.npy").unlink()
    pq.write_table(concepts.table.drop_columns(list(NEWER_COLUMNS)), older / "concepts.parquet")
    (older / "manifest.json").unlink()
    seal_artifact(older, **{k: v for k, v in concepts.summary.items() if k not in ("files", "digest")})
    page = write_report(older, tmp_path / "older.html").read_text()
    assert "without histograms of activation, position maps, nearest latents, label spread" in page
    assert page.count('<section class="latent"') == len(shown(concepts))
    assert "<h4>classes</h4>" in page
    for part in ("activation values", "where it fires", "CLS and patches", "nearest"):
        assert f"<h4>{part}</h4>" not in page
    assert Anchors(without_scripts(page)).open == []


def test_a_damaged_table_is_not_taken_for_an_older_one(tmp_path: Path, concepts: ConceptTable) -> None:
    damaged = Path(shutil.copytree(concepts.path, tmp_path / "x.concepts"))
    (damaged / "position_map.npy").unlink()
    with pytest.raises(CorruptError, match=r"has no position_map\.npy"):
        write_report(damaged, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_names_and_notes_of_people_are_shown(tmp_path: Path, concepts: ConceptTable) -> None:
    copy = ConceptTable.open(shutil.copytree(concepts.path, tmp_path / "x.concepts"))
    first = shown(copy)[0]
    set_name(copy, first, name="red <stripes>", note="on kites & sails")
    page = write_report(copy, tmp_path / "report.html").read_text()
    assert f'Latent {first}: red &lt;stripes&gt;</a> <span class="tag">by hand</span>' in page
    assert '<p class="note">on kites &amp; sails</p>' in page
    words = re.search(rf'id="latent-{first}" data-words="(.*?)"', page)
    assert words
    assert html.unescape(words[1]).startswith(f"{first} red <stripes> on kites & sails")


def test_computed_names_say_how_far_to_trust_them(tmp_path: Path, concepts: ConceptTable) -> None:
    copy = ConceptTable.open(shutil.copytree(concepts.path, tmp_path / "x.concepts"))
    first, second, third = shown(copy)[:3]
    rows = [(first, "lens", "blue", 0.5), (first, "images", "red", 0.25), (second, "lens", "green", 0.125)]
    columns = dict(zip(("latent", "method", "name", "alignment"), zip(*rows, strict=True), strict=True))
    (copy.path / "notes").mkdir()
    pq.write_table(
        pa.table({name: list(values) for name, values in columns.items()}), copy.path / "notes/names.parquet"
    )
    page = write_report(copy, tmp_path / "report.html").read_text()
    assert f'Latent {first}: red</a> <span class="tag">from its top images, alignment 0.25</span>' in page
    assert f'Latent {second}: green</a> <span class="tag">from its direction, alignment 0.12</span>' in page
    assert f">Latent {third}</a></h3>" in page


def test_names_from_outside_are_escaped(
    tmp_path: Path, tiny_store: Path, tiny_run: Path, tiny_images: Path, tiny_model: dict[str, str]
) -> None:
    from actcache import extract
    from saetrain import encode

    images = shutil.copytree(tiny_images, tmp_path / "images")
    (images / "class0").rename(images / "<b onload=x>")
    extract(images, tmp_path / "x.acts", **tiny_model, layers=[2], precision="float32")
    encode(tiny_run, tmp_path / "x.acts", tmp_path / "x.codes")
    table = analyze(tmp_path / "x.codes", tmp_path / "x.concepts")
    page = write_report(table, tmp_path / "report.html").read_text()
    assert "<b onload" not in page
    assert "&lt;b onload" in page


def test_images_without_labels_and_an_empty_gallery_make_pages(
    tmp_path: Path, tiny_images: Path, tiny_model: dict[str, str], tiny_run: Path
) -> None:
    from actcache import extract
    from saetrain import encode

    (tmp_path / "flat").mkdir()
    for file in sorted(tiny_images.rglob("*.png"))[:40]:
        shutil.copy(file, tmp_path / "flat" / file.name)
    extract(tmp_path / "flat", tmp_path / "x.acts", **tiny_model, layers=[2], precision="float32")
    encode(tiny_run, tmp_path / "x.acts", tmp_path / "x.codes")
    for name, n_gallery in (("some", 3), ("none", 0)):
        concepts = analyze(
            tmp_path / "x.codes", tmp_path / f"{name}.concepts", config=AnalyzeConfig(n_gallery=n_gallery)
        )
        page = write_report(concepts, tmp_path / f"{name}.html").read_text()
        assert page.count('<section class="latent"') == n_gallery == page.count("<h4>nearest</h4>")
        assert "<h4>classes</h4>" not in page
        assert "(dashed)" not in page
        assert ">label entropy</button>" not in page
        assert Anchors(without_scripts(page)).open == []


def test_codes_of_cls_only_show_no_positions(tmp_path: Path, tiny_store: Path) -> None:
    from saetrain import SAEConfig, TrainConfig, encode, train

    config = TrainConfig(n_steps=20, batch_size=32, lr=3e-3, tokens="cls")
    run = train(tiny_store, tmp_path / "run", layer=2, sae=SAEConfig(n_latents=32, k=2), config=config)
    codes = encode(run, tiny_store, tmp_path / "x.codes")
    page = write_report(
        analyze(codes, tmp_path / "x.concepts", config=AnalyzeConfig(n_gallery=3)), tmp_path / "r.html"
    ).read_text()
    assert page.count('<section class="latent"') == page.count("<h4>activation values</h4>") > 0
    for part in ("where it fires", "CLS and patches"):
        assert f"<h4>{part}</h4>" not in page


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def in_browser(tmp_path_factory: pytest.TempPathFactory, page: str) -> Callable[[str], Any]:
    """in_browser(script) -> what the script returns once a real browser has loaded the page."""
    browser = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("there is no chromium")

    def run(script: str) -> Any:
        folder = tmp_path_factory.mktemp("browser")
        ask = f"document.body.dataset.answer = JSON.stringify((() => {{ {script} }})())"
        (folder / "page.html").write_text(
            page.replace("</body>", f"<script>window.addEventListener('load', () => {{ {ask} }})</script></body>")
        )
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
        command = [browser, *options, f"file://{folder / 'page.html'}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        answer = re.search(r'data-answer="(.*?)"', done.stdout)
        assert answer, done.stderr
        return json.loads(html.unescape(answer[1]))

    return run


HELPERS = """
const seenOf = (selector, number) => [...document.querySelectorAll(selector)].filter(e => !e.hidden).map(number);
const list = () => seenOf("#index tbody tr", row => +row.dataset.latent);
const entries = () => seenOf("#gallery section", section => +section.id.slice(7));
const sort = name => document.querySelector(`#index th button[title="sort by ${name}"]`).click();
const find = text => { const box = document.getElementById("search"); box.value = text; box.oninput(); };
"""


def test_the_list_sorts_and_searches(in_browser: Callable[[str], Any], concepts: ConceptTable) -> None:
    row = concepts.table.take(shown(concepts)).to_pydict()

    def order(column: str, down: bool) -> list[int]:
        pairs = sorted(enumerate(row[column]), key=lambda pair: -pair[1] if down else pair[1])  # stable, as sort() is
        return [row["latent"][i] for i, _ in pairs]

    target = order("max_activation", True)[-1]
    page_state = in_browser(
        HELPERS
        + f"""
        const seen = {{start: list()}};
        sort("max"); seen.max = list(); seen.entries = entries();
        sort("max"); seen.up = list();
        sort("latent"); seen.latent = list();
        find("#{target}"); seen.number = list(); seen.numberEntries = entries();
        find("CLASS1"); seen.label = entries();
        find("no such thing"); seen.none = list(); seen.message = document.getElementById("count").textContent;
        find(""); seen.all = list();
        return seen;"""
    )
    assert page_state["start"] == shown(concepts)
    assert page_state["max"] == page_state["entries"] == order("max_activation", True)
    assert page_state["up"][0] == target
    assert page_state["latent"] == page_state["all"] == sorted(row["latent"])
    assert page_state["number"] == page_state["numberEntries"]
    assert target in page_state["number"]
    assert all(str(latent).startswith(str(target)) for latent in page_state["number"])
    counts = concepts.class_counts.filter(pc.equal(concepts.class_counts["label_name"], "class1"))
    top = concepts.top_images
    labels = concepts.images["label_name"].take(top["image"]).to_pylist()
    on_top = {n for n, label in zip(top["latent"].to_pylist(), labels, strict=True) if label == "class1"}
    assert sorted(page_state["label"]) == sorted(set(row["latent"]) & (on_top | set(counts["latent"].to_pylist())))
    assert page_state["none"] == []
    assert page_state["message"].startswith("no latent in the gallery matches")


def test_every_picture_is_drawn(in_browser: Callable[[str], Any], concepts: ConceptTable) -> None:
    images = pc.unique(concepts.gallery["image"])
    assert len(images) < concepts.gallery.num_rows  # some are shown twice
    page_state = in_browser(
        """
        const pictures = [...document.querySelectorAll(".strip img:not(.heat)")];
        return {sources: pictures.map(i => i.src.split(",")[1]), names: pictures.map(i => i.alt)};"""
    )
    uris = concepts.images["uri"].take(concepts.gallery["image"]).to_pylist()
    assert page_state["names"] == uris
    wanted = [concepts.thumbnail(image) or b"" for image in concepts.gallery["image"].to_pylist()]
    assert [base64.b64decode(source) for source in page_state["sources"]] == wanted


def test_a_link_to_a_hidden_entry_shows_it(in_browser: Callable[[str], Any], concepts: ConceptTable) -> None:
    first, last = shown(concepts)[0], shown(concepts)[-1]
    page_state = in_browser(
        HELPERS
        + f"""
        find("{first}");
        const before = document.getElementById("latent-{last}") === null;
        location.hash = "#latent-{last}";
        window.dispatchEvent(new HashChangeEvent("hashchange"));
        return {{before, after: document.getElementById("latent-{last}") === null, all: list()}};"""
    )
    assert page_state == {"before": True, "after": False, "all": shown(concepts)}
