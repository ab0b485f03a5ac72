"""Sources: the artifacts that the explorer reads, found once. What cannot be found has its reason in `missing`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actcache import ArtifactNotFoundError, IncompleteError, ParentMismatchError, SettingsError
from actcache.artifacts import find_parent
from analysis.concepts import ConceptTable
from analysis.lineage import ImagePlaces, find_images, find_run
from analysis.report import SECTIONS
from analysis.results import Comparison, Inspection, read_result
from saetrain import CodeStore, Run


@dataclass(frozen=True, eq=False)
class Sources:
    """A concept table, and what it was made from as far as it is there.

    Attributes:
        images: where the images lie; None without codes.
        comparison: what `compare` found, and its file. inspections: what `inspect` found.
        results: files of results that are drawn as `report` draws them.
        missing: codes, run or images -> why they are not there, one sentence each.
        store: where the caller says that the activations lie; None if they have not moved.
    """

    concepts: ConceptTable
    codes: CodeStore | None
    run: Run | None
    images: ImagePlaces | None
    missing: dict[str, str]
    store: str | Path | None = None
    comparison: tuple[Comparison, Path] | None = None
    inspections: tuple[tuple[Inspection, Path], ...] = ()
    results: tuple[Path, ...] = ()

    @property
    def n_latents(self) -> int:
        return int(self.concepts.table.num_rows)

    @property
    def n_images(self) -> int:
        return int(self.concepts.images.num_rows)

    @cached_property
    def n_fired(self) -> NDArray[np.int64]:
        """[F]: the number of tokens on which each latent fires."""
        return np.asarray(self.concepts.table["n_tokens"].to_numpy(), dtype=np.int64)

    def check_latent(self, latent: int) -> None:
        if not 0 <= latent < self.n_latents:
            raise SettingsError(f"A latent must lie in 0..{self.n_latents - 1}, got {latent}.")

    def check_image(self, image: int) -> None:
        if not 0 <= image < self.n_images:
            raise SettingsError(f"An image must lie in 0..{self.n_images - 1}, got {image}.")


def open_sources(
    concepts: ConceptTable | str | Path, *, codes: str | Path | None = None, run: str | Path | None = None,
    store: str | Path | None = None, images: str | Path | None = None, compare: str | Path | None = None,
    results: Sequence[str | Path] = (),
) -> Sources:  # fmt: skip
    """Open a concept table and find what it was made from.

    Args:
        codes, run, store, images: where these lie now, if they have moved.
        compare: a file that `compare` wrote. results: files of any verb that measures, and x.prompts folders.

    Raises:
        SchemaError: `compare` is another result. Others as `find_parent`, for a path that was given.
    """
    table = concepts if isinstance(concepts, ConceptTable) else ConceptTable.open(concepts)
    missing: dict[str, str] = {}
    opened: CodeStore | None = None
    try:
        opened = CodeStore.open(find_parent(table.artifact, "codes", codes, has_flag=True))
    except (ArtifactNotFoundError, IncompleteError, ParentMismatchError) as error:
        if codes is not None:
            raise
        missing["codes"] = str(error)
    found: Run | str = "Without the codes, the run is not known."
    places: ImagePlaces | None = None
    if opened is not None:
        found = find_run(opened, run)
        places = find_images(opened, images=images, store=store)
        if not places.all_there():
            missing["images"] = "The images are not where they were. Name their new path with --images."
    elif run is not None or images is not None or store is not None:
        raise SettingsError(f"--run, --store and --images need the codes. {missing['codes']}")
    else:
        missing["images"] = "Without the codes, only the pictures of the gallery are known."
    if isinstance(found, str):
        missing["run"] = found if found.startswith("Without") else f"{found[0].upper()}{found[1:]}. Name it with --run."
    files = tuple(Path(file) for file in results)
    comparison = None if compare is None else (read_result(compare, Comparison), Path(compare))
    return Sources(
        table, opened, found if isinstance(found, Run) else None, places, missing, store, comparison,
        tuple(_find_inspections(files)), files,
    )  # fmt: skip


def _find_inspections(files: Sequence[Path]) -> list[tuple[Inspection, Path]]:
    """The inspections among the results. Raises SchemaError for a file that is no result."""
    read = [(read_result(file, *SECTIONS), file) for file in files if not file.is_dir()]
    return [(result, file) for result, file in read if isinstance(result, Inspection)]
