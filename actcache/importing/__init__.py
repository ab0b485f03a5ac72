"""Importing: activations that somebody else has made become a store; and the writer that a program of yours can call.

The door; `__init__.pyi` lists what other sub-packages may use. Names load on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
