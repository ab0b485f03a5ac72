from .conversion import Conversion, convert
from .formats import read_foreign
from .parity import Parity
from .sources import find_source
from .towers import TowerHint, name_tower

__all__ = ["Conversion", "Parity", "TowerHint", "convert", "find_source", "name_tower", "read_foreign"]
