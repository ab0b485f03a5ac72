"""write_demo(): scenes as image files, with their ground truth beside them.

images/<shape of the largest object>/<index>.png
objects/<shape>/<index>.png  the object map, named like the image: 0 is background, i the i-th object
truth.parquet              uri, caption, and for each concept the numbers of the objects that have it
demo.json                  n_images, image_size, seed
"""

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from actcache.artifacts import (
    OutputLock,
    build_folder,
    check_place,
    encode_table,
    read_json,
    remove_remnants,
    write_new,
)
from actcache.demo.scenes import Scene, caption_scene, concept_names, render_scene
from actcache.errors import SettingsError
from actcache.options import check_number
from actcache.progress import Progress

IMAGE_SIZE = 64


@dataclass(frozen=True)
class Truth:
    """The ground truth of the images.

    Attributes:
        uris: one per image, relative to images/.
        names: the concepts, sorted.
        present: [I, C], whether an image contains a concept.
        carriers: [I][C], the numbers in the object map that have the concept.
    """

    path: Path
    uris: tuple[str, ...]
    names: tuple[str, ...]
    captions: tuple[str, ...]
    present: NDArray[np.bool_]
    carriers: tuple[tuple[tuple[int, ...], ...], ...]

    def masks(self, images: Sequence[int], concept: int) -> NDArray[np.bool_]:
        """[n, H, W]: the pixels that show a concept in the given images."""
        maps = [np.array(Image.open(self.path / "objects" / self.uris[image])) for image in images]
        return np.stack([np.isin(m, self.carriers[i][concept]) for m, i in zip(maps, images, strict=True)])


def write_demo(
    out: str | Path, *, n_images: int, seed: int = 0, image_size: int = IMAGE_SIZE, on_progress: Progress | None = None
) -> Truth:
    """Write `n_images` scenes; the folder appears complete or not at all. The same call again returns it.

    Raises:
        SettingsError: the folder was written with other settings, or contains something else.
    """
    n_images = check_number("n_images", n_images, int, at_least=1)

    def draw(seed: int, image_size: int) -> Iterator[DrawnScene]:
        for index in range(n_images):
            scene, pixels, objects = render_scene(seed, index, image_size)
            yield DrawnScene(f"{index:06d}", scene, pixels, objects)

    return write_scenes(
        Path(out), {"n_images": n_images}, n_images, draw, seed=seed, image_size=image_size, on_progress=on_progress
    )


class DrawnScene(NamedTuple):
    """A scene, its name, its pixels [H, W, 3] and its object map [H, W]."""

    name: str
    scene: Scene
    pixels: NDArray[np.uint8]
    objects: NDArray[np.uint8]

    @property
    def uri(self) -> str:
        return f"{self.scene.label}/{self.name}.png"


def write_scenes(
    out: Path,
    settings: Mapping[str, int],
    n_images: int,
    draw: Callable[[int, int], Iterator[DrawnScene]],
    *,
    seed: int,
    image_size: int,
    finish: Callable[[Path], None] = lambda folder: None,
    on_progress: Progress | None = None,
) -> Truth:
    """Write the scenes that `draw(seed, image_size)` gives, unless a complete folder with the same settings is there.

    Args:
        settings: what tells this folder from others, beside the seed and the size.
        finish: called with the folder when its scenes are written, to add files.
    """
    seed = check_number("seed", seed, int, at_least=0)
    image_size = check_number("image_size", image_size, int, at_least=16)
    settings = {**settings, "image_size": image_size, "seed": seed}
    check_place(out)
    remove_remnants(out)
    if (existing := _find_demo(out, settings)) is not None:
        return existing
    with OutputLock(out) as lock:
        lock.acquire()
        if (existing := _find_demo(out, settings)) is not None:  # another process was faster
            return existing
        with build_folder(out) as folder:
            _write_scenes(folder, draw(seed, image_size), n_images, on_progress)
            finish(folder)
            write_new(folder / "demo.json", json.dumps(settings).encode())
        return read_truth(out)


def _find_demo(out: Path, settings: Mapping[str, int]) -> Truth | None:
    if not out.exists():
        return None
    existing = read_json(out / "demo.json") if (out / "demo.json").is_file() else "something else"
    if existing != settings:
        raise SettingsError(f"{out} contains {existing}, but {settings} was requested. Choose another folder.")
    return read_truth(out)


def _write_scenes(folder: Path, drawn: Iterator[DrawnScene], n_images: int, on_progress: Progress | None) -> None:
    uris, captions, carriers = [], [], []
    for each in drawn:
        write_new(folder / "images" / each.uri, _png(each.pixels))
        write_new(folder / "objects" / each.uri, _png(each.objects))
        uris.append(each.uri)
        captions.append(caption_scene(each.scene))
        carriers.append(each.scene.carriers())
        if on_progress:
            on_progress(len(uris), n_images)
    columns = {name: [of_image.get(name, []) for of_image in carriers] for name in concept_names()}
    arrays = {name: pa.array(column, pa.list_(pa.uint8())) for name, column in columns.items()}
    write_new(folder / "truth.parquet", encode_table(pa.table({"uri": uris, "caption": captions, **arrays})))


def read_truth(path: str | Path) -> Truth:
    """Read truth.parquet."""
    with open(Path(path) / "truth.parquet", "rb") as file:  # pyarrow itself opens only paths that are UTF-8
        table = pq.ParquetFile(file).read()
    names = tuple(table.column_names[2:])
    columns = [table[name].to_pylist() for name in names]
    carriers = tuple(tuple(tuple(column[i]) for column in columns) for i in range(table.num_rows))
    present = np.array([[bool(numbers) for numbers in row] for row in carriers])
    return Truth(
        Path(path), tuple(table["uri"].to_pylist()), names, tuple(table["caption"].to_pylist()), present, carriers
    )


def _png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
