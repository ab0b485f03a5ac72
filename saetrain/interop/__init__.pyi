from .conversion import Conversion, convert
from .formats import find_writer, read_foreign
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

__all__ = [
    "CONFIG_FILE",
    "Conversion",
    "Parity",
    "PublishedSAE",
    "PublishedTower",
    "PublishedTraining",
    "compare",
    "convert",
    "encode_published",
    "find_source",
    "find_writer",
    "is_published",
    "read_foreign",
    "read_rows",
]
