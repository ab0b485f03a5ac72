"""Scenes: small generated images whose content is known for every pixel. numpy only.

A scene holds one to three objects of known shape, color, texture, size and position on a varied background. Image i
depends on (seed, i, image_size) only, so every prefix of a dataset is stable. A *concept* is an attribute, such as
`color:red`; its mask is the pixels of the objects that carry it, or, for a background, those outside all objects.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]

COLORS = {
    "red": (215, 35, 35),
    "green": (40, 180, 50),
    "blue": (40, 70, 225),
    "yellow": (235, 215, 40),
    "purple": (150, 50, 190),
    "cyan": (45, 210, 215),
    "white": (240, 240, 240),
}
TEXTURES = ("solid", "striped", "dotted", "checkered")
SIZES = {"small": (0.32, 0.38), "large": (0.55, 0.66)}
"""Diameter as a fraction of the image's width."""
BACKGROUNDS = ("grass", "sky", "sand", "night", "brick")


@dataclass(frozen=True)
class SceneObject:
    """One object. x, y, diameter: center and size as fractions of the image's width."""

    shape: str
    color: str
    texture: str
    size: str
    x: float
    y: float
    diameter: float

    @property
    def position(self) -> str:
        """Position of the center: the nearest side, or the center."""
        dx, dy = self.x - 0.5, self.y - 0.5
        if max(abs(dx), abs(dy)) < 0.12:
            return "center"
        if abs(dx) >= abs(dy):
            return "left" if dx < 0 else "right"
        return "top" if dy < 0 else "bottom"

    def concepts(self) -> tuple[str, ...]:
        return (f"color:{self.color}", f"shape:{self.shape}", f"size:{self.size}", f"texture:{self.texture}")


@dataclass(frozen=True)
class Scene:
    """Objects that do not overlap, largest first, and the background."""

    objects: tuple[SceneObject, ...]
    background: str

    def carriers(self) -> dict[str, list[int]]:
        """Concept -> numbers in the object map that have it (0 is the background)."""
        numbers = {f"background:{self.background}": [0]}
        for number, thing in enumerate(self.objects, start=1):
            for concept in thing.concepts():
                numbers.setdefault(concept, []).append(number)
        return numbers

    @property
    def label(self) -> str:
        """The class of the image: the shape of its largest object."""
        return self.objects[0].shape


def concept_names() -> tuple[str, ...]:
    """All concepts, sorted. Positions are not concepts, although known: a patch does not look `left`."""
    families = {"background": BACKGROUNDS, "color": COLORS, "shape": SHAPES, "size": SIZES, "texture": TEXTURES}
    return tuple(sorted(f"{family}:{name}" for family, names in families.items() for name in names))


# ---------------------------------------------------------------------------------------------------------------------
# Drawing a scene


def sample_scene(seed: int, index: int) -> Scene:
    """Scene `index` of the dataset `seed`."""
    return sample(make_generator(seed, index))


def render_scene(seed: int, index: int, image_size: int = 64) -> tuple[Scene, NDArray[np.uint8], NDArray[np.uint8]]:
    """(scene, pixels [H, W, 3], object map [H, W]: 0 is background, i the i-th object)."""
    rng = make_generator(seed, index)
    scene = sample(rng)
    return scene, *draw_objects(rng, scene, draw_background(rng, scene.background, image_size))


def draw_objects(
    rng: np.random.Generator, scene: Scene, background: NDArray[np.float64]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """(pixels, object map) of a scene over its background [H, W, 3].

    How many numbers it draws depends on the number of objects only, not on their attributes.
    """
    pixels, image_size = background, len(background)
    objects = np.zeros((image_size, image_size), dtype=np.uint8)
    for number, thing in enumerate(scene.objects, start=1):
        mask = object_mask(thing, image_size)
        color = np.array(COLORS[thing.color]) + rng.normal(0, 8, 3)
        shade = np.where(_texture(thing.texture, image_size, rng), 1.0, 0.3)[..., None]
        pixels = np.where(mask[..., None], color * shade, pixels)
        objects[mask] = number
    pixels = pixels + rng.normal(0, 5, pixels.shape)
    return np.clip(pixels, 0, 255).astype(np.uint8), objects


def object_mask(thing: SceneObject, image_size: int) -> Mask:
    """[H, W]: the pixels an object covers."""
    y, x = (np.indices((image_size, image_size)) + 0.5) / image_size
    u, v = (x - thing.x) / (thing.diameter / 2), (y - thing.y) / (thing.diameter / 2)
    return SHAPES[thing.shape](u, v)


def make_generator(*seeds: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seeds)))


def sample(rng: np.random.Generator) -> Scene:
    """A random scene."""
    background = str(rng.choice(BACKGROUNDS))
    objects: list[SceneObject] = []
    for _ in range(int(rng.integers(1, 4))):
        attributes = {
            "shape": str(rng.choice(list(SHAPES))),
            "color": str(rng.choice(list(COLORS))),
            "texture": str(rng.choice(TEXTURES)),
            "size": str(rng.choice(list(SIZES))),
        }
        diameter = float(rng.uniform(*SIZES[attributes["size"]]))
        for _ in range(12):  # a few attempts to find room; a crowded scene keeps fewer objects
            x, y = rng.uniform(diameter / 2, 1 - diameter / 2, 2)
            if all(np.hypot(x - o.x, y - o.y) > 0.52 * (diameter + o.diameter) for o in objects):
                objects.append(SceneObject(**attributes, x=float(x), y=float(y), diameter=diameter))
                break
    return Scene(tuple(sorted(objects, key=lambda thing: -thing.diameter)), background)


# ---------------------------------------------------------------------------------------------------------------------
# Shapes in the unit disk, textures, backgrounds


def _star(u: NDArray[np.float64], v: NDArray[np.float64]) -> Mask:
    angle = np.mod(np.arctan2(u, -v), 2 * np.pi / 5)
    wedge = np.abs(angle - np.pi / 5) / (np.pi / 5)  # 1 at a tip, 0 between two tips
    return np.hypot(u, v) < 0.42 + 0.62 * wedge**1.4


SHAPES: dict[str, Callable[[NDArray[np.float64], NDArray[np.float64]], Mask]] = {
    "circle": lambda u, v: np.hypot(u, v) < 0.95,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) < 0.82,
    "triangle": lambda u, v: (v < 0.8) & (abs(u) < 0.55 * (v + 1.0)),
    "star": _star,
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) < 0.3) & (np.maximum(abs(u), abs(v)) < 0.95),
    "ring": lambda u, v: (np.hypot(u, v) < 0.98) & (np.hypot(u, v) > 0.5),
}


def _texture(name: str, image_size: int, rng: np.random.Generator) -> Mask:
    """[H, W]: true where an object keeps its color, false where it is dark. Periods of 4 pixels."""
    y, x = np.indices((image_size, image_size)) + rng.integers(0, 4, 2)[:, None, None]
    lower, right = np.asarray(y % 4 < 2), np.asarray(x % 4 < 2)
    bright = {"striped": lower, "dotted": ~(lower & right), "checkered": lower ^ right}
    return np.asarray(bright.get(name, np.ones_like(lower)))


def draw_background(rng: np.random.Generator, name: str, image_size: int) -> NDArray[np.float64]:
    """[H, W, 3]: muted colors, with a texture for each kind."""
    y, x = np.indices((image_size, image_size))
    light = rng.normal(0, 10)
    noise = rng.normal(0, 1, (image_size, image_size, 1))
    if name == "grass":
        blades = rng.normal(0, 1, (1, image_size, 1)) * 10
        return np.array([88, 112, 70]) + light + blades + 12 * noise
    if name == "sky":
        return np.array([168, 188, 208]) + light + (y / image_size * 40)[..., None] + 2 * noise
    if name == "sand":
        return np.array([196, 178, 142]) + light + 16 * noise
    if name == "night":
        stars = rng.random((image_size, image_size, 1)) < 0.012
        return np.array([18, 20, 40]) + 0.5 * light + 2 * noise + 190 * stars
    offset = int(rng.integers(0, 8))
    row = (y + offset) // 6
    mortar = ((y + offset) % 6 == 0) | ((x + 5 * (row % 2) + offset) % 10 == 0)
    return np.where(mortar[..., None], 150.0, np.array([128, 84, 70])) + light + 6 * noise


# ---------------------------------------------------------------------------------------------------------------------
# Captions

_PLACES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "center": "in the middle",
}
_OPENINGS = ("", "a photo of ", "a picture of ", "an image with ")


def caption_scene(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """A sentence that names objects, attributes and background.

    Without `rng` everything is named in a fixed order; with it, wording, order and what is left out vary.
    """
    if rng is None:
        return f"{' and '.join(_describe(thing) for thing in scene.objects)} on {scene.background}"
    objects = list(scene.objects)
    rng.shuffle(objects)
    parts = [_describe(thing, rng) for thing in objects]
    ground = f" on {scene.background}" if rng.random() < 0.85 else ""
    return f"{rng.choice(_OPENINGS)}{' and '.join(parts)}{ground}"


def _describe(thing: SceneObject, rng: np.random.Generator | None = None) -> str:
    if rng is None:
        return f"a {thing.size} {thing.texture} {thing.color} {thing.shape} {_PLACES[thing.position]}"
    keep = rng.random(5) < (0.85, 0.85, 0.9, 0.9, 0.4)
    words = [word for word, kept in zip((thing.size, thing.texture, thing.color), keep, strict=False) if kept]
    words.append(thing.shape if keep[3] else "thing")
    return f"a {' '.join(words)}" + (f" {_PLACES[thing.position]}" if keep[4] else "")
