"""What a few latents tell about a column of the image table: the k-sparse probe.

The door; `__init__.pyi` lists what other sub-packages may use. Names load on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
