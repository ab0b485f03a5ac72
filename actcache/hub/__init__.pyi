from .address import HubAddress, is_hub_address, parse_address
from .client import fetch_file, limit_waits
from .download import copy_files, fetch_files
from .listing import HubListing, list_files, list_repository
from .upload import upload_folder

__all__ = [
    "HubAddress",
    "HubListing",
    "copy_files",
    "fetch_file",
    "fetch_files",
    "is_hub_address",
    "limit_waits",
    "list_files",
    "list_repository",
    "parse_address",
    "upload_folder",
]
