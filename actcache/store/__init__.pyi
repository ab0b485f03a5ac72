from .beside_seal import read_signed_table, sign_table
from .channel_statistics import ChannelStatistics
from .codecs import check_codec, check_dtype
from .description import describe
from .group import StoreGroup, Stores, open_stores
from .image_statistics import statistics_of_images
from .image_table import (
    CONTENT_FILE,
    IMAGES_FILE,
    check_images_footer,
    load_images,
    read_column,
    read_images,
    table_errors,
)
from .layout import StoreLayout, Tokens, choose_shape
from .provenance import (
    NO_IMAGES,
    find_image_source,
    find_origin,
    read_only_name,
    recorded_list,
    recorded_name,
    records,
    remember_paths,
)
from .reader import ActivationStore
from .settings import ImportedFrom, StoreSettings
from .shard_files import aligned_empty
from .space import check_space, free_bytes, shard_bytes
from .verification import FOREIGN, LINK, Verification, verify
from .where import select_images
from .writer import ShardWriter, begin_store, seal_store

__all__ = [
    "CONTENT_FILE",
    "FOREIGN",
    "IMAGES_FILE",
    "LINK",
    "NO_IMAGES",
    "ActivationStore",
    "ChannelStatistics",
    "ImportedFrom",
    "ShardWriter",
    "StoreGroup",
    "StoreLayout",
    "StoreSettings",
    "Stores",
    "Tokens",
    "Verification",
    "aligned_empty",
    "begin_store",
    "check_codec",
    "check_dtype",
    "check_images_footer",
    "check_space",
    "choose_shape",
    "describe",
    "find_image_source",
    "find_origin",
    "free_bytes",
    "load_images",
    "open_stores",
    "read_column",
    "read_images",
    "read_only_name",
    "read_signed_table",
    "recorded_list",
    "recorded_name",
    "records",
    "remember_paths",
    "seal_store",
    "select_images",
    "shard_bytes",
    "sign_table",
    "statistics_of_images",
    "table_errors",
    "verify",
]
