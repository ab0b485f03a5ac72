"""Which token is what: special tokens first, then the patches in raster order."""

import math
from typing import NamedTuple

from actcache.errors import SettingsError

USUAL = (("cls",), (), ("cls", "reg", "reg", "reg", "reg"))
"""Special tokens that are tried where nothing is said: those of CLIP, SigLIP, and DINOv2 with registers."""


class TokenShape(NamedTuple):
    """The special tokens, the grid of patches, and which of the two were guessed."""

    prefix: tuple[str, ...]
    grid: tuple[int, int]
    guessed: tuple[str, ...]


def find_tokens(n_tokens: int, prefix: tuple[str, ...] | None, grid: tuple[int, int] | None) -> TokenShape:
    """What the tokens of an image are, where prefix or grid may be None: patches are then taken to form a square, and
    the special tokens to be usual ones. One token is one patch, which covers the picture.

    Raises SettingsError if nothing, or what was given, adds up to `n_tokens`.
    """
    guessed = tuple(name for name, value in (("prefix", prefix), ("grid", grid)) if value is None)
    for kinds in USUAL if prefix is None else (prefix,):
        n_patches = n_tokens - len(kinds)
        side = math.isqrt(max(n_patches, 0))
        rows, columns = grid or (side, side)
        if n_patches >= 1 and rows * columns == n_patches:
            return TokenShape(kinds, (rows, columns), guessed)
    shown = "usual special tokens" if prefix is None else f"--prefix {', '.join(prefix) or 'none'}"
    patches = "a square of patches" if grid is None else f"--grid {grid[0]}x{grid[1]}"
    raise SettingsError(
        f"An image has {n_tokens:,} tokens here, which is not {shown} and {patches}. "
        "Say what they are: --prefix none, cls or cls,reg:4, and --grid ROWSxCOLUMNS."
    )
