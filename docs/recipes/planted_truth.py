"""What `benchmark` measures where the truth is known: activations that are sums of known atoms, one for each concept.

    python docs/recipes/planted_truth.py OUT

The scenes are those of the demo that have one object. A patch's activation is the sum of the atoms of the concepts that
cover at least a quarter of it, each times its share of the patch and a random gain, plus noise. Three dictionaries are
compared: one whose latents are the concepts ("planted"), one that was trained on these activations ("trained"), and the
untrained SAE that every benchmark makes. The same is measured with labels, masks and pairs that belong to other images,
where every dictionary must be at chance. It takes a minute.
"""

import csv
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image

from actcache import ActivationStore, HookPoint, extract, open_stores, write_store
from actcache.demo import MODEL, PRETRAINED, Truth, read_truth, write_demo, write_pairs
from analysis import BenchmarkConfig, benchmark_runs
from analysis.results import Benchmark
from saetrain import Run, SAEConfig, TrainConfig, train
from saetrain.interop import write_imported
from saetrain.model import SAE

LAYER, D_MODEL, PATCH = 0, 48, 8
NOISE = 0.02
LEAST_SHARE = 0.25
THRESHOLD = 0.16
"""Of the planted latents: above the noise, and below the least share at the least gain."""
TRAINED = SAEConfig("batchtopk", n_latents=64, k=2)
N_STEPS = 400
SEEDS = (0, 1)
ATOMS = 101
"""Seed of the atoms."""


def main(out: Path) -> None:
    print_table(*measure(make_world(out), out))


class Told(NamedTuple):
    """Activations to judge on, with the labels, masks and pairs that the benchmark is told."""

    store: ActivationStore
    config: BenchmarkConfig


class World(NamedTuple):
    """Activations to train on, and others to judge on: with their truth, and with that of other images."""

    train: ActivationStore
    true: Told
    shuffled: Told


def make_world(out: Path, n_images: int = 1500, n_pairs: int = 400) -> World:
    """Generate the scenes, and write what they would be to a model that knows their concepts.

    The demo's CLIP, which saw the images, says how alike they are.
    """
    scenes = write_demo(out / "scenes", n_images=n_images)
    second = write_demo(out / "second-scenes", n_images=n_images // 5, seed=1)
    pairs = write_pairs(out / "paired-scenes", n_pairs=n_pairs)
    wrong = shuffle_truth(pairs, out / "shuffled-scenes")
    train = write_activations(scenes, scenes, out / "train.acts")
    write_activations(second, second, out / "second.acts")
    world = World(train, tell(pairs, pairs, out / "true.acts"), tell(pairs, wrong, out / "shuffled.acts"))
    extract(out / "tables" / "true.csv", out / "clip.acts", model=MODEL, pretrained=PRETRAINED, layers=[3])
    return world


def tell(truth: Truth, told: Truth, out: Path) -> Told:
    store = write_activations(truth, told, out)
    stored, pairs = set(store.images["uri"].to_pylist()), out.parent / "tables" / f"{out.stem}-pairs.csv"
    with open(told.path / "pairs.csv", newline="") as source, open(pairs, "w", newline="") as file:
        header, *rows = csv.reader(source)
        csv.writer(file).writerows([header, *(row for row in rows if stored.issuperset(row[:2]))])
    second, clip = str(out.parent / "second.acts"), str(out.parent / "clip.acts")
    legend = told.path / "truth.parquet"
    return Told(store, BenchmarkConfig(legend=legend, pairs=pairs, transfer=second, embeddings=clip))


def single_objects(truth: Truth) -> list[int]:
    """The scenes with one object, in which every concept belongs to the whole image."""
    return [i for i, carriers in enumerate(truth.carriers) if max(n for numbers in carriers for n in numbers) == 1]


def shuffle_truth(truth: Truth, out: Path) -> Truth:
    """Give each scene with one object the attributes and the object map of another, and each pair those of another."""
    rng, single = np.random.default_rng(7), np.array(single_objects(truth))
    other = np.arange(len(truth.uris))
    other[single] = rng.permutation(single)
    for uri, of in zip(truth.uris, other.tolist(), strict=True):
        (out / "objects" / uri).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(truth.path / "objects" / truth.uris[of], out / "objects" / uri)
    table = pq.read_table(truth.path / "truth.parquet")
    pq.write_table(table.take(pa.array(other)).set_column(0, "uri", table["uri"]), out / "truth.parquet")
    with open(truth.path / "pairs.csv", newline="") as file:
        header, *rows = csv.reader(file)
    with open(out / "pairs.csv", "w", newline="") as file:
        wrong = [rows[i][2:] for i in rng.permutation(len(rows)).tolist()]
        csv.writer(file).writerows([header, *([*row[:2], *of] for row, of in zip(rows, wrong, strict=True))])
    return read_truth(out)


def atoms(n_concepts: int) -> NDArray[np.float64]:
    """[C, D] unit rows in random directions: independent, but not orthogonal."""
    rows = np.random.default_rng(ATOMS).normal(size=(n_concepts, D_MODEL))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def write_activations(truth: Truth, told: Truth, out: Path) -> ActivationStore:
    """The activations of the scenes with one object.

    Args:
        told: where the label (the shape of the object) and the masks come from.
    """
    single, table = single_objects(truth), out.parent / "tables" / f"{out.stem}.csv"
    table.parent.mkdir(exist_ok=True)
    shapes = {c: name.split(":")[1] for c, name in enumerate(truth.names) if name.startswith("shape:")}
    with open(table, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("path", "label"))
        for i in single:
            label = next(word for c, word in shapes.items() if told.present[i, c])
            rows.writerow(((truth.path / "images" / truth.uris[i]).absolute(), label))
    made = write_store(
        out, images=table, masks=told.path / "objects", layers=[LAYER], model_name="planted", prefix="none",
        n_tokens=(64 // PATCH) ** 2, d_model=D_MODEL, source=f"atoms of seed {ATOMS}, {out.stem}",
    )  # fmt: skip
    directions = atoms(len(truth.names))
    with made as writer:
        for places in writer:
            writer.write(np.stack([activate(truth, single[place], directions) for place in places.tolist()]))
    return writer.store


def activate(truth: Truth, image: int, rows: NDArray[np.float64]) -> NDArray[np.float32]:
    """[P, D] of an image."""
    share = cover(truth, image)
    rng = np.random.default_rng((image, 3))
    code = np.where(share >= LEAST_SHARE, share * rng.uniform(0.8, 1.2, share.shape), 0)
    return (code @ rows + rng.normal(0, NOISE, (len(share), D_MODEL))).astype(np.float32)


def cover(truth: Truth, image: int) -> NDArray[np.float64]:
    """[P, C]: the share of each patch's pixels that show a concept."""
    objects = np.array(Image.open(truth.path / "objects" / truth.uris[image]))
    grid = len(objects) // PATCH
    masks = np.stack([np.isin(objects, numbers) for numbers in truth.carriers[image]])
    share: NDArray[np.float64] = masks.reshape(-1, grid, PATCH, grid, PATCH).mean((2, 4))
    return share.reshape(len(masks), -1).T


def plant(store: ActivationStore, out: Path) -> Run:
    """A run whose latents are the concepts: it decodes with the atoms and encodes with their pseudoinverse."""
    rows = torch.from_numpy(atoms(24)).float()
    sae = SAE(SAEConfig("jumprelu", n_latents=len(rows), k=4).resolve(D_MODEL), D_MODEL)
    with torch.no_grad():
        sae.decoder.copy_(rows)
        sae.encoder.copy_(torch.linalg.pinv(rows).T)
        sae.threshold.fill_(THRESHOLD)
    return write_imported(
        out, sae.requires_grad_(False).eval(), open_stores(store), HookPoint(LAYER), format="planted", tokens="patch",
        provenance={"source": "planted"},
    )  # fmt: skip


def train_sae(store: ActivationStore, out: Path, seed: int) -> Run:
    config = TrainConfig(n_steps=N_STEPS, batch_size=1024, lr=3e-3, dead_tokens=50_000, tokens="patch", seed=seed)
    return train(store, out, layer=LAYER, sae=TRAINED, config=config)


def measure(world: World, out: Path) -> tuple[Benchmark, Benchmark]:
    """The planted and the trained dictionaries, measured with the truth, and with that of other images."""
    planted = plant(world.train, out / "planted")
    trained = [train_sae(world.train, out / f"trained{seed}", seed) for seed in SEEDS]
    return (
        benchmark_runs([planted, *trained], world.true.store, out / "true.json", world.true.config),
        benchmark_runs([planted, trained[0]], world.shuffled.store, out / "shuffled.json", world.shuffled.config),
    )


def print_table(true: Benchmark, shuffled: Benchmark) -> None:
    names = ("planted", "trained0", "untrained trained0")
    measures = dict.fromkeys(value.measure for value in true.values if value.subject == "trained0")
    print("| measure | " + " | ".join((*names, *(f"{name}, shuffled" for name in names))) + " |")
    print("| --- " * (1 + 2 * len(names)) + "|")
    for name in measures:
        cells: list[Any] = [found.find(subject, name) for found in (true, shuffled) for subject in names]
        print(
            f"| {name} | " + " | ".join("-" if c is None or c.value is None else f"{c.value:.3f}" for c in cells) + " |"
        )
    for note in true.notes():
        print(note)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
