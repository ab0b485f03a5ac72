from .pixel_masks import PixelMasks, read_masks
from .recovery import Labeled, Recovered, recover_concepts
from .scores import localize

__all__ = ["Labeled", "PixelMasks", "Recovered", "localize", "read_masks", "recover_concepts"]
