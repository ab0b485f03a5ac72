"""Where in an image a latent fires: heat maps over the patch grid, upsampled to pixels, and thresholded. numpy only.

In: codes, a latent, images. Out: float32 [n, rows, columns] in the units of the codes, or pixels [n, height, width].
Pixels that no patch covers (`CodeStore.covered`) belong to no heat map.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache import SettingsError
from saetrain import CodeStore


def heat_maps(codes: CodeStore, latent: int, images: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
    """Patch activations of one latent on some images (stored positions): [n, rows, columns].

    Raises:
        SettingsError: the latent or an image is out of range.
    """
    images = np.asarray(images, dtype=np.int64)
    if len(images) and not 0 <= images.min() <= images.max() < codes.n_images:
        raise SettingsError(f"Images must lie in 0..{codes.n_images - 1}, got {images.min()}..{images.max()}.")
    rows, values = codes.read_latent(latent)
    maps = np.zeros((len(images), codes.n_tokens), dtype=np.float32)
    start = np.searchsorted(rows, images * codes.n_tokens)
    count = np.searchsorted(rows, (images + 1) * codes.n_tokens) - start
    entry = np.repeat(start - np.cumsum(count) + count, count) + np.arange(count.sum())
    maps[np.repeat(np.arange(len(images)), count), rows[entry] % codes.n_tokens] = values[entry]
    return maps[:, 1:].reshape(len(images), *codes.grid)


def threshold_heat_maps(
    codes: CodeStore, latent: int, images: NDArray[np.int64], *, size: tuple[int, int], threshold: float = 0.0
) -> NDArray[np.bool_]:
    """Pixels at which a latent's bilinearly upsampled heat map exceeds a threshold: [n, height, width].

    Args:
        size: height and width of the picture that the model saw.
    """
    return upsample(heat_maps(codes, latent, images), *size, covered=codes.covered) > threshold


def upsample(
    heat: NDArray[np.float32], height: int, width: int, *, covered: tuple[float, float] = (1.0, 1.0)
) -> NDArray[np.float32]:
    """Bilinear interpolation with aligned pixel centers: [n, rows, columns] -> [n, height, width].

    Args:
        covered: the share of height and width over which the patches lie; beyond it there is 0.
    """
    down, across = _weights(heat.shape[1], height, covered[0]), _weights(heat.shape[2], width, covered[1])
    return np.asarray(down @ heat @ across.T)


def check_patches(codes: CodeStore) -> None:
    """Raise SettingsError when the codes hold CLS only."""
    if codes.tokens == "cls":
        raise SettingsError(
            f"{codes.path} holds codes of CLS only, so no place can be shown. Encode with `--tokens all`."
        )


def _weights(n_in: int, n_out: int, covered: float) -> NDArray[Any]:
    place = (np.arange(n_out) + 0.5) * n_in / (n_out * covered) - 0.5
    position = np.clip(place, 0, n_in - 1)[:, None]
    weights = np.maximum(0, 1 - abs(position - np.arange(n_in))) * (place < n_in - 0.5)[:, None]
    return np.asarray(weights.astype(np.float32))
