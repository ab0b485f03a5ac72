from .answers import Answers, predict_classes
from .classifier import Classifier
from .embeddings import BLOCK_LATENTS, embed_directions, embed_stored_images, read_directions
from .judge import choose_judge, open_judge
from .labeled_images import (
    ClassifiedImages,
    check_images,
    choose_classes,
    choose_images,
    describe_config,
    label_names,
    sample_images,
)
from .logistic import choose_validation, fit_logistic, standardize
from .outcomes import Outcome, Outcomes
from .probe import LinearProbe, fit_probe
from .probe_training import ProbeTraining, choose_training
from .splicing import Spliced, choose_tokens, splice
from .streams import BATCH_IMAGES, as_numpy, batches

__all__ = [
    "BATCH_IMAGES",
    "BLOCK_LATENTS",
    "Answers",
    "ClassifiedImages",
    "Classifier",
    "LinearProbe",
    "Outcome",
    "Outcomes",
    "ProbeTraining",
    "Spliced",
    "as_numpy",
    "batches",
    "check_images",
    "choose_classes",
    "choose_images",
    "choose_judge",
    "choose_tokens",
    "choose_training",
    "choose_validation",
    "describe_config",
    "embed_directions",
    "embed_stored_images",
    "fit_logistic",
    "fit_probe",
    "label_names",
    "open_judge",
    "predict_classes",
    "read_directions",
    "sample_images",
    "splice",
    "standardize",
]
