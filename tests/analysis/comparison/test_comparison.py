"""compare against a dense plain computation; a CoOp that changes no latent; pairs that do not belong together."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_clip import checkpoint_tensors

from actcache import ActivationStore, ParentMismatchError, SettingsError, extract
from actcache.models import load_clip, make_text_tower, make_vision_tower
from actcache.prompts import open_prompts, open_towers, prompt_vision
from actcache.prompts.towers import embed_images, prompt_text
from actcache.sources import decode_image
from analysis import AnalyzeConfig, Comparison, ComparisonConfig, analyze, compare, write_adaptation_page
from analysis.interventions.latent_choice import split_halves
from analysis.results import DictionaryShare
from saetrain import SAEConfig, TrainConfig, encode, train

LAYER, TAU = 1, 0.2
ALL = ComparisonConfig(k=(3,), n_top=3, on_seen="use")  # the run has learned from tiny_images
PLAIN = replace(ALL, tau=TAU)
NAMES = ["class0", "class1", "class2"]


@pytest.fixture(scope="module")
def make_concepts(
    tmp_path_factory: pytest.TempPathFactory, tiny_images: Path, tiny_model: dict[str, str], middle_run: Path
) -> Callable[..., Path]:
    """Concepts of tiny_images by a model with the prompts of a method, or by the plain one."""
    folder = tmp_path_factory.mktemp("compared")

    def make(method: str | None, images: Path = tiny_images, name: str = "") -> Path:
        name = name or method or "base"
        options: dict[str, Any] = {"layers": [LAYER], "shard_images": 16, "precision": "float32", "dtype": "float32"}
        if method:
            state = checkpoint_tensors(method, width=32, text=16, embed=16, n=4, depth=1 if method == "coop" else 2)
            torch.save({"state_dict": {n: 5 * v for n, v in state.items()}}, folder / f"{name}.tar")
            options["prompts"] = folder / f"{name}.tar"
        if not (folder / f"{name}.concepts").exists():
            extract(images, folder / f"{name}.acts", **tiny_model, **options)
            encode(middle_run, folder / f"{name}.acts", folder / f"{name}.codes")
            analyze(folder / f"{name}.codes", folder / f"{name}.concepts", config=AnalyzeConfig(n_gallery=4))
        return folder / f"{name}.concepts"

    return make


def row(found: Comparison, **fields: Any) -> Any:
    return next(r for r in found.masks if all(getattr(r, name) == value for name, value in fields.items()))


@pytest.mark.slow
def test_masks_and_swaps_are_those_of_a_plain_computation(
    make_concepts: Callable[..., Path], plain_sae: Any, tiny_model: dict[str, str], tiny_images: Path, tmp_path: Path
) -> None:
    base, adapted = make_concepts(None), make_concepts("maple")
    found = compare(base, adapted, tmp_path / "x.json", PLAIN, device="cpu")
    stores = [ActivationStore.open(path.with_suffix(".acts")) for path in (base, adapted)]
    labels = np.array([NAMES.index(name) for name in stores[0].images["label_name"].to_pylist()])
    chosen, judged = split_halves(labels, seed=0)
    clip = load_clip(**tiny_model)
    prompts = open_prompts(adapted.with_suffix(".tar"), clip)
    text = make_text_tower(clip, device="cpu")
    with torch.no_grad():
        texts = [text.embed_classes(NAMES), prompt_text(text, prompts, NAMES).embed(prompts)]
    uris = stores[0].images["uri"].to_pylist()
    pixels = torch.stack([clip.transform(decode_image(tiny_images / uris[i])) for i in judged])
    plain = make_vision_tower(clip, precision="float32", device="cpu")
    with torch.no_grad():
        images = [embed_images(tower, pixels) for tower in (plain, prompt_vision(plain, prompts))]
    for i, image in enumerate(("base", "adapted")):
        for j, words in enumerate(("base", "adapted")):
            wanted = float(((images[i] @ texts[j].T).argmax(1).numpy() == labels[judged]).mean())
            assert found.accuracy[f"{image} image, {words} text"].accuracy == pytest.approx(wanted)
    dense = [plain_sae.encode(torch.from_numpy(store.read(LAYER))) for store in stores]  # [I, T, F]
    tops = {}
    for z, chosen_by in zip(dense, ("base", "adapted"), strict=True):
        counts = torch.stack([(z[chosen[labels[chosen] == c]] > TAU).sum((0, 1)) for c in range(3)])
        for selection, table in (("class", counts), ("dataset", counts.sum(0).expand(3, -1))):
            tops[chosen_by, selection] = [sorted(range(64), key=lambda s, n=n: (-n[s], s))[:3] for n in table.tolist()]
    tower = open_towers(stores[1].artifact, device="cpu").vision
    for (chosen_by, selection), top in tops.items():
        mask = torch.zeros(len(judged), 1, 64, dtype=torch.float64)
        for b, image in enumerate(judged):
            mask[b, 0, top[labels[image]]] = 1
        w = plain_sae.w
        decoded = ((dense[1][judged] * mask) @ w["decoder"] + w["b_dec"]) / w["scale"] + w["mean"]
        x = torch.cat([decoded.float(), torch.from_numpy(stores[1].read_extra(LAYER, images=judged))], 1)
        with torch.no_grad():
            logits = tower.head(tower.run_blocks(x, LAYER + 1, 3)) @ texts[1].T
        wanted = float((logits.argmax(1).numpy() == labels[judged]).mean())
        got = row(found, classified_by="adapted", chosen_by=chosen_by, selection=selection, k=3, keep_error=False)
        assert got.accuracy == pytest.approx(wanted)
    assert {(r.classified_by, r.chosen_by, r.selection) for r in found.masks} >= {
        (m, s, kind)
        for m in ("base", "adapted")
        for s in ("base", "adapted")
        for kind in ("class", "dataset", "random")
    }
    assert np.sum(found.confusion["adapted"]) == len(judged) == found.n_judged
    assert found.conclusion.sentence.startswith("Accuracy goes from")
    after, before = (
        row(found, classified_by=m, chosen_by=m, selection="class", k=3, keep_error=True).accuracy
        for m in ("adapted", "base")
    )
    assert found.conclusion.seen_points == pytest.approx(100 * (after - before))
    assert compare(base, adapted, tmp_path / "x.json", PLAIN, device="cpu") == found
    page = write_adaptation_page(found, base, adapted, tmp_path / "x.html").read_text()
    assert found.conclusion.sentence in page.replace("&#39;", "'")
    assert "http://" not in page.split("</style>")[0]


def test_seeds_are_single_comparisons_averaged(make_concepts: Callable[..., Path]) -> None:
    base, adapted = make_concepts(None), make_concepts("maple")
    config = ComparisonConfig(k=(3, 60), n_top=3, n_random=1, on_seen="use")
    one_by_one = [compare(base, adapted, None, replace(config, seed=seed), device="cpu") for seed in (4, 5, 6)]
    found = compare(base, adapted, None, replace(config, seed=4, n_seeds=3), device="cpu")
    assert "seeds" in found.interval
    assert "seeds" not in one_by_one[0].interval.split(";")[0]
    for i, mask in enumerate(found.masks):
        singles = [single.masks[i].accuracy for single in one_by_one]
        assert mask.accuracy == pytest.approx(np.mean(singles))
        assert mask.accuracy_low <= mask.accuracy <= mask.accuracy_high
    whole = np.array([[single.confusion[m] for m in ("base", "adapted")] for single in one_by_one]).sum(0)
    assert np.array_equal([found.confusion[m] for m in ("base", "adapted")], whole)
    assert whole.sum() == 2 * 3 * found.n_judged


def test_of_many_classes_no_confusions_are_kept(
    make_concepts: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("analysis.comparison.verdict.MAX_CLASSES", 2)
    base, adapted = make_concepts(None), make_concepts("maple")
    found = compare(base, adapted, None, ALL, device="cpu")
    assert (found.confusion, found.prediction) == ({}, ())
    assert write_adaptation_page(found, base, adapted, tmp_path / "x.html").stat().st_size > 10_000


def test_two_dictionaries_by_two_models(
    make_concepts: Callable[..., Path], make_images: Callable[..., Path], plain_sae: Any, middle_run: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    new = make_images(tmp_path / "new", 45, seed=9)  # neither run has learned from these
    base, adapted = make_concepts(None, new, "base-new"), make_concepts("maple", new, "maple-new")
    config = TrainConfig(n_steps=60, batch_size=128, lr=3e-3)
    store = make_concepts("maple").with_suffix(".acts")
    train(store, tmp_path / "second", layer=LAYER, sae=SAEConfig(n_latents=48, k=4), config=config)
    options: dict[str, Any] = {"config": ComparisonConfig(k=(3,), n_top=3), "device": "cpu"}
    found = compare(base, adapted, second_run=tmp_path / "second", **options).dictionaries
    assert found is not None
    images = list(range(45))
    assert found.n_images == len(images)
    fires = []
    for name, sae in (("first", plain_sae), ("second", type(plain_sae)(tmp_path / "second"))):
        fired = torch.zeros(len(sae.w["decoder"]), dtype=torch.bool)
        for model, concepts in (("base", base), ("adapted", adapted)):
            acts = ActivationStore.open(concepts.with_suffix(".acts"))
            x = torch.from_numpy(acts.read(LAYER, images=images)).double()
            z = sae.encode(x)
            fired |= (z > 0).any(0).any(0)
            variance = (x - x.mean((0, 1))).square().sum()
            cell = next(c for c in found.cells if (c.sae, c.model) == (name, model))
            assert cell.fvu == pytest.approx(float((x - sae.decode(z)).square().sum() / variance), rel=1e-4)
            assert cell.l0 == pytest.approx(float((z > 0).sum() / x.shape[:2].numel()))
            towers = open_towers(acts.artifact, device="cpu")
            stream = torch.cat([sae.decode(z).float(), torch.from_numpy(acts.read_extra(LAYER, images=images))], 1)
            with torch.no_grad():
                texts = towers.embed_classes(NAMES, ["a photo of a {}."])
                guess = (towers.vision.head(towers.vision.run_blocks(stream, LAYER + 1, 3)) @ texts.T).argmax(1)
            labels = [NAMES.index(acts.images["label_name"][i].as_py()) for i in images]
            assert cell.accuracy == pytest.approx(np.mean(guess.numpy() == labels))
        fires.append(torch.nn.functional.normalize(sae.w["decoder"][fired]))
    assert found.n_firing == tuple(len(rows) for rows in fires)
    largest = (fires[1] @ fires[0].T).amax(1)
    assert found.n_without_counterpart == int((largest < 0.7).sum())
    assert found.mean_largest_cosine == pytest.approx(float(largest.mean()), abs=1e-5)
    swapped = compare(base, adapted, **options)
    assert swapped.dictionaries is None
    assert "dictionaries" not in swapped.to_json()
    gained = swapped.conclusion.without_new_concepts
    assert found.shares[0] == DictionaryShare("first", gained.share, gained.low, gained.high)
    with pytest.raises(SettingsError, match="is the run of the concept tables"):
        compare(base, adapted, second_run=middle_run, **options)
    with pytest.raises(SettingsError, match="has 48 latents"):
        compare(base, adapted, config=ComparisonConfig(k=(50,)), second_run=tmp_path / "second", device="cpu")
    train(base.with_suffix(".acts"), tmp_path / "patches", layer=LAYER, sae=SAEConfig(n_latents=48, k=4),
          config=replace(config, tokens="patch", n_steps=1))  # fmt: skip
    with pytest.raises(ParentMismatchError, match="was trained on tokens patch"):
        compare(base, adapted, second_run=tmp_path / "patches", **options)


def test_coop_cannot_change_a_latent(make_concepts: Callable[..., Path]) -> None:
    found = compare(make_concepts(None), make_concepts("coop"), None, replace(ALL, n_top=5), device="cpu")
    assert found.overlap.task.jaccard == found.overlap.dataset.rank_biased_overlap == 1
    assert found.overlap.dataset.correlation == pytest.approx(1)
    assert all(r.n_high_to_low == r.n_low_to_high == 0 for r in found.overlap.classes)
    accuracy = {name: scores.accuracy for name, scores in found.accuracy.items()}
    assert accuracy["base image, adapted text"] == accuracy["adapted image, adapted text"]
    for keep_error in (False, True):
        one, other = (
            row(found, classified_by="adapted", chosen_by=s, selection="class", k=3, keep_error=keep_error).accuracy
            for s in ("base", "adapted")
        )
        assert one == other
    if (share := found.conclusion.text_only.share) is not None:
        assert share == 1


def test_cocoop_has_other_texts_for_every_image(
    make_concepts: Callable[..., Path], plain_sae: Any, tiny_model: dict[str, str]
) -> None:
    base, adapted = make_concepts(None), make_concepts("cocoop")
    found = compare(base, adapted, None, ALL, device="cpu", batch_size=7)
    assert found.overlap.task.jaccard == 1
    store = ActivationStore.open(adapted.with_suffix(".acts"))
    labels = np.array([NAMES.index(name) for name in store.images["label_name"].to_pylist()])
    _, judged = split_halves(labels, seed=0)
    clip = load_clip(**tiny_model)
    prompts, text = open_prompts(adapted.with_suffix(".tar"), clip), make_text_tower(clip, device="cpu")
    tower = open_towers(store.artifact, device="cpu").vision
    x = torch.from_numpy(store.read(LAYER, images=judged))
    spliced = plain_sae.decode(plain_sae.encode(x)).float()
    for stream, got in (
        (x, found.accuracy["adapted image, adapted text"]),
        (x, found.accuracy["base image, adapted text"]),
        (spliced, row(found, classified_by="adapted", selection="all", keep_error=False)),
    ):
        with torch.no_grad():
            images = torch.nn.functional.normalize(tower.head(tower.run_blocks(stream, LAYER + 1, 3)), dim=1)
            texts = [prompt_text(text, prompts, NAMES).embed(prompts, image[None])[0] for image in images]
        guess = [int((t @ image).argmax()) for image, t in zip(images, texts, strict=True)]
        assert got.accuracy == pytest.approx(np.mean(np.array(guess) == labels[judged]))


def test_pairs_that_do_not_belong_together_are_refused(
    make_concepts: Callable[..., Path], make_images: Callable[..., Path], tmp_path: Path
) -> None:
    base, adapted = make_concepts(None), make_concepts("maple")
    other = make_concepts("maple", make_images(tmp_path / "more", 30, seed=9), "other")
    out = tmp_path / "x.json"
    with pytest.raises(ParentMismatchError, match="have different images"):
        compare(base, other, out)
    with pytest.raises(ParentMismatchError, match="must belong to the base model"):
        compare(adapted, base, out)
    with pytest.raises(ParentMismatchError, match="to its adapted version"):
        compare(base, base, out)
    for bad, text in (
        ({"k": ()}, "--k must be below the dictionary's .* latents, got nothing"),
        ({"k": (0,)}, "--k must be at least 1"),
        ({"n_random": 0}, "--n-random must be at least 1"), ({"high": 5, "low": 4}, "--high must be at most --low"),
        ({"n_seeds": 0}, "--n-seeds must be at least 1"), ({"limit": 0}, "--limit must be at least 1"),
    ):  # fmt: skip
        with pytest.raises(SettingsError, match=text):
            compare(base, adapted, out, ComparisonConfig(**bad))  # type: ignore[arg-type]
    assert not out.exists()
