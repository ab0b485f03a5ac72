"""Embeddings of a store's images: from cached activations through the remaining blocks, or from the image files.

Both ways give the same unit vectors, up to the rounding of the stored dtype.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from actcache import HookPoint, SettingsError, open_stores
from actcache.models import VisionTower
from actcache.progress import Progress
from actcache.sources import decode_image, reopen_source
from actcache.store import StoreGroup, Stores
from analysis.classifier.streams import BATCH_IMAGES, as_numpy, batches, read_stream
from saetrain import SAE


@torch.no_grad()
def embed_stored_images(
    store: Stores | StoreGroup,
    images: NDArray[np.int64],
    *,
    vision: VisionTower,
    files: str | Path | None = None,
    batch_size: int = BATCH_IMAGES,
    on_progress: Progress | None = None,
) -> NDArray[np.float32]:
    """Unit embeddings [n, E] of stored images; NaN for an image that could not be read.

    Args:
        images: stored positions.
        vision: the tower the store was extracted with.
        files: read the images from here instead; needed if the store holds no block's output.

    Raises:
        SettingsError: no hook point to continue from. ImageSourceError: a file that is missing.
    """
    store = open_stores(store)
    hook = None if files is not None else last_output(store)
    source = None if files is None else reopen_source(files, store.stores[0].settings.columns)
    out = np.full((len(images), vision.embed_dim), np.nan, dtype=np.float32)
    readable = np.flatnonzero(store.valid[images])
    for places in batches(readable, batch_size, on_progress):
        positions = images[places]
        if hook is not None:
            x, start = read_stream(store, hook, positions).to(vision.device), hook.layer + 1
        else:
            assert source is not None
            uris = store.images["uri"].take(positions).to_pylist()
            images_seen = (decode_image(source.read(uri), name=uri, preprocess=vision.preprocess) for uri in uris)
            pixels = [vision.transform(image) for image in images_seen]
            x, start = vision.embed(torch.stack(pixels)), 0
        embedded = F.normalize(vision.head(vision.run_blocks(x, start, vision.n_layers)), dim=1)
        out[places] = as_numpy(embedded)
    return out


def last_output(store: StoreGroup) -> HookPoint:
    """The stored block output closest to the head. Raises SettingsError if there is none."""
    outputs = [hook for hook in store.stores[0].hook_points if hook.site == "resid_post"]
    if not outputs:
        raise SettingsError(
            f"{store.path} holds no block's output (resid_post) from which the rest of the model could be run. "
            "Give the image files with --images."
        )
    return store.hook_point(max(outputs, key=lambda hook: hook.layer))


BLOCK_LATENTS = 1024


def embed_directions(sae: SAE, vision: VisionTower) -> Tensor:
    """Every latent's decoder direction, sent through the head: unit vectors [F, E]."""
    return read_directions(sae, vision, lambda x: F.normalize(vision.head(x), dim=1))


@torch.no_grad()
def read_directions(sae: SAE, vision: VisionTower, read: Callable[[Tensor], Tensor]) -> Tensor:
    """What is read from every latent's decoder direction, as if it were the stream of an image ("logit lens"): [F, E].

    The direction is the whole stream, in activation units and without the bias. Where an SAE normalizes each token, a
    latent adds the same direction to all of them, times the token's size; here that of a token of size 1.

    Args:
        read: the stream after the last block [B, T, D] -> [B, E].
    """
    directions = (sae.decoder / sae.scale).to(vision.device)
    n_tokens = len(vision.prefix) + 1  # as every special token and as a patch, since a head may take any of them
    parts = torch.split(directions, BLOCK_LATENTS)
    return torch.cat([read(part[:, None].expand(-1, n_tokens, -1)).cpu() for part in parts])
