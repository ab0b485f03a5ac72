from .active_latents import Code, Lap, no_lap, select_batch_topk, select_topk
from .exact_encoder import Encoder, encoder_bytes, make_encoder
from .sae import SAE
from .sparse import gradient, preactivations, reconstruct
from .threads import cut_rows, spread

__all__ = [
    "SAE",
    "Code",
    "Encoder",
    "Lap",
    "cut_rows",
    "encoder_bytes",
    "gradient",
    "make_encoder",
    "no_lap",
    "preactivations",
    "reconstruct",
    "select_batch_topk",
    "select_topk",
    "spread",
]
