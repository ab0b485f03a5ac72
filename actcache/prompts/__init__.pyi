from .adaptation import Adaptation, adapt
from .artifact import open_prompts
from .checkpoints import read_prompt_checkpoint, write_prompt_checkpoint
from .config import PromptConfig
from .few_shot import class_words
from .prompts import Prompts
from .shots import learned_by_model, recorded_shots
from .towers import Towers, open_towers, prompt_vision

__all__ = [
    "Adaptation",
    "PromptConfig",
    "Prompts",
    "Towers",
    "adapt",
    "class_words",
    "learned_by_model",
    "open_prompts",
    "open_towers",
    "prompt_vision",
    "read_prompt_checkpoint",
    "recorded_shots",
    "write_prompt_checkpoint",
]
