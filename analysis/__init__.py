"""analysis: codes -> concepts -> report, by dask, offline.

The front door; `__init__.pyi` lists it. Names load on first use; what needs no model never loads torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
