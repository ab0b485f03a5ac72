from .pixel_masks import PixelMasks, read_masks
from .recovery import Labeled, Recovered, recover_concepts
from .scores import Localization, localize, score_latents

__all__ = [
    "Labeled",
    "Localization",
    "PixelMasks",
    "Recovered",
    "localize",
    "read_masks",
    "recover_concepts",
    "score_latents",
]
