from .batch import Batch
from .loader import ActivationLoader
from .order import held_out_images, split_images, train_images
from .split import split_wanted
from .training_data import TrainingData

__all__ = [
    "ActivationLoader",
    "Batch",
    "TrainingData",
    "held_out_images",
    "split_images",
    "split_wanted",
    "train_images",
]
