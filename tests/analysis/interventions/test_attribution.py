"""Attributions equal finite differences and autograd over a dense SAE; deletion curves are what they say."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from actcache import ActivationStore, SettingsError, open_stores
from actcache.prompts import open_towers
from analysis import DeletionConfig, ModelOptions, StudyConfig, delete_latents
from analysis.interventions.attribution import METHODS, attribute
from analysis.interventions.study import choose_study_images, open_study
from saetrain import Run


def test_attributions_are_those_of_autograd_and_of_finite_differences(
    middle_run: Path, middle_store: Path, plain_sae: Any, plain_clip: Any, class_texts: Any
) -> None:
    store = open_stores(middle_store)
    towers = open_towers(store.stores[0].artifact, device="cpu")
    run, config = Run.open(middle_run), StudyConfig()
    study = open_study(run, choose_study_images(run, store, config), towers, config, batch_size=8)
    ((images, spliced),) = study.batches(study.classifier.images)
    targets = torch.arange(len(images)) % len(study.classifier.names)
    found = attribute(study.classifier, spliced, targets)
    visual = copy.deepcopy(plain_clip.visual).double()
    texts = torch.from_numpy(class_texts[[int(name[-1]) for name in study.classifier.names]]).double()
    x = torch.from_numpy(ActivationStore.open(middle_store).read(1, images=images)).double()
    z = plain_sae.encode(x).requires_grad_()

    def y(codes: torch.Tensor) -> torch.Tensor:
        stream = plain_sae.decode(codes) + (x - plain_sae.decode(z)).detach()
        embedded = visual._pool(visual.transformer.resblocks[2](stream))[0] @ visual.proj
        return (F.normalize(embedded, dim=1) * texts[targets]).sum(1)

    (gradient,) = torch.autograd.grad(y(z).sum(), z)
    dense = (z * gradient).detach()
    n_tokens = x.shape[1]
    image, token = spliced.rows // n_tokens, spliced.rows % n_tokens
    assert torch.allclose(found.double(), dense[image, token, spliced.latents], atol=1e-5)
    assert len(found) == int((z > 0).sum())
    strongest = found.abs().topk(5).indices
    for entry in strongest.tolist():
        where = (int(image[entry]), int(token[entry]), int(spliced.latents[entry]))
        step = torch.zeros_like(z)
        step[where] = 1e-4
        slope = (y((z + step).detach()) - y((z - step).detach()))[where[0]] / 2e-4
        assert float(found[entry]) == pytest.approx(float(slope.detach() * z[where].detach()), rel=1e-3, abs=1e-6)


def test_the_curve_begins_with_the_reconstruction_and_ends_with_nothing(
    tmp_path: Path, middle_run: Path, middle_store: Path, plain_sae: Any, full_forward: Callable[..., Any],
    class_texts: Any,
) -> None:  # fmt: skip
    config, cpu = DeletionConfig(n=(1, 3, 64)), ModelOptions(device="cpu")
    found = delete_latents(middle_run, middle_store, tmp_path / "d.json", config, model=cpu)
    assert delete_latents(middle_run, middle_store, tmp_path / "d.json", config, model=cpu) == found
    store = ActivationStore.open(middle_store)
    uris = store.images["uri"].to_pylist()[71:]
    labels = sorted(set(store.images["label_name"].to_pylist()[71:]))
    texts = class_texts[[int(name[-1]) for name in labels]]
    predicted = (full_forward(uris) @ texts.T).argmax(1)

    def y(mask: Callable[[Any], Any]) -> float:
        embedded = full_forward(uris, lambda x: plain_sae.decode(mask(plain_sae.encode(x))).float())
        return float((embedded * texts[predicted]).sum(1).mean())

    rows = {(row.method, row.n): row for row in found.curve}
    assert {method for method, _ in rows} == set(METHODS)
    for method in METHODS:
        assert rows[method, 0].y == pytest.approx(y(lambda z: z), abs=1e-5)
        assert rows[method, 64].y == pytest.approx(y(torch.zeros_like), abs=1e-5)

    def without_loudest(z: Any) -> Any:
        loudest = z.sum(1).topk(3, dim=1).indices
        return z.scatter(2, loudest[:, None].expand(-1, z.shape[1], -1), 0.0)

    assert rows["activation", 3].y == pytest.approx(y(without_loudest), abs=1e-5)
    assert rows["energy", 3].y == pytest.approx(rows["activation", 3].y, abs=1e-5)  # rows have norm 1
    x = np.log1p([0, 1, 3, 64])
    curve = [rows["attribution", n].y for n in (0, 1, 3, 64)]
    assert found.areas["attribution"] == pytest.approx(np.trapezoid(curve, x) / x[-1])
    with pytest.raises(SettingsError, match="n must be at least 1"):
        delete_latents(middle_run, middle_store, None, DeletionConfig(n=(0,)))
