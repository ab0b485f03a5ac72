from .accuracy import PromptSettings, PromptsSummary
from .adaptation import Adaptation, adapt
from .artifact import open_prompts
from .checkpoints import read_prompt_checkpoint, write_prompt_checkpoint
from .config import PromptConfig
from .few_shot import class_words
from .prompts import Prompts
from .towers import Towers, open_towers, prompt_vision

__all__ = [
    "Adaptation",
    "PromptConfig",
    "PromptSettings",
    "Prompts",
    "PromptsSummary",
    "Towers",
    "adapt",
    "class_words",
    "open_prompts",
    "open_towers",
    "prompt_vision",
    "read_prompt_checkpoint",
    "write_prompt_checkpoint",
]
