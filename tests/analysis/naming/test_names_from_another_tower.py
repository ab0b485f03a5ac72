"""Words and embeddings of another model that has seen the same images in the same order."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from actcache import ParentMismatchError, SettingsError, extract
from actcache.prompts import open_towers
from actcache.store import open_stores
from analysis import AnalyzeConfig, ConceptTable, analyze, name_latents
from analysis.classifier.embeddings import embed_stored_images
from saetrain import CodeStore, encode

WORDS = ("red", "a dog", "sky", "wood", "night", "text", "small things", "water")


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory, middle_run: Path, middle_store: Path) -> CodeStore:
    return encode(middle_run, middle_store, tmp_path_factory.mktemp("borrowed") / "x.codes")


@pytest.fixture(scope="module")
def words(codes: CodeStore) -> Path:
    path = codes.path.parent / "words.txt"
    path.write_text("\n".join(WORDS) + "\n")
    return path


@pytest.fixture(scope="module")
def other_store(codes: CodeStore, tiny_images: Path, tiny_model: dict[str, str]) -> Path:
    """The same images by a model with other weights."""
    path = codes.path.parent / "clip.acts"
    model = {**tiny_model, "pretrained": "random:1"}
    extract(tiny_images, path, **model, layers=[2], shard_images=64, precision="float32")  # type: ignore[arg-type]
    return path


def test_names_are_the_other_models_words_for_its_own_embeddings(
    codes: CodeStore, other_store: Path, tiny_images: Path, words: Path, middle_store: Path
) -> None:
    concepts = analyze(codes, codes.path.parent / "x.concepts", config=AnalyzeConfig(n_top=5, n_gallery=4))
    named = name_latents(concepts, vocabulary=words, with_=other_store, device="cpu")
    store = open_stores(other_store)
    towers = open_towers(store.stores[0].artifact, device="cpu")
    images = embed_stored_images(store, np.arange(75), vision=towers.vision, files=tiny_images).astype(np.float64)
    texts = np.asarray(towers.text.embed(list(WORDS)).double())
    top: dict[int, list[int]] = {}
    for row in concepts.top_images.to_pylist():
        top.setdefault(row["latent"], []).append(row["image"])
    rows = {row["latent"]: row for row in named.to_pylist()}
    assert set(rows) == set(top)
    assert {row["method"] for row in rows.values()} == {"images"}  # a direction has no meaning in another model
    for latent, shown in top.items():
        vector = images[shown].mean(0)
        cosines = texts @ (vector / np.linalg.norm(vector))
        assert rows[latent]["cosine"] == pytest.approx(cosines.max(), abs=1e-3)  # float16 activations
    own = name_latents(concepts, vocabulary=words, methods=["images"], device="cpu")
    assert own["cosine"].to_pylist() != named["cosine"].to_pylist()
    name_latents(concepts, vocabulary=words, with_=other_store, device="cpu")
    facts = json.loads(pq.read_schema(concepts.path / "notes" / "names.parquet").metadata[b"naming"])
    assert facts["with"] == "clip.acts"
    assert facts["store_id"] == store.stores[0].store_id
    assert facts["model_id"] == store.model_id != open_stores(middle_store).model_id


def test_neither_the_run_nor_the_store_of_the_concepts_is_needed(
    tmp_path: Path, middle_store: Path, middle_run: Path, other_store: Path, words: Path
) -> None:
    import shutil

    shutil.copytree(middle_run, tmp_path / "run")
    shutil.copytree(middle_store, tmp_path / "x.acts")
    codes = encode(tmp_path / "run", tmp_path / "x.acts", tmp_path / "x.codes")
    concepts = analyze(codes, tmp_path / "x.concepts", config=AnalyzeConfig(n_top=3, n_gallery=2))
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(tmp_path / "x.acts")
    assert name_latents(concepts, vocabulary=words, with_=other_store, device="cpu").num_rows


def test_monosemanticity_takes_the_other_models_embeddings(
    tmp_path: Path, codes: CodeStore, other_store: Path, tiny_images: Path
) -> None:
    store = open_stores(other_store)
    vision = open_towers(store.stores[0].artifact, device="cpu").vision
    np.save(tmp_path / "e.npy", embed_stored_images(store, np.arange(75), vision=vision))
    config = AnalyzeConfig(n_top=3, n_gallery=2)

    def scores(name: str, **how: Any) -> tuple[str, list[float]]:
        table = analyze(codes, tmp_path / name, config=config, device="cpu", **how)
        return table.artifact.id, table.table["monosemanticity"].to_numpy().tolist()

    borrowed_id, borrowed = scores("borrowed", with_=other_store)
    own_id, own = scores("own", embeddings="clip")
    _, given = scores("given", embeddings=tmp_path / "e.npy")
    np.testing.assert_allclose(borrowed, given, rtol=1e-6)
    assert not np.allclose(borrowed, own, equal_nan=True)
    assert borrowed_id != own_id
    assert scores("borrowed", with_=other_store)[0] == borrowed_id  # the same command twice
    with pytest.raises(SettingsError, match="both give embeddings"):
        scores("both", embeddings=tmp_path / "e.npy", with_=other_store)
    assert ConceptTable.open(tmp_path / "borrowed").artifact.id == borrowed_id


def test_other_images_or_another_order_are_refused(
    tmp_path: Path, codes: CodeStore, tiny_images: Path, make_images: Callable[..., Path], tiny_model: dict[str, str],
    other_store: Path,
) -> None:  # fmt: skip
    extract(tiny_images, tmp_path / "order.acts", **tiny_model, layers=[2], seed=5)
    extract(make_images(tmp_path / "i", 75, seed=8), tmp_path / "images.acts", **tiny_model, layers=[2])
    concepts = analyze(codes, tmp_path / "x.concepts", config=AnalyzeConfig(n_top=3, n_gallery=2))
    for name in ("order", "images"):
        with pytest.raises(ParentMismatchError, match="holds other images than"):
            name_latents(concepts, with_=tmp_path / f"{name}.acts", device="cpu")
        with pytest.raises(ParentMismatchError, match="holds other images than"):
            analyze(codes, tmp_path / "y.concepts", with_=tmp_path / f"{name}.acts", device="cpu")
    assert not (tmp_path / "y.concepts").exists()
    with pytest.raises(SettingsError, match="--method lens"):
        name_latents(concepts, methods=["lens"], with_=other_store)
