from .config import ExtractConfig
from .extraction import extract
from .plan import estimate, find_patch_size
from .repair import repair

__all__ = ["ExtractConfig", "estimate", "extract", "find_patch_size", "repair"]
