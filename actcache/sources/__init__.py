"""Image sources: a folder, a table of paths, webdataset tars, a Hugging Face dataset on disk.

`open_source` tells which one lies at a path. Each lists its images without reading a pixel and reads one by its uri.
"""

from actcache.sources.folder import ImageFolder
from actcache.sources.hugging_face import HuggingFaceDataset
from actcache.sources.source import ImageSource, open_source
from actcache.sources.table import ImageTable, read_table
from actcache.sources.tars import ImageTars

__all__ = ["HuggingFaceDataset", "ImageFolder", "ImageSource", "ImageTable", "ImageTars", "open_source", "read_table"]
