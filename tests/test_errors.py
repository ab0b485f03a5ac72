"""Every public error is raised by a real call, and its text names what was wrong and what to do."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import actcache.errors
from actcache import ActivationStore, PipelineError, extract, verify
from analysis import analyze, query_class, query_image, query_latent
from saetrain import CodeStore, SAEConfig, TrainConfig, convert, encode, train


def everything() -> set[type[PipelineError]]:
    return {
        value
        for value in vars(actcache.errors).values()
        if isinstance(value, type) and issubclass(value, PipelineError) and value is not PipelineError
    }


class Scene:
    """The artifacts a failing call is made on."""

    def __init__(self, tmp: Path, images: Path, model: dict[str, str], store: Path, run: Path, codes: Path) -> None:
        self.tmp, self.images, self.model, self.store, self.run, self.codes = tmp, images, model, store, run, codes

    def copy(self, path: Path) -> Path:
        return Path(shutil.copytree(path, self.tmp / path.name))


@pytest.fixture
def scene(
    tmp_path: Path, tiny_images: Path, tiny_model: dict[str, str], tiny_store: Path, tiny_run: Path, tiny_codes: Path
) -> Scene:
    return Scene(tmp_path, tiny_images, tiny_model, tiny_store, tiny_run, tiny_codes)


def other_settings(s: Scene) -> None:
    train(s.store, s.copy(s.run), layer=2, sae=SAEConfig(n_latents=64, k=5), config=TrainConfig(batch_size=128))


def missing_layer(s: Scene) -> None:
    extract(s.images, s.tmp / "x.acts", **s.model, layers=[3])


def empty_folder(s: Scene) -> None:
    (s.tmp / "empty").mkdir()
    extract(s.tmp / "empty", s.tmp / "x.acts", **s.model, layers=[0])


def unknown_tag(s: Scene) -> None:
    extract(s.images, s.tmp / "x.acts", model="ViT-B-32", pretrained="laion2b_s34b_b79", layers=[0])


def truncated_checkpoint(s: Scene) -> None:
    short = s.tmp / "short.safetensors"
    short.write_bytes(Path(s.model["pretrained"]).read_bytes()[:100_000])
    extract(s.images, s.tmp / "x.acts", model=s.model["model"], pretrained=str(short), layers=[0])


def no_network(s: Scene) -> None:
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)  # what HF_HUB_OFFLINE=1 sets at import
        convert("hf://lab/never-cached", s.tmp / "run", store=s.store)


def overflow(s: Scene) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(s.model["pretrained"])
    weights["visual.transformer.resblocks.0.mlp.c_proj.bias"] += 1e5
    save_file(weights, s.tmp / "huge.safetensors")
    extract(s.images, s.tmp / "x.acts", model=s.model["model"], pretrained=str(s.tmp / "huge.safetensors"), layers=[0])


def nothing_there(s: Scene) -> None:
    train(s.tmp / "nowhere.acts", s.tmp / "run")


def wrong_kind(s: Scene) -> None:
    ActivationStore.open(s.run)


def newer_schema(s: Scene) -> None:
    store = s.copy(s.store)
    value = json.loads((store / "artifact.json").read_text())
    (store / "artifact.json").write_text(json.dumps(value | {"schema": 99}))
    verify(store)


def incomplete_store(s: Scene) -> None:
    store = s.copy(s.store)
    (store / "manifest.json").unlink()
    (store / "commits" / "000002.json").unlink()
    train(store, s.tmp / "run")


def work_of_others(s: Scene) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "0")
        patch.setenv("WORLD_SIZE", "2")
        encode(s.run, s.store, s.tmp / "x.codes")


def other_model(s: Scene) -> None:
    model = {"model": s.model["model"], "pretrained": "random:7"}
    extract(s.images, s.tmp / "other.acts", **model, layers=[2])
    encode(s.run, s.tmp / "other.acts", s.tmp / "x.codes")


def other_store(s: Scene) -> None:
    extract(s.images, s.tmp / "other.acts", **s.model, layers=[2], limit=32)
    analyze(s.codes, s.tmp / "x.concepts", store=s.tmp / "other.acts")


def full_disk(s: Scene) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", refuse)
        extract(s.images, s.tmp / "x.acts", **s.model, layers=[0])


def damaged_shard(s: Scene) -> None:
    store = s.copy(s.store)
    shard = next((store / "activations.zarr" / "blocks.2.hook_resid_post" / "patches" / "c").glob("1/*/*"))
    shard.write_bytes(shard.read_bytes()[:-5])
    encode(s.run, store, s.tmp / "x.codes")


CASES: list[tuple[str, Callable[[Scene], object], list[str]]] = [
    ("SettingsError", other_settings, ["sae.k: 4 there, 5 asked for", "--overwrite"]),
    ("SettingsError", missing_layer, ["no layer 3", "0..2", "--layer"]),
    ("SettingsError", lambda s: train(s.store, s.tmp / "r", layer=1), ["blocks.1", "Stored: blocks.0", "--layer"]),
    ("SettingsError", lambda s: train(s.store, s.tmp / "r"), ["several hook points", "--layer"]),
    ("SettingsError", lambda s: query_latent(CodeStore.open(s.codes), 64), ["0..63", "64"]),
    ("SettingsError", lambda s: query_image(CodeStore.open(s.codes), "no.png"), ["no.png", "0..74"]),
    ("SettingsError", lambda s: query_class(CodeStore.open(s.codes), "cow"), ["cow", "class0, class1, class2"]),
    ("ImageSourceError", empty_folder, ["holds no images", ".png"]),
    ("ModelError", unknown_tag, ["laion2b_s34b_b79", "Near: laion2b_s34b_b79k", "random:SEED"]),
    ("ModelError", truncated_checkpoint, ["short.safetensors", "complete"]),
    ("HubError", no_network, ["hf://lab/never-cached", "HF_HUB_OFFLINE", "cache"]),
    ("NonFiniteError", overflow, ["hook_resid_post", ".png", "--dtype float32"]),
    ("ArtifactNotFoundError", nothing_there, ["nowhere.acts", "does not exist"]),
    ("SchemaError", wrong_kind, ["is a run", "an activation store"]),
    ("SchemaError", newer_schema, ["schema 99", "newer patchsae"]),
    ("IncompleteError", incomplete_store, ["1 of 5 shards", "extract"]),
    ("OthersUnfinishedError", work_of_others, ["Worker 0 of 2 is done", "2 of 5 shards", "same command"]),
    ("ParentMismatchError", other_model, ["model", "same CLIP weights"]),
    ("ParentMismatchError", other_store, ["made from store", "Give the store"]),
    ("CorruptError", damaged_shard, ["Shard 1", "bytes, expected", "verify", "--repair"]),
    ("StorageError", full_disk, ["No space left on device", "Free space", "resumes"]),
]


@pytest.mark.parametrize(
    ("name", "call", "words"), CASES, ids=[f"{n}-{c.__name__}-{i}" for i, (n, c, _) in enumerate(CASES)]
)
def test_a_wrong_call_is_told_what_to_do(
    scene: Scene, name: str, call: Callable[[Scene], object], words: list[str]
) -> None:
    before = {file for file in scene.store.rglob("*") if file.is_file()}
    with pytest.raises(getattr(actcache.errors, name)) as caught:
        call(scene)
    text = str(caught.value)
    assert type(caught.value).__name__ == name
    for word in words:
        assert word in text, text
    assert "\n" not in text
    assert {file for file in scene.store.rglob("*") if file.is_file()} == before


def test_every_public_error_has_a_case() -> None:
    assert {name for name, _, _ in CASES} == {error.__name__ for error in everything()}
