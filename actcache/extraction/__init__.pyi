from .extraction import extract
from .plan import estimate
from .repair import repair

__all__ = ["estimate", "extract", "repair"]
