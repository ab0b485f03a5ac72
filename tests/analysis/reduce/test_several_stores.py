"""Codes of several stores of one model, through analyze and query."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from actcache import SettingsError, extract, verify
from analysis import AnalyzeConfig, analyze, query_class, query_groups, query_image, query_latent
from saetrain import CodeStore, encode

Dense = NDArray[np.float64]


def test_stores_are_analyzed_and_queried_as_one(
    tmp_path: Path,
    tiny_run: Path,
    tiny_store: Path,
    tiny_model: dict[str, str],
    make_images: Callable[..., Path],
    dense_values: Callable[[CodeStore], Dense],
) -> None:
    more = make_images(tmp_path / "more", 40, seed=5)
    extract(more, tmp_path / "more.acts", **tiny_model, layers=[2], shard_images=16, precision="float32")  # type: ignore[arg-type]
    codes = encode(tiny_run, [tiny_store, tmp_path / "more.acts"], tmp_path / "both.codes")
    assert (codes.n_images, codes.shard_sizes.tolist()) == (115, [16, 16, 16, 16, 11, 16, 16, 8])
    dense = dense_values(codes)
    fires = dense > 0
    concepts = analyze(codes, tmp_path / "both.concepts", config=AnalyzeConfig(n_top=10))
    assert verify(concepts.path).ok
    assert concepts.summary_numbers()["n_images"] == 115
    assert concepts.table["n_images"].to_pylist() == fires.any(1).sum(0).tolist()
    np.testing.assert_allclose(concepts.table["density"], fires.mean((0, 1)), rtol=1e-12)

    latent = int((fires.any(1).sum(0) * (fires[75:].any((0, 1)))).argmax())
    score = dense[:, :, latent].mean(1)
    top = query_latent(codes, latent, n_top=115)
    assert top["image"].to_pylist() == [i for i in np.argsort(-score, kind="stable") if score[i] > 0]
    assert max(top["image"].to_pylist()) >= 75  # of the second store
    assert (
        query_latent(codes, latent, where="store == 1")["image"].to_pylist()
        == [i for i in np.argsort(-score, kind="stable") if i >= 75 and score[i] > 0][:10]
    )
    strongest = query_image(codes, 100)["latent"][0].as_py()
    assert strongest == dense[100].mean(0).argmax()
    images = np.array(codes.images["label_name"].to_pylist()) == "class1"
    counts = (dense[images] > np.float32(0.2)).sum((0, 1))
    assert query_class(codes, "class1", rank="frequent")["n_tokens"].to_pylist() == np.sort(counts)[::-1][:10].tolist()
    best = query_groups(codes, "store == 0", n_top=1).to_pylist()[0]
    a, b = dense[:75, :, best["latent"]].mean(1), dense[75:, :, best["latent"]].mean(1)
    wins = (a[:, None] > b).mean() + (a[:, None] == b).mean() / 2
    assert best["auroc"] == pytest.approx(wins, abs=1e-12)
    with pytest.raises(SettingsError, match="made from 2 stores"):
        analyze(codes, tmp_path / "x.concepts", embeddings="clip", store=tiny_store)
