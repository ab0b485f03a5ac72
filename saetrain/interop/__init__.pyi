from .constants import InputConstants, read_constants
from .conversion import Conversion, convert
from .formats import read_foreign
from .parity import Parity
from .sources import find_source
from .towers import OF_EMBEDDINGS, TowerHint, name_tower

__all__ = [
    "OF_EMBEDDINGS",
    "Conversion",
    "InputConstants",
    "Parity",
    "TowerHint",
    "convert",
    "find_source",
    "name_tower",
    "read_constants",
    "read_foreign",
]
