"""Prompt tuning: the prompts of five methods, the towers they change, their training and their files.

The door; `__init__.pyi` lists what other sub-packages may use. Names load on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
