"""The folder in which the commands of a page of the documentation run: images, models, and what the page assumes.

    python page_world.py MODEL PRETRAINED FOLDER

Everything is real, as small as it can be, and has the name that the pages give it. MODEL and PRETRAINED are those of a
small CLIP, which takes the place of the published ones.
"""

import csv
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from timm_folders import write_tower

from actcache import PromptConfig, adapt, extract, write_store
from actcache.demo import MODEL, PRETRAINED, write_demo, write_pairs
from analysis import AnalyzeConfig, ComparisonConfig, MaskingConfig, analyze, compare, mask_latents
from saetrain import SAEConfig, TrainConfig, convert, encode, sweep, train

CLASSES = ("cat", "dog", "frog", "hen", "ship", "truck")
SIDE, N_TOKENS, D_MODEL = 24, 10, 32
SAE = SAEConfig("topk", 64, 4)
TRAINING = TrainConfig(n_steps=40, batch_size=128, lr=3e-3, dead_tokens=20_000)
CLIP = {"model": "model/tiny.json", "pretrained": "model/tiny.safetensors"}


def main(model: str, pretrained: str, folder: str) -> None:
    Path(folder).mkdir()
    os.chdir(folder)
    write_models(model, pretrained)
    write_photos("photos", 12, masks="masks")
    for number, (name, n) in enumerate(
        {"train-photos": 20, "test-photos": 8, "sketches": 8, "new-photos": 2}.items(), 1
    ):
        write_photos(name, n, first=100 * number)
    os.unlink("new-photos/metadata.csv")  # a page copies them to the others
    write_tables()
    write_stores()
    write_runs()
    write_adaptation()
    write_planted()
    write_quickstart()


def write_models(model: str, pretrained: str) -> None:
    """The small CLIP: alone, as a folder of open_clip, and as an epoch of its training. And two towers of timm."""
    os.makedirs("model")
    shutil.copy(model, CLIP["model"])
    shutil.copy(pretrained, CLIP["pretrained"])
    os.makedirs("downloads/my-clip")
    config = {"model_cfg": json.loads(Path(model).read_text()), "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    Path("downloads/my-clip/open_clip_config.json").write_text(json.dumps(config))
    shutil.copy(pretrained, "downloads/my-clip/open_clip_model.safetensors")
    os.makedirs("logs/my-run/checkpoints")
    weights = {f"module.{name}": value for name, value in load_file(pretrained).items()}
    epoch = {"epoch": 32, "name": "my-run", "state_dict": weights, "optimizer": {"state": {}, "param_groups": []}}
    torch.save(epoch, "logs/my-run/checkpoints/epoch_32.pt")
    for name in ("model/dinov2", "my-dinov2"):
        write_tower(Path(name), "vit_base_patch14_reg4_dinov2", {})
    write_tower(Path("model/siglip"), "vit_base_patch16_siglip_224", {})


def write_photos(folder: str, n: int, first: int = 0, masks: str = "") -> None:
    """JPEGs in class folders, n of each: noise around a color of the class, and a square that the pixel mask shows.

    metadata.csv has a row for each, with a split, a domain and a year.
    """
    rng = np.random.default_rng(first)
    colors = np.random.default_rng(0).integers(40, 215, (len(CLASSES), 3))
    rows = []
    for label, name in enumerate(CLASSES):
        os.makedirs(f"{folder}/{name}")
        for i in range(first, first + n):
            pixels = colors[label] + rng.normal(0, 20, (SIDE, SIDE, 3))
            top, left = rng.integers(0, 2, 2) * 8
            pixels[top : top + 16, left : left + 16, label % 3] = 250
            file = f"{name}/{i:04d}.jpg"
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(f"{folder}/{file}", quality=95)
            rows.append(
                (file, name, ("test", "train", "train")[i % 3], ("photo", "sketch")[i % 2], 1900 + 7 * (i % 12))
            )
            if masks:
                mask = np.zeros((SIDE, SIDE), np.uint8)
                mask[top : top + 16, left : left + 16] = label + 1
                os.makedirs(f"{masks}/{name}", exist_ok=True)
                Image.fromarray(mask).save(f"{masks}/{name}/{i:04d}.png")
    write_csv(f"{folder}/metadata.csv", ("path", "label", "split", "domain", "year"), rows)


def write_csv(path: str, head: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([head, *rows])


def write_tables() -> None:
    """What the numbers in the masks mean, pairs of images, groups of classes, words, and two photographs."""
    for name in ("legend.csv", "classes.csv"):
        write_csv(name, ("number", "name"), list(enumerate(CLASSES, 1)))
    pairs = [(f"dog/{i:04d}.jpg", f"cat/{i:04d}.jpg", "dog", "cat") for i in range(12)]
    write_csv("pairs.csv", ("before", "after", "removed", "added"), pairs)
    Path("groups.json").write_text(json.dumps({"animals": CLASSES[:4], "vehicles": CLASSES[4:]}))
    Path("words.txt").write_text("\n".join((*CLASSES, "red", "green", "sky", "grass")))
    for name in ("dog", "cat"):
        shutil.copy(f"photos/{name}/0001.jpg", f"{name}.jpg")


def write_stores() -> None:
    for store, folder in {
        "train": "train-photos",
        "val": "photos",
        "sketches": "sketches",
        "eurosat": "sketches",
    }.items():
        extract(f"{folder}/metadata.csv", f"{store}.acts", **CLIP, layers=[1], shard_images=64)
    extract("test-photos", "test.acts", **CLIP, layers=[1], shard_images=64)
    extract("photos/metadata.csv", "dinov2.acts", model="local-dir:model/dinov2", layers=[1], shard_images=64)
    np.save("layer10.npy", np.random.default_rng(3).normal(size=(72, N_TOKENS, D_MODEL)).astype(np.float32))


def write_runs() -> None:
    run = train("train.acts", "runs/l10", sae=SAE, config=TRAINING)
    seeds = [TrainConfig(**{**vars(TRAINING), "seed": seed}) for seed in (0, 1, 2)]
    sweep("train.acts", "runs", [(None, SAEConfig("topk", 64, 5), config) for config in seeds])
    train("train.acts", "relu", sae=SAEConfig("relu", 64), config=TRAINING)
    convert("relu", "patchsae", to="patchsae", store="val.acts")
    shutil.rmtree("relu")
    for name in ("train", "val", "test"):
        codes = encode(run, f"{name}.acts", f"{name}.codes")
        if name != "test":
            analyze(codes, f"{name}.concepts", config=AnalyzeConfig(n_gallery=4))
    mask_latents(run, "val.acts", "masks.json", MaskingConfig(k=(1, 5), n_random=1))


def write_adaptation() -> None:
    config = PromptConfig(method="maple", n_prompts=2, depth=2, shots=2, n_epochs=1)
    adapt("photos", "maple.prompts", **CLIP, config=config)
    extract("test-photos", "maple.acts", **CLIP, layers=[1], shard_images=64, prompts="maple.prompts")
    shutil.copytree("test.acts", "base.acts")
    for name in ("base", "maple"):
        codes = encode("runs/l10", f"{name}.acts", f"{name}.codes")
        analyze(codes, f"{name}.concepts", config=AnalyzeConfig(n_gallery=4))
    compare("base.concepts", "maple.concepts", "comparison.json", ComparisonConfig(k=(1, 5), n_random=1))


def write_planted() -> None:
    """Activations that are sums of known atoms, and an SAE of them."""
    rng = np.random.default_rng(5)
    atoms = rng.normal(size=(12, 16)).astype(np.float32)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    np.save("atoms.npy", atoms)
    amounts = rng.uniform(1, 3, (160, 9, 12)) * (rng.random((160, 9, 12)) < 0.15)
    x = (amounts @ atoms).astype(np.float32)
    with write_store(
        "planted.acts", n_images=160, n_tokens=9, d_model=16, layers=[1], model_name="planted", source="atoms"
    ) as writer:
        for rows in writer:
            writer.write(x[rows])
    train("planted.acts", "planted-run", sae=SAEConfig("topk", 24, 3), config=TRAINING)


def write_quickstart() -> None:
    """The part of what `quickstart` writes that pages read."""
    out = Path("quickstart")
    scenes = [write_demo(out / name, n_images=40, seed=seed) for seed, name in enumerate(("scenes", "unseen-scenes"))]
    for truth, name in zip(
        (*scenes, write_pairs(out / "paired-scenes", n_pairs=20)), ("scenes", "unseen", "pairs"), strict=True
    ):
        extract(
            truth.path / "images", out / f"{name}.acts", model=MODEL, pretrained=PRETRAINED, layers=[3],
            masks=truth.path / "objects", shard_images=64,
        )  # fmt: skip
    run = train(out / "scenes.acts", out / "run", sae=SAEConfig("batchtopk", 64, 4), config=TRAINING)
    encode(run, out / "unseen.acts", out / "unseen.codes")


if __name__ == "__main__":
    main(*sys.argv[1:])
