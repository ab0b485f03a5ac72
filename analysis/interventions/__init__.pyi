from .attribution import delete_latents
from .fidelity import evaluate_fidelity
from .latent_choice import LatentCounts, count_in_codes, match_frequency, rank_latents, split_halves
from .latent_masks import Mask, count_in_stream
from .masking_curve import mask_latents
from .steering import measure_steerability, set_latents
from .study import Judge

__all__ = [
    "Judge",
    "LatentCounts",
    "Mask",
    "count_in_codes",
    "count_in_stream",
    "delete_latents",
    "evaluate_fidelity",
    "mask_latents",
    "match_frequency",
    "measure_steerability",
    "rank_latents",
    "set_latents",
    "split_halves",
]
