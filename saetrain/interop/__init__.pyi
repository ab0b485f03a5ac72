from .conversion import Conversion, Parity, convert

__all__ = ["Conversion", "Parity", "convert"]
