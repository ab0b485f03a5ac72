"""write_site(): the explorer as a folder of files for any web host, with nothing to run.

The files are what the server answers, in larger blocks. Everything is made first and its size is said; then the folder
takes its name at once. A table that is too large for a web page is cut: its most telling latents, and the images that
they show.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from actcache import SettingsError, StorageError
from actcache.artifacts import (
    OutputLock,
    build_folder,
    check_place,
    file_sha256,
    list_files,
    remove_remnants,
    write_new,
)
from actcache.progress import Progress
from analysis.concepts import ConceptTable, choose_gallery
from analysis.explore.comparison import describe_comparison
from analysis.explore.data import Data, count_blocks
from analysis.explore.encoding import encode
from analysis.explore.images import describe_image
from analysis.explore.latents import describe_latent
from analysis.explore.page_files import read_page
from analysis.explore.pictures import pack
from analysis.explore.records import LatentRecord
from analysis.explore.sources import Sources, open_sources

MAX_FILE_BYTES = {"latents": 200_000, "images": 150_000, "pictures": 20_000}
"""A host sends a block whole. A latent shows up to 40 images, whose pictures are in as many blocks, and shall take less
than 1 MB."""
MAX_BLOCK = 256
MAX_LATENTS, MAX_IMAGES = 4096, 4096
SITE = "data/site.json"


@dataclass(frozen=True)
class Site:
    """What was written, or would be.

    Attributes:
        n_latents, n_images: those with a record, of all that there are.
        left_out: one sentence each.
        written: whether anything was written.
    """

    folder: Path
    n_files: int
    n_bytes: int
    n_latents: tuple[int, int]
    n_images: tuple[int, int]
    left_out: tuple[str, ...]
    written: bool = False


def write_site(
    concepts: ConceptTable | str | Path, folder: str | Path, *, codes: str | Path | None = None,
    run: str | Path | None = None, store: str | Path | None = None, images: str | Path | None = None,
    compare: str | Path | None = None, results: Sequence[str | Path] = (), overwrite: bool = False,
    dry_run: bool = False, on_plan: Callable[[Site], None] | None = None, on_progress: Progress | None = None,
) -> Site:  # fmt: skip
    """Write the page and its data into a folder. The same call twice changes nothing.

    Args:
        codes, run, store, images, compare, results: see `open_sources`.
        overwrite: replace a site that is there and differs.
        dry_run: write nothing.
        on_plan: called with what will be written, before it is.
        on_progress: called with (records done, in all).

    Raises:
        SettingsError: the folder holds something else, or another site without `overwrite`. Others as `open_sources`.
    """
    target = Path(folder)
    check_place(target)
    page = read_page()
    earlier = _look(target)
    sources = open_sources(concepts, codes=codes, run=run, store=store, images=images, compare=compare, results=results)
    with OutputLock(target) as lock:
        if not dry_run:
            lock.acquire()
            remove_remnants(target)
        content, plan = make_site(sources, page, on_progress)
        plan = replace(plan, folder=target)
        if on_plan:
            on_plan(plan)
        differing = [] if earlier is None else sorted(_differences(target, earlier, content))
        if earlier is not None and not differing:
            return plan
        if earlier is not None and not overwrite:
            some = ", ".join(differing[:3]) + (" and others" if len(differing) > 3 else "")
            raise SettingsError(
                f"{target} holds a site that differs in {some}. Pass --overwrite to replace it, or choose another "
                "folder."
            )
        if dry_run:
            return plan
        with build_folder(target, replace=earlier is not None) as building:
            for name, data in content.items():
                write_new(building / name, data)
    return replace(plan, written=True)


def make_site(
    sources: Sources, page: Mapping[str, bytes], on_progress: Progress | None = None
) -> tuple[dict[str, bytes], Site]:
    """(file name -> content, what it is)."""
    left_out: list[str] = []
    compared = describe_comparison(sources) if sources.comparison else None
    latents = choose_latents(sources, [row["latent"] for row in compared["latents"]] if compared else [])
    n_shown, steps = len(latents), len(latents) + min(sources.n_images, MAX_IMAGES)
    report = on_progress or (lambda done, total: None)
    records: dict[int, LatentRecord] = {}
    for done, latent in enumerate(latents, start=1):
        records[latent] = describe_latent(sources, latent)
        report(done, steps)
    images = choose_images(sources, map(int, compared["images"] if compared else ()), records.values())
    if n_shown < sources.n_latents or len(images) < sources.n_images:
        left_out.append(
            f"This site holds {n_shown:,} of {sources.n_latents:,} latents and {len(images):,} of "
            f"{sources.n_images:,} images. `patchsae explore` shows all."
        )
    data = Data(sources, latents=frozenset(latents), images=frozenset(images), left_out=tuple(left_out))
    with suppress(StorageError, OSError):  # a lock of a name or map that was being written when its writer was killed
        remove_remnants(sources.concepts.path)
    data.make()
    pictures: dict[int, bytes] = {}
    codes: dict[int, bytes] = {}
    for done, image in enumerate(images, start=n_shown + 1):
        pictures[image] = data.shelf.small(image)
        codes[image] = encode(describe_image(sources, image))
        report(done, max(steps, done))
    for latent, record in records.items():
        record["numbers"] |= data.made_numbers(latent)
    encoded = {latent: encode(record) for latent, record in records.items()}
    blocks, files = {}, {}
    for name, n, parts, join, suffix in (
        ("latents", sources.n_latents, encoded, _join_json, "json"),
        ("images", sources.n_images, codes, _join_json, "json"),
        ("pictures", sources.n_images, pictures, pack, "bin"),
    ):
        empty = b"" if suffix == "bin" else b"null"
        blocks[name] = choose_block([len(parts.get(i, empty)) + 4 for i in range(n)], MAX_FILE_BYTES[name])
        if name == "images" and sources.codes is None:
            continue
        for number in count_blocks(n, blocks[name]):
            numbers = range(number * blocks[name], min((number + 1) * blocks[name], n))
            files[f"data/{name}/{number}.{suffix}"] = join([parts.get(i, empty) for i in numbers])
    data.block = blocks
    for name in ("atlas.bin", "names.json", "images.json", "comparison.json", "results.html", "site.json"):
        if name in data.whole():
            files[f"data/{name}"] = data.answer(name).body
    content = {**page, **files}
    n_bytes = sum(map(len, content.values()))
    site = Site(
        Path(), len(content), n_bytes, (n_shown, sources.n_latents), (len(images), sources.n_images), tuple(left_out)
    )
    return content, site


def choose_latents(sources: Sources, first: Sequence[int]) -> list[int]:
    """The latents that get a record, ascending: all, or the `first`, those of the gallery, and the most telling."""
    if sources.n_latents <= MAX_LATENTS:
        return list(range(sources.n_latents))
    concepts = sources.concepts
    gallery = concepts.gallery["latent"].to_pylist()
    best = choose_gallery(concepts.table, sources.n_latents, min_images=1).tolist()
    return sorted(list(dict.fromkeys([*first, *gallery, *best, *np.argsort(-sources.n_fired).tolist()]))[:MAX_LATENTS])


def choose_images(
    sources: Sources, compared: Iterable[int], records: Iterable[LatentRecord]
) -> list[int]:  # fmt: skip
    """The images that get a record and a picture, ascending: all, or those that the site shows.

    Where these are too many, the ones that were compared come first. Then each latent gives its strongest image, then
    its second, and so on.
    """
    if sources.n_images <= MAX_IMAGES:
        return list(range(sources.n_images))
    turns = zip_longest(*(map(int, record["images"]) for record in records))
    shown = dict.fromkeys([*compared, *(image for turn in turns for image in turn if image is not None)])
    return sorted([*shown, *(i for i in range(sources.n_images) if i not in shown)][:MAX_IMAGES])


def choose_block(sizes: Sequence[int], limit: int) -> int:
    """The largest power of two such that so many consecutive records always fit into `limit` bytes, or else 1."""
    block = MAX_BLOCK
    while block > 1:
        padded = np.pad(np.array(sizes, dtype=np.int64), (0, -len(sizes) % block))
        if padded.reshape(-1, block).sum(axis=1).max(initial=0) + 16 <= limit:
            break
        block //= 2
    return block


def _join_json(parts: Sequence[bytes]) -> bytes:
    return b"[" + b",".join(parts) + b"]"


def _look(target: Path) -> Mapping[str, Any] | None:
    """What site.json of an earlier site says; None if the folder is empty or not there. Raises SettingsError."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    try:
        facts = json.loads((target / SITE).read_bytes())
        if isinstance(facts, dict) and "concepts_id" in facts and "block" in facts:
            return facts
    except (OSError, ValueError):
        pass
    raise SettingsError(f"{target} holds something else than a site of the explorer. Choose another folder.")


def _differences(target: Path, earlier: Mapping[str, Any], content: Mapping[str, bytes]) -> set[str]:
    """The files that differ. Pages of results hold random names, and are known by the results that they show."""
    there = {str(name) for name in list_files(target)}
    differing = there ^ set(content)
    for name in there & set(content):
        if name != "data/results.html" and file_sha256(target / name) != hashlib.sha256(content[name]).hexdigest():
            differing.add(name)
    return differing
