from .latents import ShownLatent, ShownLatents, show_latents
from .looking import layout_of, look, see_images
from .tower import Pair, open_pair
from .view import Look, View

__all__ = [
    "Look",
    "Pair",
    "ShownLatent",
    "ShownLatents",
    "View",
    "layout_of",
    "look",
    "open_pair",
    "see_images",
    "show_latents",
]
