"""Published SAEs are read back bit for bit, whatever else lies in their folder, and damaged ones are refused."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file

from actcache import ActivationStore, HookPoint, PipelineError, SettingsError
from saetrain import SAE, Run, SAEConfig, convert
from saetrain.interop import PublishedSAE, PublishedTower, PublishedTraining, compare, encode_published, read_foreign
from saetrain.interop.publication import read_published
from saetrain.interop.saelens import write as write_saelens
from saetrain.interop.towers import name_tower

D = 12
SAES = {
    "topk": SAEConfig("topk", 20, 3), "batchtopk": SAEConfig("batchtopk", 20, 3), "relu": SAEConfig("relu", 20),
    "jumprelu": SAEConfig("jumprelu", 20, 3), "gated": SAEConfig("gated", 20, 3),
}  # fmt: skip
TOWER = PublishedTower(
    "abc", "ViT-B-16-quickgelu", "openai", preprocess={"size": [224, 224]}, grid=(14, 14), patch_size=(16, 16),
    prefix=("cls",), precision="float32",
)  # fmt: skip


def publish_sae(
    folder: Path, sae: SAE, tower: PublishedTower = TOWER, hook_point: str = "blocks.10.hook_resid_post"
) -> Path:
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in sae.state_dict().items()}, folder / "own")
    published = PublishedSAE(
        sae=sae.config, d_model=sae.d_model, hook_point=hook_point, run_id="0123456789abcdef",
        tower=tower, training=PublishedTraining("patch", ("rows",), 95), license="mit",
        quality={"patch": {"fvu": 0.25, "l0": 3.0, "cosine": 0.9}, "silent": 0.1, "dense": 0.0, "n_tokens": 80},
    )  # fmt: skip
    for name, data in encode_published(published, folder / "own").items():
        (folder / name).write_bytes(data)
    (folder / "own").unlink()
    assert read_published(folder) == published
    return folder


@pytest.mark.parametrize("mode", ["center", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("norms", [False, True], ids=["", "norms"])
@pytest.mark.parametrize("variant", SAES)
def test_it_is_read_back_bit_for_bit(
    tmp_path: Path, random_sae: Callable[..., SAE], variant: str, norms: bool, mode: str
) -> None:
    sae = random_sae(SAES[variant], D).requires_grad_(False)
    if mode != "center":  # each token by its own size, as SAEs of other packages may have it
        sae.config = dataclasses.replace(sae.config, normalize=mode)
    if variant == "batchtopk":
        sae.threshold.fill_(0.7)
    if variant == "gated":
        sae.log_scale.copy_(torch.linspace(-0.5, 0.5, 20))
        sae.b_mag.copy_(torch.linspace(-0.2, 0.2, 20))
    if norms:
        sae.norms = torch.linspace(0.5, 2, 20)
    folder, plain = publish_sae(tmp_path / "sae", sae), random_sae(SAES["topk"], D)
    for name, data in write_saelens(plain, HookPoint(10)).items():  # it is not taken for SAELens's
        (folder / name).write_bytes(data)
    foreign = read_foreign(folder)
    assert foreign.format == "published"
    assert foreign.sae.config == sae.config
    ours, theirs = sae.state_dict(), foreign.sae.state_dict()
    assert {name: value.numpy().tobytes() for name, value in ours.items()} == {
        name: value.numpy().tobytes() for name, value in theirs.items()
    }
    x = 2 * torch.randn(300, D, generator=torch.Generator().manual_seed(3))
    for one, other in zip(sae.encode(x), foreign.sae.encode(x), strict=True):
        assert torch.equal(one, other)
    parity = compare(foreign.sae, foreign.forward, x, "random")  # by formulas that share nothing with the reader
    assert parity.active_agreement == 1
    assert parity.max_reconstruction_difference < 1e-5


def test_a_published_run_becomes_a_run_again(tmp_path: Path, planted_run: Run, planted_store: Path) -> None:
    hook_point = str(planted_run.hook_point)
    folder = publish_sae(tmp_path / "sae", planted_run.sae(), PublishedTower("planted"), hook_point)
    assert convert(folder, tmp_path / "run", store=planted_store).format == "published"
    run = Run.open(tmp_path / "run")
    ours, theirs = load_file(planted_run.weights()), load_file(run.weights())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert run.sae_config == planted_run.sae_config
    x = torch.from_numpy(ActivationStore.open(planted_store).read(images=range(8, 12)).reshape(-1, 32)).float()
    assert all(map(torch.equal, run.sae().encode(x), planted_run.sae().encode(x)))


def test_activations_of_another_model_are_refused(tmp_path: Path, planted_run: Run, planted_store: Path) -> None:
    hook_point = str(planted_run.hook_point)
    folder = publish_sae(tmp_path / "sae", planted_run.sae(), PublishedTower("another"), hook_point)
    with pytest.raises(SettingsError, match=r"reads model another, but .* holds model planted: .*--any-model"):
        convert(folder, tmp_path / "run", store=planted_store)
    assert convert(folder, tmp_path / "run", store=planted_store, any_model=True).parity.holds


def test_it_names_its_tower(tmp_path: Path, random_sae: Callable[..., SAE]) -> None:
    folder = publish_sae(tmp_path / "sae", random_sae(SAES["topk"], D))
    hint = name_tower("published", folder)
    assert hint is not None
    assert (hint.model, hint.pretrained, str(hint.hook_point)) == (
        "ViT-B-16-quickgelu", "openai", "blocks.10.hook_resid_post",
    )  # fmt: skip
    assert (hint.tokens, hint.stated, hint.caution) == ("patch", True, "")
    files = PublishedTower("abc", model_file="tiny.json", weights_file="tiny.safetensors")
    other = name_tower("published", publish_sae(tmp_path / "other", random_sae(SAES["topk"], D), files))
    assert other is not None
    assert other.model is None
    assert other.files == ("tiny.json", "tiny.safetensors")


def test_the_header_of_the_weights_says_what_they_are(tmp_path: Path, random_sae: Callable[..., SAE]) -> None:
    folder = publish_sae(tmp_path / "sae", random_sae(SAES["topk"], D))
    data = (folder / "patchsae.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    about = json.loads(header["__metadata__"]["patchsae"])
    assert about["format"] == "patchsae-sae"
    assert about["hook_point"] == "blocks.10.hook_resid_post"
    assert about["tower"]["model"] == "ViT-B-16-quickgelu"


def edit(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | fields))


def replace_weights(folder: Path, **tensors: torch.Tensor) -> None:
    """Weights that config.json describes."""
    data = save(load_file(folder / "patchsae.safetensors") | tensors)
    (folder / "patchsae.safetensors").write_bytes(data)
    described = {"file": "patchsae.safetensors", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit(folder, weights=described)


def cut(folder: Path) -> None:
    file = folder / "patchsae.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def flip(folder: Path) -> None:
    data = bytearray((folder / "patchsae.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "patchsae.safetensors").write_bytes(data)


def with_setting(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    edit(folder, sae=config["sae"] | settings)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (cut, "is not the file that config.json describes"),
    "one bit": (flip, "is not the file that config.json describes"),
    "no weights": (lambda f: (f / "patchsae.safetensors").unlink(), "cannot be read"),
    "not finite": (lambda f: replace_weights(f, b_dec=torch.full((D,), np.nan)), "b_dec holds numbers that are not"),
    "scale": (lambda f: replace_weights(f, scale=torch.tensor(0.0)), "the scale of the input must be above 0"),
    "other shape": (lambda f: replace_weights(f, encoder=torch.zeros(20, 7)), "could not be read as an SAE"),
    "one more tensor": (lambda f: replace_weights(f, W_skip=torch.zeros(3)), "could not be read as an SAE"),
    "newer": (lambda f: edit(f, version=2), "Install a newer patchsae"),
    "a setting that is not known": (lambda f: with_setting(f, top_p=0.1), "Install a newer patchsae"),
    "k": (lambda f: with_setting(f, k=21), "k must lie in 1..20"),
    "variant": (lambda f: with_setting(f, variant="magic"), "--variant must be one of"),
    "n_latents": (lambda f: with_setting(f, n_latents=10**9), "could not be read as an SAE"),
    "hook point": (lambda f: edit(f, hook_point="../../etc"), "not a hook point"),
    "another file": (
        lambda f: edit(f, weights={"file": "../x.safetensors", "bytes": 1, "sha256": ""}), "weights.file should be"
    ),
    "a list": (lambda f: (f / "config.json").write_text('{"format": "patchsae-sae", "version": 1, "sae": []}'), "sae"),
    "preprocess": (lambda f: edit(f, tower={"model_id": "x", "preprocess": {"size": [0, 0]}}), "size"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_line(tmp_path: Path, random_sae: Callable[..., SAE], damage: str) -> None:
    folder = publish_sae(tmp_path / "sae", random_sae(SAES["topk"], D))
    make, message = DAMAGES[damage]
    make(folder)
    with pytest.raises(PipelineError) as refused:
        read_foreign(folder)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


def test_another_config_is_not_taken_for_ours(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"format": "else"}')
    with pytest.raises(PipelineError, match="not a known kind of checkpoint"):
        read_foreign(tmp_path)
