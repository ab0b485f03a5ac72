"""Data: what stands under each URL of `data/`, for the server as for the files of `publish --site`."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from actcache import SettingsError
from actcache.artifacts import file_sha256
from analysis.explore.atlas import describe_site, encode_columns, make_columns
from analysis.explore.comparison import describe_comparison
from analysis.explore.encoding import encode
from analysis.explore.images import describe_image, list_images
from analysis.explore.latents import describe_latent
from analysis.explore.maps import MapMaker, read_map
from analysis.explore.notes import Notes
from analysis.explore.pictures import PictureShelf, pack
from analysis.explore.sources import Sources
from analysis.explore.twins import Stability
from analysis.report import draw_results

JSON, BINARY, HTML = "application/json", "application/octet-stream", "text/html; charset=utf-8"
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
        self.map, self.stability = MapMaker(self.sources), Stability(self.sources)

    def answer(self, path: str) -> Answer:
        """The content of data/`path`. Raises SettingsError if there is no such file, or no such latent or image."""
        whole = self.whole()
        if path in whole:
            return whole[path]()
        folder, _, name = path.partition("/")
        number, _, suffix = name.partition(".")
        if number.isascii() and number.isdecimal() and len(number) < 10:
            match folder, suffix:
                case "latents", "json":
                    return self._block("latents", int(number), self.sources.n_latents, self.latents, describe_latent)
                case "images", "json" if self.sources.codes is not None:
                    return self._block("images", int(number), self.sources.n_images, self.images, describe_image)
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
        describe: Callable[[Sources, int], dict[str, Any] | None],
    ) -> Answer:  # fmt: skip
        """The records of one file; null for those that are not included."""
        numbers = self._numbers(name, number, n)
        return Answer(encode([describe(self.sources, i) if kept is None or i in kept else None for i in numbers]))

    def _numbers(self, name: str, number: int, n: int) -> range:
        numbers = range(number * self.block[name], min((number + 1) * self.block[name], n))
        if not len(numbers):
            raise SettingsError(f"There is no block {number} of {name}: there are {n:,} {name}.")
        return numbers

    def _picture(self, image: int) -> bytes:
        return self.shelf.small(image) if self.images is None or image in self.images else b""

    def columns(self) -> dict[str, NDArray[Any]]:
        """The columns of the atlas."""
        stability = self.stability.column
        return make_columns(
            self.sources,
            (read_map(self.sources) or self.map.made) | ({} if stability is None else {"stability": stability}),
        )

    def describe(self) -> dict[str, Any]:
        """What site.json says."""
        sources, columns = self.sources, self.columns()
        pictures = bool(sources.concepts.artifact.settings.get("pictures")) or (
            sources.images is not None and sources.images.all_there()
        )
        has = {
            "map": "map_x" in columns, "images": sources.codes is not None, "pictures": pictures,
            "comparison": sources.comparison is not None, "results": bool(self.result_files), "notes": True,
            **{name: self.live and not self.abilities.get(name, "") for name in ("edit", "upload", "text")},
        }  # fmt: skip
        facts = describe_site(
            sources, live=self.live, block=self.block, columns=columns, has=has, missing=self._missing(has)
        )
        return facts | {"results": [file_sha256(file)[:16] for file in self.result_files if file.is_file()]}

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
        for name in ("edit", "upload", "text"):
            if not has[name]:
                missing[name] = self.abilities.get(name, "") if self.live else server
        if not has["map"]:
            missing["map"] = self.map.state or "The map of decoder directions has not been made."
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


def count_blocks(n: int, size: int) -> Iterable[int]:
    """The numbers of the files that hold n records."""
    return range(-(-n // size))
