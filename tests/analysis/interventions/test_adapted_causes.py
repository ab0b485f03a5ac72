"""Evaluate, intervene, attribute and steer on an adapted model's store: what runs from its activations and prompt
tokens equals whole forward passes with prompts, written from the formulas."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_clip import block, checkpoint_tensors, image_forward, norm, plain_prompts, put, text_forward
from torch.nn import functional as F

from actcache import HookPoint, extract, open_stores
from actcache.models import load_clip
from actcache.prompts import open_towers
from actcache.sources import decode_image
from analysis import (
    DeletionConfig,
    MaskingConfig,
    ModelOptions,
    SteerabilityConfig,
    StudyConfig,
    delete_latents,
    evaluate_fidelity,
    mask_latents,
    measure_steerability,
    set_latents,
)
from analysis.classifier import Classifier, choose_classes, open_judge
from analysis.interventions.latent_choice import split_halves

CPU = ModelOptions(device="cpu")
ALL = StudyConfig(on_seen="use")  # the run has learned from the images
LAYER, LATENTS = 1, (5, 17, 41)
CASES = [("maple", 3, 2), ("maple", 3, 3), ("vpt", 3, 3), ("coop", 4, 1)]
"""(method, prompts, blocks with prompts of their own); with 3 the block after the hook point takes new ones."""


class Adapted:
    """A store at block 1 of three, and the rest of the model as formulas."""

    def __init__(self, folder: Path, images: Path, model: dict[str, str], method: str, n: int, depth: int) -> None:
        tensors = checkpoint_tensors(method, width=32, text=16, embed=16, n=n, depth=depth)
        torch.save({"state_dict": tensors}, folder / "model.pth.tar-1")
        options: dict[str, Any] = {"shard_images": 16, "precision": "float32", "dtype": "float32"}
        self.path = folder / "x.acts"
        self.store = extract(  # in another order than the run has learned from
            images, self.path, **model, layers=[LAYER], **options, prompts=folder / "model.pth.tar-1", seed=1
        )
        clip = load_clip(**model)
        self.state = dict(clip.module.state_dict())
        self.vision, deep = plain_prompts(method, tensors, depth)
        uris = self.store.images["uri"].to_pylist()
        pixels = torch.stack([clip.transform(decode_image(images / uri)) for uri in uris])
        streams, whole = image_forward(self.state, pixels, self.vision, head_width=16, quick=False)
        self.stream, self.whole = streams[LAYER], F.normalize(whole, dim=1)  # [I, 10 + n, D], [I, E]
        self.labels = np.array([int(name[-1]) for name in self.store.images["label_name"].to_pylist()])
        self.scale = self.state["logit_scale"].exp()
        ctx = tensors.get("ctx", tensors.get("prompt_learner.ctx"))
        self.texts = self.embed([f"{'X X X X' if method == 'coop' else 'a photo of a'} class{i}." for i in range(3)],
                                ctx, deep)  # fmt: skip

    def embed(self, texts: list[str], ctx: torch.Tensor | None = None, deep: Any = ()) -> torch.Tensor:
        import open_clip

        tokens = open_clip.SimpleTokenizer()(texts)
        x = self.state["token_embedding.weight"][tokens]
        found = text_forward(self.state, tokens, x if ctx is None else put(x, ctx), deep, head_width=8, quick=False)
        return F.normalize(found, dim=1)

    def rest(self, new: torch.Tensor, images: Any = slice(None)) -> torch.Tensor:
        """Unit image embeddings with `new` [I, 10, D] in place of CLS and patches behind block 1."""
        x = torch.cat([new.float(), self.stream[images, 10:]], 1)
        if len(self.vision) > LAYER + 1:
            n = len(self.vision[0])
            x = torch.cat([x[:, :-n], self.vision[LAYER + 1].expand(len(x), n, -1)], 1)
        x = block(x, self.state, f"visual.transformer.resblocks.{LAYER + 1}", 16, None, False)
        return F.normalize(norm(x[:, 0], self.state, "visual.ln_post") @ self.state["visual.proj"], dim=1)

    def loss(self, embedded: torch.Tensor, images: Any = slice(None)) -> float:
        logits = (self.scale * embedded @ self.texts.T).double()
        return float(F.cross_entropy(logits, torch.from_numpy(self.labels[images])))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[2]}")
def adapted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_images: Path,
    tiny_model: dict[str, str],
) -> Adapted:  # fmt: skip
    with torch.no_grad():
        return Adapted(tmp_path_factory.mktemp("adapted"), tiny_images, tiny_model, *request.param)


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def test_the_logits_are_those_of_whole_forward_passes_with_prompts(adapted: Adapted) -> None:
    store = open_stores(adapted.path)
    towers = open_towers(store.stores[0].artifact, device="cpu")
    chosen = choose_classes(store, HookPoint(LAYER))
    judge = open_judge("zero-shot", chosen, towers)
    classifier = Classifier.of(chosen, towers.vision, judge)
    assert adapted.store.layout.n_extra == (len(adapted.vision[0]) if adapted.vision else 0)
    torch.testing.assert_close(judge.classes, adapted.texts, rtol=1e-4, atol=1e-5)
    images = np.arange(75)
    x = classifier.read(images)
    assert x.shape[1] == 10 + adapted.store.layout.n_extra
    torch.testing.assert_close(classifier.embed(x), adapted.whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        classifier.logits(x), adapted.scale * adapted.whole @ adapted.texts.T, rtol=1e-4, atol=1e-4
    )
    if adapted.vision:  # prompts matter: another model would have been seen
        assert (adapted.rest(adapted.stream[:, :10]) - adapted.whole).abs().max() < 1e-6
        without = x[:, :10]
        plain = block(without, adapted.state, "visual.transformer.resblocks.2", 16, None, False)
        plain = norm(plain[:, 0], adapted.state, "visual.ln_post") @ adapted.state["visual.proj"]
        assert (F.normalize(plain, dim=1) - adapted.whole).abs().max() > 1e-3


def test_fidelity_is_that_of_whole_forward_passes(adapted: Adapted, middle_run: Path, plain_sae: Any) -> None:
    options = ModelOptions(device="cpu", batch_size=16)
    (found,) = evaluate_fidelity(middle_run, adapted.path, study=ALL, model=options).runs
    x = adapted.stream[:, :10]
    assert found.n_images == 75
    for name, new in (
        ("original", x), ("sae", plain_sae.decode(plain_sae.encode(x))), ("sae+error", x), ("zero", 0 * x),
    ):  # fmt: skip
        embedded = adapted.rest(new)
        assert found.variants[name].loss == pytest.approx(adapted.loss(embedded), rel=5e-5), name
        right = (embedded @ adapted.texts.T).argmax(1).numpy() == adapted.labels
        assert found.variants[name].accuracy == pytest.approx(right.mean()), name


def test_masks_are_those_of_whole_forward_passes(adapted: Adapted, middle_run: Path, plain_sae: Any) -> None:
    config = MaskingConfig(latents=LATENTS, n_random=1)
    found = mask_latents(middle_run, adapted.path, None, config, study=ALL, model=CPU)
    _, judged = split_halves(adapted.labels, seed=0)
    z = plain_sae.encode(adapted.stream[judged, :10])
    kept = torch.zeros_like(z)
    kept[..., list(LATENTS)] = z[..., list(LATENTS)]
    for mode, codes in (("keep", kept), ("drop", z - kept)):
        (row,) = [row for row in found.curve if (row.selection, row.mode) == ("list", mode)]
        wanted = adapted.loss(adapted.rest(plain_sae.decode(codes), judged), judged)
        assert row.loss == pytest.approx(wanted, rel=5e-5), mode


def test_setting_a_latent_moves_what_it_moves_in_whole_forward_passes(
    adapted: Adapted, middle_run: Path, plain_sae: Any, tmp_path: Path
) -> None:
    found = set_latents(middle_run, adapted.path, set={7: 5.0}, add={9: -1.5}, keep_error=True, study=ALL, model=CPU)
    x = adapted.stream[:, :10]
    z = plain_sae.encode(x)
    steered = z.clone()
    steered[..., 7], steered[..., 9] = 5.0, (z[..., 9] - 1.5).clamp(min=0)

    def chances(codes: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        new = x + plain_sae.decode(codes) - plain_sae.decode(z)
        return (adapted.scale * adapted.rest(new) @ texts.T).double().softmax(1)

    shift = (chances(steered, adapted.texts) - chances(z, adapted.texts)).mean(0)
    assert list(found.shift.values()) == pytest.approx(shift.tolist(), abs=2e-5)
    (tmp_path / "words.txt").write_text("red\nsky\nwood\n")
    moved = measure_steerability(
        middle_run, adapted.path, None, SteerabilityConfig(latents=(7,), strengths=(40.0,)),
        vocabulary=tmp_path / "words.txt", study=StudyConfig(limit=75, on_seen="use"), model=CPU,
    )  # fmt: skip
    steered = z.clone()
    steered[..., 7] = 40.0
    words = adapted.embed([f"a photo of a {word}." for word in ("red", "sky", "wood")])
    d = (chances(steered, words) - chances(z, words)).mean(0)
    (row,) = [row for row in moved.rows if row.kind == "latent"]
    assert row.steerability == pytest.approx(float(d.square().sum()), rel=1e-3)


def test_deleting_is_that_of_whole_forward_passes(adapted: Adapted, middle_run: Path, plain_sae: Any) -> None:
    found = delete_latents(middle_run, adapted.path, None, DeletionConfig(n=(1,)), study=ALL, model=CPU)
    with torch.enable_grad():
        z = plain_sae.encode(adapted.stream[:, :10]).requires_grad_()
        error = (adapted.stream[:, :10] - plain_sae.decode(z)).detach()
        targets = adapted.texts[(adapted.whole @ adapted.texts.T).argmax(1)]
        (adapted.rest(plain_sae.decode(z) + error) * targets).sum().backward()
    scores = {"activation": z.detach().sum(1), "attribution": (z.detach() * z.grad).sum(1)}
    z = z.detach()
    for method, score in scores.items():
        top = score.masked_fill(z.sum(1) <= 0, -torch.inf).argmax(1)
        left = z.clone()
        left[torch.arange(75), :, top] = 0
        for n, codes in ((0, z), (1, left)):
            y = float((adapted.rest(plain_sae.decode(codes)) * targets).sum(1).mean())
            (row,) = [row for row in found.curve if (row.method, row.n) == (method, n)]
            assert row.y == pytest.approx(y, abs=2e-5), (method, n)
