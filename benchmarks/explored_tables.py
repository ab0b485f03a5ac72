"""The concept tables that bench_explore.py opens: a large one of synthetic codes, and a small one of a whole CLIP.

What has been made is found again in the folder.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
from bench_intervene import make_images
from bench_query import write_codes
from PIL import Image

from actcache import extract
from actcache.preprocess import Preprocess
from analysis import ConceptTable, analyze
from analysis.explore.coherence import make_coherence
from analysis.explore.maps import MAP_FILE
from analysis.naming import write_beside_seal
from analysis.naming.files import write_name_table
from saetrain import Run, SAEConfig, TrainConfig, encode, train

N_PICTURES = 500
"""Different pictures; the images of the table repeat them, each in a file of its own."""


def make_table(folder: Path, given: argparse.Namespace) -> Path:
    """The large table: codes, pictures, a run of untrained weights, and all that the explorer makes once."""
    made = folder / f"table-{given.images}-{given.n_latents}-{given.shards}"
    images, table = made / "images", made / "large.concepts"
    if not (made / "done").exists():
        write_pictures(images, given.images, given.classes, given.pixels)
        run = make_run(made, given)
        codes = write_codes(
            made / "large.codes", n_images=given.images, grid=given.grid, n_latents=given.n_latents, l0=given.l0,
            n_shards=given.shards, n_classes=given.classes, run=run.artifact, images=images,
            preprocess=Preprocess(size=(given.pixels, given.pixels)).to_json(),
        )  # fmt: skip
        concepts = analyze(codes, table)
        draw_map(concepts, run)
        give_names(concepts)
        make_coherence(concepts, codes)
        (made / "done").touch()
    return table


def write_pictures(folder: Path, n: int, n_classes: int, pixels: int) -> None:
    """A JPEG for each image of `write_codes`: smooth noise, of which N_PICTURES differ."""
    rng = np.random.default_rng(0)
    first: list[Path] = []
    for i in range(n):
        path = folder / f"class{i % n_classes:03d}" / f"{i:08d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i < N_PICTURES:
            coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8))
            coarse.resize((pixels * 5 // 4, pixels), Image.Resampling.BICUBIC).save(path, quality=90)
            first.append(path)
        else:
            shutil.copyfile(first[i % N_PICTURES], path)


def make_run(folder: Path, given: argparse.Namespace) -> Run:
    """An SAE of the table's width, trained for one step on a few images of noise."""
    make_images(folder / "few", 8, 32)
    config = folder / "tiny.json"
    config.write_text(json.dumps({
        "embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 1, "width": given.d_model, "patch_size": 16,
                                        "head_width": min(64, given.d_model)},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
    }))  # fmt: skip
    store = extract(folder / "few", folder / "few.acts", model=str(config), pretrained="random:0", layers=[0])
    sae = SAEConfig("topk", given.n_latents, min(given.l0, given.n_latents))
    return train(store, folder / "run", sae=sae, config=TrainConfig(n_steps=1, batch_size=32))


def draw_map(concepts: ConceptTable, run: Run) -> None:
    """Random places in place of openTSNE's, which take ten minutes and cost a page the same."""
    places = np.random.default_rng(0).normal(size=(2, concepts.table.num_rows)).astype(np.float32)
    facts = {"map": json.dumps({"run_id": run.run_id, "method": "random"})}
    write_beside_seal(concepts, MAP_FILE, pa.table(dict(zip("xy", places, strict=True))).replace_schema_metadata(facts))


def give_names(concepts: ConceptTable) -> None:
    """A name for every latent that fires, as `name` writes them, made of two words."""
    rng = np.random.default_rng(0)
    latent = np.flatnonzero(np.asarray(concepts.table["n_tokens"]))
    words = rng.integers(0, 500, (len(latent), 2))
    scores = {name: rng.random(len(latent)) for name in ("alignment", "cosine", "clarity", "redundancy")}
    names = {
        "latent": latent,
        "method": ["images"] * len(latent),
        "name": [f"word{a:03d} word{b:03d}" for a, b in words],
    }
    write_name_table(concepts, pa.table({**names, **scores}), {"template": "{}"})


def make_small(folder: Path, given: argparse.Namespace, layer: int) -> Path:
    """A table of a few images by a whole CLIP, whose store is there, so that latents can be changed."""
    made = folder / f"small-{Path(given.model).stem}-{given.n_latents}"
    make_images(made / "images", 16, given.pixels)
    store = extract(
        made / "images", made / "x.acts", model=given.model, pretrained=given.pretrained, layers=sorted(given.layers)
    )
    sae = SAEConfig("topk", given.n_latents, min(given.l0, given.n_latents))
    run = train(store, made / f"run{layer}", layer=layer, sae=sae, config=TrainConfig(n_steps=3, batch_size=64))
    codes = encode(run, store, made / f"{layer}.codes")
    return analyze(codes, made / f"{layer}.concepts").path
