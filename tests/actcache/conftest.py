"""plain_forward: the reference for a store's values, computed with open_clip and PIL alone."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

BATCH = 16  # extraction's batches in stores of fewer than 1024 images; matmuls round by batch shape

Forward = Callable[[Path, Sequence[str], dict[str, str], int], NDArray[np.float32]]


@pytest.fixture(scope="session")
def plain_forward() -> Forward:
    """forward(folder, uris, model, layer) -> float32 [I, T, D], by open_clip's own forward_intermediates."""
    import open_clip
    import torch
    from safetensors.torch import load_file

    @torch.no_grad()
    def forward(folder: Path, uris: Sequence[str], model: dict[str, str], layer: int) -> NDArray[np.float32]:
        config = json.loads(Path(model["model"]).read_text())
        clip = open_clip.CLIP(**config).eval().requires_grad_(False)  # torch multiplies frozen weights by other kernels
        clip.load_state_dict(load_file(model["pretrained"]))
        transform = open_clip.image_transform(config["vision_cfg"]["image_size"], is_train=False)
        parts = []
        for first in range(0, len(uris), BATCH):
            images = [Image.open(folder / uri).convert("RGB") for uri in uris[first : first + BATCH]]
            out = clip.visual.forward_intermediates(
                torch.stack([transform(image) for image in images]),
                indices=[layer],
                output_fmt="NLC",
                output_extra_tokens=True,
                intermediates_only=True,
            )
            parts.append(torch.cat([out["image_intermediates_prefix"][0], out["image_intermediates"][0]], 1))
        return torch.cat(parts).numpy()

    return forward
