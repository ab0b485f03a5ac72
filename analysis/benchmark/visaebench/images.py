"""ProtocolImages: the images and labels that a metric of the package sees, and its split into training and test."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from actcache import SettingsError
from actcache.store import StoreGroup
from analysis.classifier import label_names

SEED = 42
TEST_SHARE = 0.2


@dataclass(frozen=True)
class ProtocolImages:
    """All readable images with a label, or all readable images where none has a label.

    Attributes:
        images: [N] stored positions, ascending; this is the order in which the package is given them.
        labels: [N] number of the class of each image; None without labels.
        names: the name of each number.
    """

    store: StoreGroup
    images: NDArray[np.int64]
    labels: NDArray[np.int64] | None
    names: Mapping[int, str]

    @classmethod
    def of(cls, store: StoreGroup) -> "ProtocolImages":
        """The images of a store. The classes have the numbers that the store gives them, where these are unique."""
        names = label_names(store)
        labeled = store.valid & names.astype(bool)
        if not labeled.any():
            return cls(store, np.flatnonzero(store.valid), None, {})
        images = np.flatnonzero(labeled)
        given = np.asarray(store.images["label"].to_numpy(), dtype=np.int64)[images]
        pairs = set(zip(given.tolist(), names[images].tolist(), strict=True))
        if given.min() < 0 or len({number for number, _ in pairs}) < len(pairs) or len(dict(pairs)) < len(pairs):
            given = np.unique(names[images].astype(str), return_inverse=True)[1].astype(np.int64)
            pairs = set(zip(given.tolist(), names[images].tolist(), strict=True))
        return cls(store, images, given, dict(sorted(pairs)))

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def place(self) -> NDArray[np.int64]:
        """[images of the store]: the number of each stored image among `images`, or -1."""
        place = np.full(self.store.n_images, -1, dtype=np.int64)
        place[self.images] = np.arange(len(self.images))
        return place

    @cached_property
    def classes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(the numbers of the classes that occur [C], which of them each image has [N])."""
        assert self.labels is not None
        numbers, index = np.unique(self.labels, return_inverse=True)
        return numbers, index.astype(np.int64)

    @cached_property
    def split(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(training, test) numbers among `images`: scikit-learn's split of the package, stratified where it is.

        `bincount` has a zero for every number below the largest that no image has, and then the split is at random.

        Raises:
            SettingsError: there is no such split, on which the package fails, too.
        """
        from sklearn.model_selection import train_test_split

        if self.labels is None:
            raise SettingsError(f"no image of {self.store.path.name} has a label; extract a folder of class folders")
        if len(self.names) < 2:
            raise SettingsError(f"all images of {self.store.path.name} have one class; give images of several")
        stratify = self.labels if np.bincount(self.labels).min() >= 2 else None
        try:
            train, test = train_test_split(
                np.arange(len(self.images)), test_size=TEST_SHARE, stratify=stratify, random_state=SEED
            )
        except ValueError as error:
            raise SettingsError(
                f"{len(self.images)} images of {len(self.names)} classes are too few for a stratified split ({error}) "
                "and the package fails, too; give more images"
            ) from error
        if len(np.unique(self.labels[train])) < 2:
            raise SettingsError("the training part has one class; give more images")
        return train, test
