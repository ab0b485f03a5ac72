"""What an SAE sees in a few images, without a store: tables of latents, heat maps, a sheet or a page.

The door; `__init__.pyi` lists what other sub-packages may use. Names load on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
