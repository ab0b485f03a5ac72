from .codes import CodeStore, LatentCodes, RowCodes, ShardCodes, encode
from .config import SAEConfig, TrainConfig
from .data import ActivationLoader, Batch, held_out_images, split_images, train_images
from .interop import Conversion, Parity, convert
from .metrics import evaluate
from .model import SAE
from .run import Run
from .training import sweep, train

__all__ = [
    "SAE",
    "ActivationLoader",
    "Batch",
    "CodeStore",
    "Conversion",
    "LatentCodes",
    "Parity",
    "RowCodes",
    "Run",
    "SAEConfig",
    "ShardCodes",
    "TrainConfig",
    "convert",
    "encode",
    "evaluate",
    "held_out_images",
    "split_images",
    "sweep",
    "train",
    "train_images",
]
