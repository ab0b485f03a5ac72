from .accuracy import ZERO_SHOT, PromptSettings, PromptsSummary
from .adaptation import Adaptation, adapt
from .artifact import open_prompts
from .checkpoints import read_prompt_checkpoint, write_prompt_checkpoint
from .class_names import (
    class_words,
    describe_shared_texts,
    digest_class_names,
    read_class_names,
    warn_about_shared_texts,
)
from .config import PromptConfig
from .prompts import Prompts
from .shots import learned_by_model, recorded_shots
from .towers import Towers, open_towers, open_vision_tower, prompt_vision

__all__ = [
    "ZERO_SHOT",
    "Adaptation",
    "PromptConfig",
    "PromptSettings",
    "Prompts",
    "PromptsSummary",
    "Towers",
    "adapt",
    "class_words",
    "describe_shared_texts",
    "digest_class_names",
    "learned_by_model",
    "open_prompts",
    "open_towers",
    "open_vision_tower",
    "prompt_vision",
    "read_class_names",
    "read_prompt_checkpoint",
    "recorded_shots",
    "warn_about_shared_texts",
    "write_prompt_checkpoint",
]
