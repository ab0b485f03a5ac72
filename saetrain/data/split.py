"""split_wanted(): the images of some stores that are trained on, and those that are held out. No torch."""

import numpy as np
from numpy.typing import NDArray

from actcache.store import StoreGroup
from saetrain.data.order import split_images


def split_wanted(stores: StoreGroup, wanted: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(training images, held-out images) of those that are wanted [I], as positions over all stores."""
    images, held_out = split_images([member.n_images for member in stores.stores])
    return images[wanted[images]], held_out[wanted[held_out]]
