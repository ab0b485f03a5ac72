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

    @cached_property
    def maxima(self) -> NDArray[np.float64]:
        """[F]: the largest activation of each latent, 0 where it never fires."""
        return np.nan_to_num(np.asarray(self.concepts.table["max_activation"].to_numpy(), dtype=np.float64))

    @cached_property
    def classes(self) -> tuple[list[str], NDArray[np.int64]]:
        """(names, labels) of the classes of the images, by label."""
        images = self.concepts.images
        labels, first = np.unique(np.asarray(images["label"]), return_index=True)
        return images["label_name"].take(first[labels >= 0]).to_pylist(), labels[labels >= 0].astype(np.int64)

    @cached_property
    def top_class(self) -> NDArray[np.float32]:
        """[F]: the place in `classes` of the most frequent class of a latent's top images, of equal ones the first; -1
        for none.
        """
        top, labels = self.concepts.top_images, np.asarray(self.concepts.images["label"])
        label = labels[top["image"].to_numpy()]
        latent, label = (column[label >= 0] for column in (top["latent"].to_numpy(), label))
        n_classes = max(len(self.classes[1]), 1)
        cell = latent.astype(np.int64) * n_classes + np.searchsorted(self.classes[1], label)
        cells, count = np.unique(cell, return_counts=True)
        of_latent, place = np.divmod(cells, n_classes)
        found = np.full(self.n_latents, -1, dtype=np.float32)
        if len(cells):
            first = np.flatnonzero(np.r_[True, of_latent[1:] != of_latent[:-1]])
            best = np.maximum.reduceat(count * n_classes + (n_classes - 1 - place), first)  # the count, then the place
            found[of_latent[first]] = n_classes - 1 - best % n_classes
        return found

    def warm_up(self) -> None:
        """Read what the first latent needs."""
        for name in ("class_counts", "top_images", "top_patches"):
            self.concepts.rows_of(name, 0)

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
        SchemaError: `compare` is another result. SettingsError: it compares other tables, whose images have other
        numbers. Others as `find_parent`, for a path that was given.
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
    comparison = None if compare is None else (_read_comparison(table, Path(compare)), Path(compare))
    return Sources(
        table, opened, found if isinstance(found, Run) else None, places, missing, store, comparison,
        tuple(_find_inspections(files)), files,
    )  # fmt: skip


def _read_comparison(table: ConceptTable, file: Path) -> Comparison:
    comparison = read_result(file, Comparison)
    parents = comparison.parents
    if table.artifact.id not in (parents["base"].id, parents["adapted"].id):
        raise SettingsError(
            f"{file} compares {parents['base'].path} with {parents['adapted'].path}, and {table.path.name} is neither. "
            "Explore one of these two, or leave out --compare."
        )
    return comparison


def _find_inspections(files: Sequence[Path]) -> list[tuple[Inspection, Path]]:
    """The inspections among the results. Raises SchemaError for a file that is no result."""
    read = [(read_result(file, *SECTIONS), file) for file in files if not file.is_dir()]
    return [(result, file) for result, file in read if isinstance(result, Inspection)]
