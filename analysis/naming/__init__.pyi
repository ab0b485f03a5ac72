from .files import METHODS, add_names, find_names, find_names_of, read_name_table, read_names, read_own_names, set_name
from .naming import name_latents
from .vocabulary import read_vocabulary

__all__ = [
    "METHODS",
    "add_names",
    "find_names",
    "find_names_of",
    "name_latents",
    "read_name_table",
    "read_names",
    "read_own_names",
    "read_vocabulary",
    "set_name",
]
