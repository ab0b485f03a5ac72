from .files import (
    add_names,
    change_own,
    find_names,
    find_names_of,
    read_name_table,
    read_names,
    read_origins,
    read_own_names,
    set_name,
    write_beside_seal,
)
from .naming import name_latents
from .vocabulary import read_vocabulary

__all__ = [
    "add_names",
    "change_own",
    "find_names",
    "find_names_of",
    "name_latents",
    "read_name_table",
    "read_names",
    "read_origins",
    "read_own_names",
    "read_vocabulary",
    "set_name",
    "write_beside_seal",
]
