from .conversion import Conversion, convert
from .parity import Parity

__all__ = ["Conversion", "Parity", "convert"]
