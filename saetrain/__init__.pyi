from .codes import CodeStore, LatentCodes, RowCodes, ShardCodes
from .config import SAEConfig, TrainConfig
from .conversion import Conversion, Parity, convert
from .encoding import encode
from .loader import ActivationLoader, Batch
from .metrics import evaluate
from .order import held_out_images, split_images, train_images
from .run import Run
from .sae import SAE
from .trainer import sweep, train

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
