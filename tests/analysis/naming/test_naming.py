"""Names equal plain computations over embeddings, and a person's names are never overwritten."""

import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from actcache import ActivationStore, CorruptError, ParentMismatchError, SettingsError, extract, verify
from actcache.prompts import open_towers
from analysis import AnalyzeConfig, ConceptTable, analyze, name_latents, read_names, set_name
from analysis.classifier.embeddings import embed_stored_images
from analysis.naming.files import NAMES_FILE, NOTES, OWN_FILE, read_name_table
from analysis.naming.naming import redundancy, score_images
from analysis.naming.vocabulary import VOCABULARY, read_vocabulary
from saetrain import encode

WORDS = ("red", "a dog", "sky", "wood", "night", "text", "small things", "water")


@pytest.fixture(scope="module")
def concepts(tmp_path_factory: pytest.TempPathFactory, middle_run: Path, middle_store: Path) -> Path:
    folder = tmp_path_factory.mktemp("naming")
    codes = encode(middle_run, middle_store, folder / "x.codes")
    return analyze(codes, folder / "x.concepts", config=AnalyzeConfig(n_top=5, n_gallery=4)).path


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text("\n".join(WORDS) + "\n")
    return path


def embed_plainly(clip: Any, texts: list[str]) -> NDArray[np.float64]:
    import open_clip

    with torch.no_grad():
        return np.asarray(clip.encode_text(open_clip.SimpleTokenizer()(texts), normalize=True).double())


def test_names_and_scores_equal_a_plain_computation(
    concepts: Path, words: Path, plain_clip: Any, full_forward: Callable[..., Any], middle_run: Path
) -> None:
    named = name_latents(concepts, vocabulary=words, device="cpu")
    table = ConceptTable.open(concepts)
    images = full_forward(table.images["uri"].to_pylist()).astype(np.float64)
    texts, empty = embed_plainly(plain_clip, list(WORDS)), embed_plainly(plain_clip, [""])[0]
    top: dict[int, list[int]] = {}
    for row in table.top_images.to_pylist():
        top.setdefault(row["latent"], []).append(row["image"])
    decoder = torch.from_numpy(np.asarray(load(middle_run)["decoder"])) / load(middle_run)["scale"]
    visual = plain_clip.visual
    lens = F.normalize(visual.ln_post(decoder) @ visual.proj, dim=1).detach().double().numpy()
    vectors = {latent: images[top[latent]].mean(0) for latent in top}
    vectors = {latent: vector / np.linalg.norm(vector) for latent, vector in vectors.items()}
    rows = {(row["method"], row["latent"]): row for row in named.to_pylist()}
    assert {latent for method, latent in rows if method == "images"} == set(top)
    assert len(rows) == 2 * len(top)
    for latent in top:
        for method, all_vectors in (("images", vectors), ("lens", {s: lens[s] for s in top})):
            row, vector = rows[method, latent], all_vectors[latent]
            cosines = texts @ vector
            assert row["name"] == WORDS[int(cosines.argmax())]
            assert row["cosine"] == pytest.approx(cosines.max(), abs=2e-6)
            assert row["alignment"] == pytest.approx(cosines.max() - empty @ vector, abs=2e-6)
            nearest = max(float(vector @ other) for s, other in all_vectors.items() if s != latent)
            assert row["redundancy"] == pytest.approx(nearest, abs=2e-6)
        points = images[top[latent]]
        pairs = [float(a @ b) for a, b in itertools.combinations(points, 2)]
        if pairs:  # clarity is the mean pairwise cosine
            assert rows["images", latent]["clarity"] == pytest.approx(np.mean(pairs), abs=2e-5)
            assert rows["images", latent]["polysemanticity"] >= -1e-9
        else:
            assert np.isnan(rows["images", latent]["clarity"])
        assert np.isnan(rows["lens", latent]["clarity"])


def load(run: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(run / "sae.safetensors")


def test_two_clusters_are_distinguished_from_one() -> None:
    rng = np.random.default_rng(0)
    one, other = np.eye(8)[0], np.eye(8)[1]
    near = [one + 0.01 * rng.normal(size=8) for _ in range(4)] + [other + 0.01 * rng.normal(size=8) for _ in range(3)]
    points = np.array([p / np.linalg.norm(p) for p in near], dtype=np.float32)
    lists = np.array([[0, 4, 1, 5, 2, 6], [0, 1, 2, 3, -1, -1], [3, -1, -1, -1, -1, -1]])
    _, clarity, polysemanticity = score_images(points, lists)
    centers = points[[0, 1, 2]].mean(0), points[[4, 5, 6]].mean(0)
    apart = 1 - centers[0] @ centers[1] / np.linalg.norm(centers[0]) / np.linalg.norm(centers[1])
    assert polysemanticity[0] == pytest.approx(apart, abs=1e-6)
    assert polysemanticity[1] < 0.01
    assert clarity[0] < 0.6 < 0.99 < clarity[1]
    assert np.isnan(polysemanticity[2])
    assert np.isnan(redundancy(torch.ones(1, 3))).all()


def test_embeddings_from_the_cache_equal_those_from_the_files(middle_store: Path, tiny_images: Path) -> None:
    store = ActivationStore.open(middle_store)
    vision = open_towers(store.artifact, device="cpu").vision
    images = np.array([70, 3, 11])
    cached = embed_stored_images(store, images, vision=vision)
    assert cached == pytest.approx(embed_stored_images(store, images, vision=vision, files=tiny_images), abs=2e-6)
    assert np.linalg.norm(cached, axis=1) == pytest.approx(1)


def test_a_persons_names_come_first_and_stay(concepts: Path, words: Path) -> None:
    table = ConceptTable.open(concepts)
    name_latents(table, vocabulary=words, device="cpu")
    computed = read_names(table)
    first, second = list(computed)[:2]
    images = {
        r["latent"]: r["name"] for r in (read_name_table(table) or table.table).to_pylist() if r["method"] == "images"
    }
    assert computed == images  # the top images come before the direction
    set_name(table, first, name="red stripes", note="see image 12")
    set_name(table, second, note="only a note")
    sealed = {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in table.path.rglob("*.parquet")}
    own = (table.path / NOTES / OWN_FILE).read_bytes()
    name_latents(table, vocabulary=words, methods=["lens"], device="cpu")
    assert (table.path / NOTES / OWN_FILE).read_bytes() == own
    assert read_names(concepts)[first] == "red stripes"
    assert read_names(concepts)[second] == computed_by(table, "lens")[second]
    changed = {f for f, digest in sealed.items() if hashlib.sha256(f.read_bytes()).hexdigest() != digest}
    assert changed == {table.path / NOTES / NAMES_FILE}
    assert verify(concepts).ok  # names are not sealed
    set_name(table, first, name="")
    assert read_names(table)[first] == computed_by(table, "lens")[first]
    facts = json.loads(pq.read_schema(table.path / NOTES / NAMES_FILE).metadata[b"naming"])
    assert facts["vocabulary"] == "words.txt"
    assert facts["template"] == "{}"


def computed_by(table: ConceptTable, method: str) -> dict[int, str]:
    named = read_name_table(table)
    assert named is not None
    return {row["latent"]: row["name"] for row in named.to_pylist() if row["method"] == method}


def test_the_general_vocabulary_can_be_read_whole() -> None:
    words = read_vocabulary()
    assert len(words) == len({word.casefold() for word in words}) > 500
    assert VOCABULARY.read_text().isprintable() is False
    assert all(word.isprintable() and word == word.strip() for word in words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dog\ncat\ndog\n", "'dog' twice, in lines 1 and 3"),
        ("dog\n\ncat\n", "Line 2 of .* is empty"),
        ("", "has no words"),
        ("dog " * 80, "longer than the context of 77 tokens"),
    ],
)
def test_a_bad_vocabulary_is_refused(concepts: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.txt").write_text(text)
    with pytest.raises(SettingsError, match=message):
        name_latents(concepts, vocabulary=tmp_path / "bad.txt", device="cpu")


def test_errors_say_what_to_do(
    concepts: Path, words: Path, tmp_path: Path, tiny_codes: Path, tiny_run: Path, tiny_images: Path,
    tiny_model: dict[str, str],
) -> None:  # fmt: skip
    table = ConceptTable.open(concepts)
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (SettingsError, "cannot be read", {"vocabulary": tmp_path / "none.txt"}),
        (SettingsError, "--method must be", {"methods": ["guess"]}),
        (SettingsError, "A template must contain", {"template": "photo"}),
        (ParentMismatchError, "made from codes", {"codes": tiny_codes}),
        (ParentMismatchError, "made from run", {"run": tiny_run}),
        (ParentMismatchError, "not the model", {"pretrained": "random:3"}),
    ]
    for error, message, options in cases:
        with pytest.raises(error, match=message):
            name_latents(table, **{"vocabulary": words, **options})
    extract(tiny_images, tmp_path / "other.acts", **tiny_model, layers=[1], seed=9)
    with pytest.raises(ParentMismatchError, match="Give the store that it was made from"):
        name_latents(table, vocabulary=words, store=tmp_path / "other.acts")
    with pytest.raises(SettingsError, match=r"0\.\.63, got 64"):
        set_name(table, 64, name="x")
    with pytest.raises(SettingsError, match="one line"):
        set_name(table, 3, name="two\nlines")
    (table.path / NOTES).mkdir(exist_ok=True)
    (table.path / NOTES / OWN_FILE).write_text('{"a": {}}')
    with pytest.raises(CorruptError, match="Repair it by hand"):
        read_names(table)
    (table.path / NOTES / OWN_FILE).unlink()
