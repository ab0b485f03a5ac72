from .conversion import Conversion, convert
from .parity import Parity
from .sources import find_source

__all__ = ["Conversion", "Parity", "convert", "find_source"]
