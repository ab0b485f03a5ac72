from .constants import InputConstants, read_constants
from .conversion import Conversion, convert
from .formats import find_writer, read_foreign
from .imported import write_imported
from .parity import Parity, compare, read_rows
from .publication import (
    CONFIG_FILE,
    PublishedSAE,
    PublishedTower,
    PublishedTraining,
    encode_published,
    is_published,
)
from .sources import find_source
from .towers import OF_EMBEDDINGS, TowerHint, name_tower

__all__ = [
    "CONFIG_FILE",
    "OF_EMBEDDINGS",
    "Conversion",
    "InputConstants",
    "Parity",
    "PublishedSAE",
    "PublishedTower",
    "PublishedTraining",
    "TowerHint",
    "compare",
    "convert",
    "encode_published",
    "find_source",
    "find_writer",
    "is_published",
    "name_tower",
    "read_constants",
    "read_foreign",
    "read_rows",
    "write_imported",
]
