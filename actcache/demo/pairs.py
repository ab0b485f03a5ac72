"""write_pairs(): scenes that are drawn twice, the second time with one attribute changed.

The files are those of write_demo(), and two images are called <index>-before.png and <index>-after.png. Beside them:

pairs.csv   before, after: the uris of the two images; removed, added: the concepts that only the one or the other has

Both images take their random numbers from the same streams, so that they are equal in every pixel that the changed
attribute does not touch: lighting, noise, and everything that is not the changed object or the changed background.
"""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actcache.artifacts import write_new
from actcache.demo.dataset import IMAGE_SIZE, DrawnScene, Truth, write_scenes
from actcache.demo.scenes import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    draw_background,
    draw_objects,
    make_generator,
    sample,
)
from actcache.options import check_number
from actcache.progress import Progress

VALUES = {
    "background": BACKGROUNDS, "color": tuple(COLORS), "shape": tuple(SHAPES), "size": ("small",), "texture": TEXTURES,
}  # fmt: skip
"""What an attribute may change to. A large object always has room to become small, but not the other way round; in
half of the pairs the two images are swapped."""

CONTENT, GROUND, OBJECTS = 1, 2, 3
"""Streams of random numbers. A background takes as many as its kind needs, so it has its own."""


@dataclass(frozen=True)
class ScenePair:
    """Two scenes that differ in one attribute. `removed` is a concept of `before` only, `added` of `after` only."""

    before: Scene
    after: Scene
    removed: str
    added: str


def write_pairs(
    out: str | Path, *, n_pairs: int, seed: int = 0, image_size: int = IMAGE_SIZE, on_progress: Progress | None = None
) -> Truth:
    """Write `n_pairs` pairs of scenes, as many for each family of concepts; a folder as write_demo() writes.

    Raises:
        SettingsError: the folder was written with other settings, or contains something else.
    """
    n_pairs = check_number("n_pairs", n_pairs, int, at_least=1)
    rows: list[tuple[str, str, str, str]] = []

    def draw(seed: int, image_size: int) -> Iterator[DrawnScene]:
        for index in range(n_pairs):
            pair, before, after = render_pair(seed, index, image_size)
            rows.append((before.uri, after.uri, pair.removed, pair.added))
            yield from (before, after)

    def write_table(folder: Path) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([("before", "after", "removed", "added"), *rows])
        write_new(folder / "pairs.csv", text.getvalue().encode())

    return write_scenes(
        Path(out), {"n_pairs": n_pairs}, 2 * n_pairs, draw, seed=seed, image_size=image_size, finish=write_table,
        on_progress=on_progress,
    )  # fmt: skip


def render_pair(seed: int, index: int, image_size: int = IMAGE_SIZE) -> tuple[ScenePair, DrawnScene, DrawnScene]:
    """Pair `index` of the dataset `seed`, and its two images."""
    pair = sample_pair(seed, index)

    def draw(name: str, scene: Scene) -> DrawnScene:
        ground = draw_background(make_generator(seed, index, GROUND), scene.background, image_size)
        pixels, objects = draw_objects(make_generator(seed, index, OBJECTS), scene, ground)
        return DrawnScene(f"{index:06d}-{name}", scene, pixels, objects)

    return pair, draw("before", pair.before), draw("after", pair.after)


def sample_pair(seed: int, index: int) -> ScenePair:
    """Pair `index` of the dataset `seed`. Families take turns: background, color, shape, size, texture."""
    rng = make_generator(seed, index, CONTENT)
    family = list(VALUES)[index % len(VALUES)]
    changes: list[ScenePair] = []
    while not changes:  # not every scene has an attribute that can be changed
        changes = list(_change(sample(rng), family, rng))
    pair = changes[int(rng.integers(len(changes)))]
    return ScenePair(pair.after, pair.before, pair.added, pair.removed) if rng.integers(2) else pair


def _change(scene: Scene, family: str, rng: Any) -> Iterator[ScenePair]:
    """All changes of one attribute after which a concept is gone from the image and another one is new in it."""
    present = scene.carriers()
    for value in VALUES[family]:
        added = f"{family}:{value}"
        if added in present:
            continue
        if family == "background":
            yield ScenePair(scene, replace(scene, background=value), f"background:{scene.background}", added)
            continue
        for number, thing in enumerate(scene.objects):
            removed = f"{family}:{getattr(thing, family)}"
            if len(present[removed]) > 1:  # another object shows it, too
                continue
            diameter = float(rng.uniform(*SIZES[value])) if family == "size" else thing.diameter
            changed: dict[str, Any] = {family: value, "diameter": diameter}
            objects = (*scene.objects[:number], replace(thing, **changed), *scene.objects[number + 1 :])
            yield ScenePair(scene, replace(scene, objects=objects), removed, added)
