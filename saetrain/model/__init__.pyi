from .active_latents import Code, Lap, no_lap, select_batch_topk, select_topk
from .exact_encoder import Encoder, encoder_bytes, make_encoder
from .sae import SAE
from .sparse import decode, gradient, nested_error, preactivations

__all__ = [
    "SAE",
    "Code",
    "Encoder",
    "Lap",
    "decode",
    "encoder_bytes",
    "gradient",
    "make_encoder",
    "nested_error",
    "no_lap",
    "preactivations",
    "select_batch_topk",
    "select_topk",
]
