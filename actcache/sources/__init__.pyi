from .folder import ImageFolder
from .hugging_face import HuggingFaceDataset
from .images import decode_image, describe_failures
from .parquet_images import ImageParquet
from .plan import ImagePlan, plan_images
from .resizing import resize_image, resize_mask
from .source import ImageSource, open_source, reopen_source
from .table import ImageTable
from .table_file import read_table
from .tars import ImageTars

__all__ = [
    "HuggingFaceDataset",
    "ImageFolder",
    "ImageParquet",
    "ImagePlan",
    "ImageSource",
    "ImageTable",
    "ImageTars",
    "decode_image",
    "describe_failures",
    "open_source",
    "plan_images",
    "read_table",
    "reopen_source",
    "resize_image",
    "resize_mask",
]
