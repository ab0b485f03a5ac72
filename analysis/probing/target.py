"""What a probe predicts: a column of the image table as classes or numbers, and which images choose and which judge."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from actcache import SettingsError
from analysis.interventions import split_halves

MANY = 20
"""A column of more different numbers than this holds numbers, unless the caller says otherwise."""
LEAST = 2
"""Images of each class that choose: one to fit on, and one to choose the penalty on."""
N_CHOOSING = 20_000
"""Images that choose at most: a fit on 256 columns of them takes 0.04 GB, on raw activations of width 1536 0.25 GB."""


@dataclass(frozen=True)
class Target:
    """A column.

    Attributes:
        names: the classes, sorted; None for numbers.
        values: [I] int64 number of the class, -1 for none; or float64, NaN for none.
    """

    column: str
    names: tuple[str, ...] | None
    values: NDArray[Any]

    @property
    def present(self) -> NDArray[np.bool_]:
        """[I]: whether the image has a value."""
        return np.asarray(np.isfinite(self.values) if self.names is None else self.values >= 0)


@dataclass(frozen=True)
class Split:
    """Images, as ascending stored positions, and what is predicted of them.

    Attributes:
        choosing: [n], on which latents are ranked, and probes fitted. judged: [m].
        truth: [n] and [m], class numbers 0..C-1 or numbers.
        names: the classes that are told apart, sorted; None for numbers.
        n_classes_left_out, n_images_left_out: classes with too few images, and their images.
    """

    choosing: NDArray[np.int64]
    judged: NDArray[np.int64]
    truth: tuple[NDArray[Any], NDArray[Any]]
    names: tuple[str, ...] | None
    n_classes_left_out: int = 0
    n_images_left_out: int = 0


def read_target(images: pa.Table, column: str, as_: str | None = None) -> Target:
    """The column of an image table.

    A null, an empty text, NaN, an infinite number, and -1 in the column `label` say that an image has none.

    Args:
        as_: class or number; None chooses by what the column holds.

    Raises SettingsError for an unknown column, one without values, and one that does not hold what `as_` says.
    """
    if images.column_names.count(column) != 1:
        known = ", ".join(images.column_names[:20])
        more = f" and {images.num_columns - 20:,} more" if images.num_columns > 20 else ""
        what = "two columns" if column in images.column_names else "the unknown column"
        raise SettingsError(f"--label names {what} {column[:80]!r}. Columns: {known}{more}.")
    values = images[column].combine_chunks()
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    kind = values.type
    numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    if not (numeric or pa.types.is_boolean(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise SettingsError(
            f"--label names the column {column!r}, which holds {kind}. Expected texts, numbers, or true and false."
        )
    if numeric:
        numbers = np.array(pc.fill_null(values.cast(pa.float64(), safe=False), np.nan).to_numpy(zero_copy_only=False))
        missing = ~np.isfinite(numbers) | ((numbers == -1) if column == "label" else False)
        numbers[missing] = np.nan
        if as_ == "number" or (as_ is None and len(np.unique(numbers[~missing])) > MANY):
            return _check(Target(column, None, numbers))
        names, classes = np.unique(numbers[~missing], return_inverse=True)
        return _check(Target(column, tuple(map(_spell, names.tolist())), _put(classes, ~missing)))
    if as_ == "number":
        raise SettingsError(f"--as number needs numbers, but the column {column!r} holds {kind}. Use --as class.")
    texts = np.array(pc.fill_null(values.cast(pa.string()), "").to_pylist(), dtype=object)
    there = texts != ""
    names, classes = np.unique(texts[there].astype(str), return_inverse=True)
    return _check(Target(column, tuple(names.tolist()), _put(classes, there)))


def _check(target: Target) -> Target:
    if not target.present.any():
        raise SettingsError(
            f"No image has a value in the column {target.column!r}, so there is nothing to predict. Extract images "
            "with labels, or name another column with --label."
        )
    return target


def _spell(number: float) -> str:
    return str(int(number)) if number.is_integer() else repr(number)


def _put(values: NDArray[Any], where: NDArray[np.bool_]) -> NDArray[np.int64]:
    classes = np.full(len(where), -1, dtype=np.int64)
    classes[where] = values
    return classes


def split_images(target: Target, candidates: NDArray[np.bool_], judged: NDArray[np.int64], seed: int) -> Split:
    """Which images choose, and which judge.

    The images that were learned from choose. Where these are fewer than the others, a half of the others, by class,
    chooses as well. So none is judged that was chosen on.

    Args:
        candidates: [I], images with a value that may be used. judged: those of them that may be judged.

    Raises SettingsError: see `make_split`.
    """
    may = np.zeros(len(candidates), dtype=bool)
    may[judged] = True
    choosing = np.flatnonzero(candidates & ~may)  # these were learned from
    if len(choosing) < len(judged):
        group = target.values if target.names is not None else np.zeros(len(may), dtype=np.int64)
        half, judged = split_halves(np.where(may, group, -1).astype(np.int64), seed=seed)
        choosing = np.union1d(choosing, half)
    return make_split(target, choosing, judged, seed)


def make_split(target: Target, choosing: NDArray[np.int64], judged: NDArray[np.int64], seed: int) -> Split:
    """What is predicted of images that choose and of others that judge; images without a value are left out.

    Raises SettingsError when less than two classes, or less than two different numbers, are left.
    """
    choosing, judged = choosing[target.present[choosing]], judged[target.present[judged]]
    if target.names is not None:
        return _keep_classes(target, choosing, judged, seed)
    choosing = np.sort(np.random.Generator(np.random.Philox(seed)).permutation(choosing)[:N_CHOOSING])
    truth = target.values[choosing], target.values[judged]
    if len(choosing) < LEAST or min(len(np.unique(values)) for values in truth) < 2:
        raise SettingsError(
            f"The column {target.column!r} has fewer than two different numbers on the {len(choosing):,} images that "
            f"choose or on the {len(judged):,} that judge. Give more images, or name another column."
        )
    return Split(choosing, judged, truth, None)


def _keep_classes(target: Target, choosing: NDArray[np.int64], judged: NDArray[np.int64], seed: int) -> Split:
    assert target.names is not None
    n_classes = len(target.names)
    of_choosing, of_judged = target.values[choosing], target.values[judged]
    in_choosing, in_judged = (np.bincount(part, minlength=n_classes) for part in (of_choosing, of_judged))
    kept = (in_choosing >= LEAST) & (in_judged > 0)
    there = in_choosing + in_judged > 0
    if kept.sum() < 2:
        raise SettingsError(
            f"A probe tells classes apart, but of the {int(there.sum()):,} classes of the column {target.column!r} "
            f"{int(kept.sum())} has {LEAST} images to choose on and one to judge. Give more images of each class, or "
            "name another column."
        )
    left_out = int((in_choosing + in_judged)[~kept].sum())
    number = np.cumsum(kept) - 1
    choosing, judged = choosing[kept[of_choosing]], judged[kept[of_judged]]
    classes = number[target.values[choosing]]
    chosen = _limit(classes, N_CHOOSING, seed)
    return Split(
        choosing[chosen], judged, (classes[chosen], number[target.values[judged]]),
        tuple(name for name, keep in zip(target.names, kept, strict=True) if keep),
        int((there & ~kept).sum()), left_out,
    )  # fmt: skip


def _limit(classes: NDArray[np.int64], limit: int, seed: int) -> NDArray[np.int64]:
    """At most about `limit` of some images at random, ascending: the same share of each class, but at least two."""
    if len(classes) <= limit:
        return np.arange(len(classes))
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(classes))
    order = order[np.argsort(classes[order], kind="stable")]
    sizes = np.bincount(classes)
    place = np.arange(len(classes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(order[place < np.maximum(LEAST, sizes * limit // len(classes))[classes[order]]])
