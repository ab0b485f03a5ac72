"""An SAE that normalizes each token, spliced into a model: its size stays that of the token that is replaced.

Against whole forward passes and autograd with the formulas of ViT-Prisma, dense and in float64.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from actcache import ActivationStore, open_stores
from actcache.prompts import open_towers
from analysis import ModelOptions, StudyConfig, evaluate_fidelity, inspect_dictionaries, set_latents
from analysis.interventions.attribution import attribute
from analysis.interventions.steering import _move
from analysis.interventions.study import choose_study_images, open_study
from saetrain import Run, convert

MODES = ("layer_norm", "constant_norm_rescale")
CPU = ModelOptions(device="cpu")
K = 4


class PlainSAE:
    def __init__(self, tensors: dict[str, Tensor], mode: str) -> None:
        self.w, self.mode = {name: value.double() for name, value in tensors.items()}, mode

    def size(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.mode == "layer_norm":
            return x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return torch.zeros_like(x[..., :1]), x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5

    def encode(self, x: Tensor) -> Tensor:
        x = x.double()
        mean, size = self.size(x)
        inner = (x - mean) / (size + (1e-5 if self.mode == "layer_norm" else 0))
        z = (inner - self.w["b_dec"]) @ self.w["W_enc"] + self.w["b_enc"]
        top = z.topk(K, dim=-1)
        return torch.zeros_like(z).scatter(-1, top.indices, top.values.relu())

    def decode(self, z: Tensor, x: Tensor) -> Tensor:
        mean, size = self.size(x.double())
        return (z @ self.w["W_dec"] + self.w["b_dec"]) * size + mean


@pytest.fixture(scope="module", params=MODES)
def imported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, middle_store: Path
) -> tuple[Path, PlainSAE]:
    """A ViT-Prisma checkpoint of random weights and unit rows, as a run on layer 1 of middle_store. It has learned no
    image of the store, so all are judged."""
    folder = tmp_path_factory.mktemp(request.param)
    d, f, g = ActivationStore.open(middle_store).layout.d_model, 64, torch.Generator().manual_seed(1)
    tensors = {
        "W_enc": torch.randn(d, f, generator=g) / 4, "b_enc": torch.randn(f, generator=g) / 4,
        "W_dec": F.normalize(torch.randn(f, d, generator=g)), "b_dec": torch.randn(d, generator=g) / 4,
    }  # fmt: skip
    config = {
        "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "normalize_activations": request.param,
    }  # fmt: skip
    (folder / "in").mkdir()
    torch.save(tensors, folder / "in" / "weights.pt")
    (folder / "in" / "config.json").write_text(json.dumps(config))
    convert(folder / "in", folder / "run", store=middle_store, layer=1)
    return folder / "run", PlainSAE(tensors, request.param)


def softmax(logits: Any) -> Any:
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("keep_error", [True, False])
def test_a_steered_latent_moves_each_token_by_its_size(
    imported: tuple[Path, PlainSAE], middle_store: Path, plain_clip: Any, full_forward: Callable[..., Any],
    class_texts: Any, keep_error: bool,
) -> None:  # fmt: skip
    run, plain = imported
    found = set_latents(run, middle_store, set={7: 5.0}, add={9: -1.5}, keep_error=keep_error, model=CPU)
    store = ActivationStore.open(middle_store)
    uris = store.images["uri"].to_pylist()
    names = sorted(set(store.images["label_name"].to_pylist()))
    texts, scale = class_texts[[int(name[-1]) for name in names]], float(plain_clip.logit_scale.exp())

    def edit(x: Tensor) -> Tensor:
        z = plain.encode(x)
        steered = z.clone()
        steered[..., 7] = 5.0
        steered[..., 9] = (z[..., 9] - 1.5).clamp(min=0)
        error = x - plain.decode(z, x) if keep_error else 0.0
        return (plain.decode(steered, x) + error).float()

    before, after = (softmax(scale * full_forward(uris, e).astype(np.float64) @ texts.T) for e in (lambda x: x, edit))
    for i, name in enumerate(names):
        assert found.shift[name] == pytest.approx((after - before)[:, i].mean(), abs=2e-5)


def test_attributions_are_those_of_autograd(
    imported: tuple[Path, PlainSAE], middle_store: Path, plain_clip: Any, class_texts: Any
) -> None:
    run, plain = imported
    store, config = open_stores(middle_store), StudyConfig()
    towers = open_towers(store.stores[0].artifact, device="cpu")
    opened = Run.open(run)
    study = open_study(opened, choose_study_images(opened, store, config), towers, config, batch_size=8)
    images, spliced = next(iter(study.batches(study.classifier.images)))
    targets = torch.arange(len(images)) % len(study.classifier.names)
    found = attribute(study.classifier, spliced, targets)
    visual = copy.deepcopy(plain_clip.visual).double()
    texts = torch.from_numpy(class_texts[[int(name[-1]) for name in study.classifier.names]]).double()
    x = torch.from_numpy(ActivationStore.open(middle_store).read(1, images=images)).double()
    z = plain.encode(x).requires_grad_()
    stream = plain.decode(z, x) + (x - plain.decode(z, x)).detach()
    embedded = visual._pool(visual.transformer.resblocks[2](stream))[0] @ visual.proj
    (gradient,) = torch.autograd.grad((F.normalize(embedded, dim=1) * texts[targets]).sum(), z)
    dense = (z * gradient).detach()
    image, token = spliced.rows // x.shape[1], spliced.rows % x.shape[1]
    assert torch.allclose(found.double(), dense[image, token, spliced.latents], atol=1e-5)
    assert len(found) == int((z > 0).sum())
    torch.testing.assert_close(spliced.whole.double(), plain.decode(z, x).detach(), rtol=1e-4, atol=1e-4)
    kept = torch.zeros(len(images), 64, dtype=torch.bool)
    kept[:, ::2] = True
    wanted = plain.decode(z * ~kept[:, None], x).detach()
    torch.testing.assert_close(spliced.drop(spliced.keep(kept)).double(), wanted, rtol=1e-4, atol=1e-4)
    moved = spliced.old + _move(spliced, "dimension", 3, 2.0)
    assert torch.allclose(spliced.sae.normalize(moved, like=spliced.old)[..., 3], torch.tensor(2.0), atol=1e-3)


def test_the_other_verbs_take_it(tmp_path: Path, imported: tuple[Path, PlainSAE], middle_store: Path) -> None:
    run, _ = imported
    (measured,) = evaluate_fidelity(run, middle_store, tmp_path / "fidelity.json", model=CPU).runs
    values = measured.variants
    assert values["sae+error"].loss == pytest.approx(values["original"].loss, abs=1e-4)
    assert values["sae"].loss != values["original"].loss
    (inspected,) = inspect_dictionaries([run], middle_store).runs
    assert np.isfinite(inspected.gap.fvu)
    assert inspected.gap.fvu_refit <= inspected.gap.fvu + 1e-6
