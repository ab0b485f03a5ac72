"""split_wanted(): the images of some stores that are trained on, and those that are held out. No torch."""

import numpy as np
from numpy.typing import NDArray

from actcache.store import StoreGroup, select_images
from saetrain.data.order import split_images


def split_wanted(stores: StoreGroup, where: str | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(training images, held-out images) that could be read and match the filter `where`, as positions over all stores.

    Raises SettingsError for a filter that cannot be read.
    """
    wanted = stores.valid if where is None else stores.valid & select_images(stores.images, where)
    images, held_out = split_images([member.n_images for member in stores.stores])
    return images[wanted[images]], held_out[wanted[held_out]]
