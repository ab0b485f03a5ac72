from .channel_statistics import ChannelStatistics
from .codecs import check_codec, check_dtype
from .description import describe
from .group import StoreGroup, Stores, open_stores, read_extra
from .image_statistics import statistics_of_images
from .layout import StoreLayout, choose_shape
from .provenance import find_image_source, find_origin, remember_paths, whole_path
from .reader import CONTENT_FILE, IMAGES_FILE, ActivationStore, Tokens, read_column, read_images
from .settings import StoreSettings
from .shard_files import aligned_empty
from .verification import FOREIGN, LINK, Verification, verify
from .where import select_images
from .writer import ShardWriter, begin_store, seal_store

__all__ = [
    "CONTENT_FILE",
    "FOREIGN",
    "IMAGES_FILE",
    "LINK",
    "ActivationStore",
    "ChannelStatistics",
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
    "choose_shape",
    "describe",
    "find_image_source",
    "find_origin",
    "open_stores",
    "read_column",
    "read_extra",
    "read_images",
    "remember_paths",
    "seal_store",
    "select_images",
    "statistics_of_images",
    "verify",
    "whole_path",
]
