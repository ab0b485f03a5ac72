from .attribution import attribute, delete_latents
from .fidelity import compare_variants, evaluate_fidelity
from .latent_choice import LatentCounts, count_in_codes, match_frequency, rank_latents, split_halves
from .latent_masks import Condition, classify_masked, count_in_stream, make_masks
from .masking_curve import mask_latents
from .steering import measure_steerability, set_latents
from .study import Study, check_grid

__all__ = [
    "Condition",
    "LatentCounts",
    "Study",
    "attribute",
    "check_grid",
    "classify_masked",
    "compare_variants",
    "count_in_codes",
    "count_in_stream",
    "delete_latents",
    "evaluate_fidelity",
    "make_masks",
    "mask_latents",
    "match_frequency",
    "measure_steerability",
    "rank_latents",
    "set_latents",
    "split_halves",
]
