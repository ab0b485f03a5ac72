from .trainer import sweep, train

__all__ = ["sweep", "train"]
