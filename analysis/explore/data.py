"""Data: what stands under each URL of `data/`, for the server as for the files of `publish --site`."""

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from actcache import SettingsError
from actcache.artifacts import file_sha256
from analysis.explore.atlas import describe_site, encode_columns, find_absent, find_columns
from analysis.explore.coherence import COHERENCE
from analysis.explore.comparison import describe_comparison
from analysis.explore.encoding import encode, short
from analysis.explore.images import describe_image, list_images
from analysis.explore.latents import describe_latent
from analysis.explore.makers import Maker
from analysis.explore.maps import MAP
from analysis.explore.notes import Notes
from analysis.explore.pictures import PictureShelf, pack
from analysis.explore.records import ImageRecord, LatentRecord, SiteRecord
from analysis.explore.sources import Sources
from analysis.explore.twins import Stability
from analysis.report import draw_results

JSON, BINARY, HTML = "application/json", "application/octet-stream", "text/html; charset=utf-8"
FIRST = ("site.json", "atlas.bin", "names.json")
"""The files with which a page starts."""
MAX_TOGETHER = 64
"""Pictures that a server sends in one answer: `pictures/3,14,15.bin`."""
LIVE_BLOCK = {"latents": 1, "images": 1, "pictures": 1}


class Answer(NamedTuple):
    body: bytes
    kind: str = JSON


@dataclass(eq=False)
class Data:
    """Everything under `data/`.

    Attributes:
        live: whether a server answers, so that there is more than these files.
        block: how many latents, images and pictures are in one file.
        abilities: what a server can do beside: edit, upload, text -> why not, "" if it can.
        latents, images: those that are included; None for all.
        left_out: what is not included, one sentence each.
    """

    sources: Sources
    live: bool = False
    block: Mapping[str, int] = field(default_factory=lambda: LIVE_BLOCK)
    abilities: Mapping[str, str] = field(default_factory=dict)
    latents: frozenset[int] | None = None
    images: frozenset[int] | None = None
    left_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.shelf, self.notes = PictureShelf(self.sources), Notes(self.sources)
        self.map, self.coherence = Maker(self.sources, MAP), Maker(self.sources, COHERENCE)
        self.stability = Stability(self.sources)
        self._lock = threading.Lock()

    def answer(self, path: str) -> Answer:
        """The content of data/`path`. Raises SettingsError if there is no such file, or no such latent or image."""
        whole = self.whole()
        if path in FIRST:
            with self._lock:  # what a server reads when it starts is not read twice
                return whole[path]()
        if path in whole:
            return whole[path]()
        folder, _, name = path.partition("/")
        number, _, suffix = name.partition(".")
        if self.live and folder == "pictures" and suffix == "bin" and "," in number:
            return Answer(pack([self.shelf.small(image) for image in _read_numbers(number)]), BINARY)
        if number.isascii() and number.isdecimal() and len(number) < 10:
            match folder, suffix:
                case "latents", "json":
                    return self._block("latents", int(number), self.sources.n_latents, self.latents, self.latent)
                case "images", "json" if self.sources.codes is not None:
                    return self._block("images", int(number), self.sources.n_images, self.images, self.image)
                case "pictures", "bin":
                    numbers = self._numbers("pictures", int(number), self.sources.n_images)
                    return Answer(pack([self._picture(image) for image in numbers]), BINARY)
        raise SettingsError(f"There is no data/{path[:100]}.")

    def whole(self) -> dict[str, Callable[[], Answer]]:
        """The files that are not cut into blocks: name -> what makes the content."""
        whole: dict[str, Callable[[], Answer]] = {
            "site.json": lambda: Answer(encode(self.describe())),
            "atlas.bin": lambda: Answer(encode_columns(self.columns()), BINARY),
            "names.json": lambda: Answer(encode(self.notes.read())),
            "images.json": lambda: Answer(encode(list_images(self.sources))),
        }
        if self.sources.comparison is not None:
            whole["comparison.json"] = lambda: Answer(encode(describe_comparison(self.sources)))
        if self.result_files:
            whole["results.html"] = lambda: Answer(self._results, HTML)
        return whole

    def _block(
        self, name: str, number: int, n: int, kept: frozenset[int] | None,
        describe: Callable[[int], LatentRecord | ImageRecord | None],
    ) -> Answer:  # fmt: skip
        """The records of one file; null for those that are not included."""
        numbers = self._numbers(name, number, n)
        return Answer(encode([describe(i) if kept is None or i in kept else None for i in numbers]))

    def _numbers(self, name: str, number: int, n: int) -> range:
        numbers = range(number * self.block[name], min((number + 1) * self.block[name], n))
        if not len(numbers):
            raise SettingsError(f"There is no block {number} of {name}: there are {n:,} {name}.")
        return numbers

    def _picture(self, image: int) -> bytes:
        return self.shelf.small(image) if self.images is None or image in self.images else b""

    def latent(self, latent: int) -> LatentRecord:
        """The record of a latent, with the numbers that are not in the table."""
        record = describe_latent(self.sources, latent)
        record["numbers"] |= self.made_numbers(latent)
        return record

    def made_numbers(self, latent: int) -> dict[str, float | None]:
        """What was made of a latent beside the table."""
        made = {**self.coherence.columns, **self.stability.columns}
        return {name: short(float(values[latent])) for name, values in made.items()}

    def image(self, image: int) -> ImageRecord | None:
        """The record of an image."""
        return describe_image(self.sources, image)

    def warm_up(self) -> None:
        """Read what the first page needs, and the first latent."""
        for path in FIRST:
            self.answer(path)
        self.sources.warm_up()

    def start(self) -> None:
        """Begin to make what takes longer than a page waits."""
        for maker in (self.coherence, self.map, self.stability):
            maker.start()

    def make(self) -> None:
        """Make it now."""
        for maker in (self.coherence, self.map, self.stability):
            maker.make()

    def stop(self) -> None:
        """End what is still being made."""
        for maker in (self.coherence, self.map):
            maker.stop()

    @property
    def stage(self) -> int:
        """A number that grows when records gain something that was being made."""
        return sum(bool(maker.columns) for maker in (self.coherence, self.stability))

    def columns(self) -> dict[str, Callable[[], NDArray[Any]]]:
        """The columns of the atlas, and what gives their values."""
        return find_columns(self.sources, {**self.map.columns, **self.coherence.columns, **self.stability.columns})

    def describe(self) -> SiteRecord:
        """What site.json says."""
        makers: dict[str, Maker | Stability] = {
            "map": self.map, "coherence": self.coherence, "stability": self.stability,
        }  # fmt: skip
        making = [name for name, of in makers.items() if of.running]  # before what they have made is looked at
        sources, columns = self.sources, self.columns()
        pictures = bool(sources.concepts.artifact.settings.get("pictures")) or (
            sources.images is not None and sources.images.all_there()
        )
        has = {
            "map": "map_x" in columns, "images": sources.codes is not None, "pictures": pictures,
            "comparison": sources.comparison is not None, "results": bool(self.result_files), "notes": self.live,
            **{name: self.live and not self.abilities.get(name, "") for name in ("edit", "upload", "text")},
        }  # fmt: skip
        states = {name: makers[name].state for name in ("coherence", "stability")}
        return describe_site(
            sources, live=self.live, block=self.block, columns=columns, has=has, missing=self._missing(has),
            absent=find_absent(sources, columns, states), making=making,
            results=[file_sha256(file)[:16] for file in self.result_files if file.is_file()],
        )  # fmt: skip

    @property
    def result_files(self) -> list[Path]:
        """The files that results.html draws."""
        compared = [] if self.sources.comparison is None else [self.sources.comparison[1]]
        return list(dict.fromkeys([*compared, *self.sources.results]))

    @cached_property
    def _results(self) -> bytes:
        return draw_results(self.result_files, self.sources.concepts)

    def _missing(self, has: Mapping[str, bool]) -> dict[str, str]:
        """The reason for each part that is not there, one sentence each."""
        sources = self.sources
        missing = dict(sources.missing)
        server = "This needs the program: look at the same table with `patchsae explore`."
        for name in ("edit", "upload", "text", "notes"):
            if not has[name]:
                missing[name] = self.abilities.get(name, "") if self.live else server
        if not has["map"]:
            missing["map"] = self.map.state
        if not has["pictures"]:
            missing["pictures"] = missing.get("images", "There are no pictures.")
        if has["images"]:
            missing.pop("images", None)
        else:
            missing["images"] = missing.get("codes", "")
        if not has["comparison"]:
            missing["comparison"] = "No comparison was given. Name the result of `compare` with --compare."
        if not has["results"]:
            missing["results"] = "No results were given. Name files of results with --result."
        parts = {"histogram.npy": "histogram", "position_map.npy": "position"}
        old = "The table was made by an older version, which did not keep it."
        missing |= {part: old for file, part in parts.items() if not sources.concepts.has(file)}
        if "nearest" in sources.concepts.left_out or not sources.concepts.has("nearest.npy"):
            missing["nearest"] = sources.concepts.left_out.get("nearest", old)
        if self.left_out:
            missing["left_out"] = " ".join(self.left_out)
        return missing


def _read_numbers(text: str) -> list[int]:
    """Numbers with commas between them. Raises SettingsError for anything else, and for too many."""
    numbers = text[: 10 * (MAX_TOGETHER + 1)].split(",")
    if len(numbers) > MAX_TOGETHER or not all(
        each.isascii() and each.isdecimal() and len(each) < 10 for each in numbers
    ):
        raise SettingsError(f"There is no data/pictures/{text[:100]}. Up to {MAX_TOGETHER} pictures are sent together.")
    return [int(each) for each in numbers]


def count_blocks(n: int, size: int) -> Iterable[int]:
    """The numbers of the files that hold n records."""
    return range(-(-n // size))
