"""Image sources: a folder, a table of paths, webdataset tars and a Hugging Face dataset on disk.

`open_source` tells which one lies at a path. Each lists its images without reading a pixel and reads one by its uri.

The door; `__init__.pyi` lists what other sub-packages may use. Names load on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
