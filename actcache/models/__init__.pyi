from .anatomy import take_apart
from .clip import Clip, hash_tensors, load_clip
from .device import choose_device, choose_precision, free_memory, has_cpu_bfloat16, own_gpu, precise_dtype
from .own_classes import own_classes
from .refusals import PROMPTS_REFUSED
from .templates import read_templates
from .text import TextTower, make_text_tower
from .vision import VisionTower, compile_tower, load_vision_tower, make_vision_tower
from .weight_files import find_repository, find_tag_of

__all__ = [
    "PROMPTS_REFUSED",
    "Clip",
    "TextTower",
    "VisionTower",
    "choose_device",
    "choose_precision",
    "compile_tower",
    "find_repository",
    "find_tag_of",
    "free_memory",
    "has_cpu_bfloat16",
    "hash_tensors",
    "load_clip",
    "load_vision_tower",
    "make_text_tower",
    "make_vision_tower",
    "own_classes",
    "own_gpu",
    "precise_dtype",
    "read_templates",
    "take_apart",
]
