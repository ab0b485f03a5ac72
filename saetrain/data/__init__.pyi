from .loader import ActivationLoader, Batch
from .order import held_out_images, split_images, train_images

__all__ = ["ActivationLoader", "Batch", "held_out_images", "split_images", "train_images"]
