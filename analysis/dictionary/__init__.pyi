from .inspection import inspect_dictionaries

__all__ = ["inspect_dictionaries"]
