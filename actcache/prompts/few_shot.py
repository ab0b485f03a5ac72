"""Which images a few-shot run uses: classes by the rule of sorted labels, and random images of each class.

In: the labels of images. Out: class names and row numbers. Pure functions; no pixels are read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ImageSourceError, SettingsError
from actcache.options import check_number

CLASSES = ("all", "base", "novel")


@dataclass(frozen=True)
class ClassSplit:
    """The sorted class names, and their two halves in base-to-novel experiments."""

    all: tuple[str, ...]

    @property
    def base(self) -> tuple[str, ...]:
        """The first ceil(n / 2) classes (Zhou et al. 2022, CoCoOp)."""
        return self.all[: -(-len(self.all) // 2)]

    @property
    def novel(self) -> tuple[str, ...]:
        return self.all[-(-len(self.all) // 2) :]

    def choose(self, classes: str) -> tuple[str, ...]:
        """all, base or novel. Raises SettingsError for another word, or if there are fewer than two classes."""
        if classes not in CLASSES:
            raise SettingsError(f"--classes must be one of {', '.join(CLASSES)}, got {classes!r}.")
        chosen: tuple[str, ...] = getattr(self, classes)
        if len(chosen) < 2:
            raise SettingsError(
                f"There are {len(chosen)} {classes} classes ({', '.join(chosen)}). Expected at least two."
            )
        return chosen


def split_classes(label_names: Sequence[str], source: str) -> ClassSplit:
    """The classes of labeled images. Raises ImageSourceError if no image has a label."""
    names = sorted(set(label_names) - {""})
    if not names:
        raise ImageSourceError(
            f"No image of {source} has a label. Expected one folder per class, or a column label_name."
        )
    return ClassSplit(tuple(names))


def choose_shots(
    uris: Sequence[str], label_names: Sequence[str], classes: Sequence[str], shots: int, seed: int
) -> NDArray[np.int64]:
    """Row numbers of `shots` images of each class, class by class; they depend on names and seed, not on the order.

    Raises:
        SettingsError: `shots` is below 1, or a class has fewer images.
    """
    shots = check_number("shots", shots, int, at_least=1)
    labels, order = np.asarray(label_names, dtype=object), np.argsort(np.asarray(uris, dtype=object), kind="stable")
    generator = np.random.Generator(np.random.Philox(seed))
    chosen = []
    for name in classes:
        rows = order[labels[order] == name]
        if len(rows) < shots:
            raise SettingsError(f"Class {name!r} has {len(rows)} images, but --shots is {shots}. Lower --shots.")
        chosen.append(rows[np.sort(generator.permutation(len(rows))[:shots])])
    return np.concatenate(chosen)
