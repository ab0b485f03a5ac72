from .config import ImportConfig
from .importing import import_activations
from .writer import StoreWriter, write_store

__all__ = ["ImportConfig", "StoreWriter", "import_activations", "write_store"]
