"""The whole path with real towers whose stream does not begin with CLS alone: timm's, with random weights in a folder.

The reference is timm's own blocks in their order. In each image one patch is lit, so it is known where it must appear.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from timm_folders import PATCH, SIDE, model_of, write_tower
from torch import Tensor, nn
from typer.testing import CliRunner

import cli
from actcache import ActivationStore, CorruptError, ModelError, SettingsError, extract, open_stores, repair, verify
from actcache.models import VisionTower
from actcache.prompts import open_towers

GRID = (SIDE // PATCH, SIDE // PATCH)
CORNERS = ((0, 0), (0, 4), (4, 0), (4, 4))
TOWERS: dict[str, tuple[tuple[str, ...], str, dict[str, Any]]] = {
    "registers": (("cls", "reg", "reg", "reg", "reg"), "vit_small_patch14_reg4_dinov2", {}),
    "average": ((), "vit_small_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "map": ((), "vit_base_patch16_siglip_224", {}),
    "register alone": (("reg",), "vit_betwixt_patch16_reg1_gap_256", {}),
    "distilled": (("cls", "dist"), "deit_tiny_distilled_patch16_224", {}),
}


class Made(NamedTuple):
    prefix: tuple[str, ...]
    model: nn.Module
    folder: Path  # of images/, model/ and x.acts

    @property
    def n_cls(self) -> int:
        return self.prefix.count("cls")

    @property
    def store(self) -> Path:
        return self.folder / "x.acts"


@pytest.fixture(scope="module")
def lit_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 gray images in two classes; in image i, patch i % 25 is lit, with noise everywhere."""
    folder, rng = tmp_path_factory.mktemp("lit") / "images", np.random.default_rng(0)
    for i in range(100):
        pixels = rng.normal(110, 6, (SIDE, SIDE, 3))
        row, column = divmod(i % 25, 5)
        pixels[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] += 100
        pixels[..., i // 25 % 2] += 20
        path = folder / f"class{i // 25 % 2}" / f"{i:03d}-{row}-{column}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)
    return folder


WANTED: dict[str, Any] = {"layers": [0, 1, 2], "shard_images": 48, "precision": "float32", "dtype": "float32"}


@pytest.fixture(scope="module", params=TOWERS)
def made(request: pytest.FixtureRequest, lit_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    prefix, name, options = TOWERS[request.param]
    folder = tmp_path_factory.mktemp("made")
    model = write_tower(folder / "model", name, options)
    extract(lit_images, folder / "x.acts", model=model_of(folder), **WANTED)
    return Made(prefix, model, folder)


@torch.no_grad()
def reference(made: Made, layer: int) -> Tensor:
    """[I, T, D] in stored order, by timm's own code and plain PIL."""
    store = ActivationStore.open(made.store)
    folder = store.artifact.parent_path("images")
    images = [np.asarray(Image.open(folder / uri), np.float32) for uri in store.images["uri"].to_pylist()]
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
    x = (x - 0.5) / 0.25
    body: Any = made.model
    values = body.patch_embed(x)
    values = body.norm_pre(body.patch_drop(body._pos_embed(values)))
    for block in body.blocks[: layer + 1]:
        values = block(values)
    return values


def test_every_token_is_stored_where_the_prefix_says(made: Made) -> None:
    store = ActivationStore.open(made.store)
    assert (store.settings.prefix, store.layout.grid, store.settings.patch_size) == (made.prefix, GRID, (PATCH, PATCH))
    for layer in (0, 2):
        wanted = reference(made, layer).numpy()
        first = len(made.prefix)
        np.testing.assert_allclose(store.read_stream(layer), wanted, atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(store.read(layer, tokens="patch"), wanted[:, first:], atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(store.read_registers(layer), wanted[:, made.n_cls : first], atol=1e-4, rtol=1e-4)
        if made.n_cls:
            np.testing.assert_allclose(store.read(layer, tokens="cls")[:, 0], wanted[:, 0], atol=1e-4, rtol=1e-4)
        else:
            with pytest.raises(SettingsError, match="has none"):
                store.read(layer, tokens="cls")
    assert verify(made.store).ok


def test_the_lit_patch_is_the_one_that_stands_out(made: Made) -> None:
    store = ActivationStore.open(made.store)
    patches = store.read(0, tokens="patch").astype(np.float64)
    strength = np.square(patches - np.median(patches, axis=0)).sum(2).argmax(1)
    places = [tuple(map(int, Path(uri).stem.split("-")[1:])) for uri in store.images["uri"].to_pylist()]
    assert [divmod(int(patch), GRID[1]) for patch in strength] == places
    assert set(CORNERS) <= set(places)


def test_the_rest_of_the_tower_runs_from_what_is_stored(made: Made) -> None:
    store = open_stores(made.store)
    vision = open_towers(store.stores[0].artifact, device="cpu").vision
    assert (vision.prefix, vision.n_extra) == (made.prefix, 0)
    with torch.no_grad():
        head = vision.head(vision.run_blocks(torch.from_numpy(store.read_stream(0)), 1, 3))
        wanted = made.model.forward_head(made.model.norm(reference(made, 2)))  # type: ignore[operator]
    if isinstance(wanted, tuple):
        wanted = sum(wanted) / 2
    np.testing.assert_allclose(head.numpy(), wanted.numpy(), atol=1e-3, rtol=1e-3)


def test_a_damaged_store_is_repaired_to_the_same_bytes(made: Made) -> None:
    array = "registers" if len(made.prefix) > made.n_cls else "patches"
    shard = made.store / "activations.zarr" / "blocks.1.hook_resid_post" / array / "c" / "1" / "0" / "0"
    before = shard.read_bytes()
    data = bytearray(before)
    data[100] ^= 1
    shard.write_bytes(data)
    assert verify(made.store).shards == (1,)
    with pytest.raises(CorruptError, match=rf"Shard 1 .*{array}"):
        open_stores(made.store).read_stream(1, check=True)
    assert repair(made.store).ok
    assert shard.read_bytes() == before


def ask(command: str) -> dict[str, Any]:
    done = CliRunner().invoke(cli.app, ["--quiet", "--json", *command.split()])
    assert done.exit_code == 0, (command, done.output, done.exception)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.fixture(scope="module")
def explained(made: Made) -> Made:
    """The store with a run, its codes and its concepts."""
    folder, kind = made.folder, "all" if made.n_cls else "patch"
    trained = ask(f"train {folder}/x.acts {folder}/run --layer 1 --n-latents 64 --k 4 --n-steps 40 --batch-size 256")
    assert trained["quality"][kind]["fvu"] < 1
    check_codes(made, "x")
    return made


def check_codes(made: Made, name: str) -> None:
    """Encode a store and analyze its codes."""
    path = made.folder / name
    assert ask(f"encode {made.folder}/run {path}.acts {path}.codes")["n_entries"] > 0
    assert ask(f"analyze {path}.codes {path}.concepts")["n_tokens"] == 100 * (25 + made.n_cls)


def test_every_verb_takes_it(explained: Made) -> None:
    made, folder = explained, explained.folder
    kind, judged = "all" if made.n_cls else "patch", "--judge probe --on-seen use"
    run, store = folder / "run", folder / "x.acts"
    assert ask(f"report {folder}/x.concepts {folder}/page.html")["bytes"] > 1000
    assert ask(f"evaluate {run} {store} {folder}/f.json {judged}")["runs"][0]["tokens"] == kind
    assert ask(f"intervene {run} {store} {folder}/m.json {judged} --k 2 --n-random 1")["tokens"] == kind
    assert len(ask(f"attribute {run} {store} {folder}/a.json {judged} --n 2")["curve"]) == 5 * 2
    steered = ask(f"steer {run} {store} {folder}/s.json {judged} --n-latents 2 --strength 5 --limit 8")
    assert len(steered["rows"]) == 2 * 2
    assert tuple(ask(f"info {store}").get("prefix", ["cls"])) == made.prefix


@pytest.mark.parametrize("made", ["registers", "average"], indirect=True)
def test_an_adapted_model_without_texts_is_compared_by_probes(explained: Made, lit_images: Path) -> None:
    folder, model = explained.folder, model_of(explained.folder)
    adapted = ask(
        f"adapt {lit_images} {folder}/vpt.prompts --model {model} --method vpt --shots 4 --n-epochs 3 --depth 2 "
        "--n-prompts 3 --lr 0.1 --precision float32"
    )
    assert adapted["judge"] == "class means"
    layers = " ".join(f"--layer {layer}" for layer in WANTED["layers"])
    ask(
        f"extract {lit_images} {folder}/vpt.acts --model {model} --prompts {folder}/vpt.prompts {layers} "
        "--shard-images 48 --precision float32 --dtype float32"
    )
    check_codes(explained, "vpt")
    compared = ask(
        f"compare {folder}/x.concepts {folder}/vpt.concepts {folder}/c.json --judge probe --k 2 --n-top 2 --n-random 1 "
        "--on-seen use"
    )
    assert compared["seen"][0]["by"] == "run run, prompts vpt.prompts, probe"


def test_a_grid_that_the_tower_does_not_make_is_refused_before_anything_is_written(
    lit_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tower(tmp_path / "model", TOWERS["average"][1], TOWERS["average"][2])
    monkeypatch.setattr(VisionTower, "grid", property(lambda tower: (5, 6)))
    with pytest.raises(ModelError, match=r"makes 25 tokens of width 32 .* 5 x 6 patches"):
        extract(lit_images, tmp_path / "x.acts", model=model_of(tmp_path), **WANTED)
    assert not (tmp_path / "x.acts").exists()


def test_a_site_that_the_tower_lacks_is_refused_before_anything_is_written(lit_images: Path, tmp_path: Path) -> None:
    write_tower(tmp_path / "model", "vit_dpwee_patch16_reg1_gap_256", {})
    with pytest.raises(SettingsError, match=r"has no attn_out: its blocks have resid_post\. Choose --site"):
        extract(lit_images, tmp_path / "x.acts", model=model_of(tmp_path), sites=["attn_out"], **WANTED)
    assert not (tmp_path / "x.acts").exists()
