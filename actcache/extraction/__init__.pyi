from .config import ExtractConfig
from .extraction import extract
from .plan import estimate
from .repair import repair

__all__ = ["ExtractConfig", "estimate", "extract", "repair"]
