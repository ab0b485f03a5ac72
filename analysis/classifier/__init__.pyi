from .embeddings import BLOCK_LATENTS, embed_directions, embed_stored_images
from .outcomes import Outcome, Outcomes
from .splicing import Spliced, choose_tokens, splice
from .zero_shot import (
    BATCH_IMAGES,
    ClassifiedImages,
    ZeroShot,
    as_numpy,
    batches,
    check_images,
    choose_classes,
    choose_images,
    describe_config,
    open_zero_shot,
    predict_classes,
    sample_images,
)

__all__ = [
    "BATCH_IMAGES",
    "BLOCK_LATENTS",
    "ClassifiedImages",
    "Outcome",
    "Outcomes",
    "Spliced",
    "ZeroShot",
    "as_numpy",
    "batches",
    "check_images",
    "choose_classes",
    "choose_images",
    "choose_tokens",
    "describe_config",
    "embed_directions",
    "embed_stored_images",
    "open_zero_shot",
    "predict_classes",
    "sample_images",
    "splice",
]
