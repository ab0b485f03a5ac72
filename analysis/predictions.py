"""What the model itself says of the images of codes: its zero-shot class, from the cached activations."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.join import open_parents
from analysis.zero_shot import BATCH_IMAGES, as_numpy, batches, open_zero_shot
from saetrain import CodeStore


@torch.no_grad()
def predict_classes(
    codes: CodeStore,
    *,
    templates: str | Sequence[str] = "photo",
    model: str | None = None,
    pretrained: str | None = None,
    device: str = "auto",
    on_progress: Callable[[int, int], None] | None = None,
) -> NDArray[Any]:
    """[I] class names, "" for an image without a label or that could not be read.

    Args:
        templates, model, pretrained, device: as `open_zero_shot`. The store is found where the codes say.

    Raises:
        ParentMismatchError: something else lies where the store was. Others as `open_zero_shot`.
    """
    scene = open_zero_shot(
        open_parents(codes), codes.hook_point, templates=templates, model=model, pretrained=pretrained, device=device
    )
    said, done = np.full(codes.n_images, "", dtype=object), 0
    for images in batches(scene.images, BATCH_IMAGES):
        said[images] = np.array(scene.names, dtype=object)[as_numpy(scene.logits(scene.read(images)).argmax(1))]
        done += len(images)
        if on_progress:
            on_progress(done, len(scene.images))
    return said
