"""What is asked of a tower's weights, whatever their library: which they are, and whether they fit the architecture.

In: a model's tensors, the names of architectures, tags and weights. Out: a hash, an error, a hint.
Imports nothing heavy.
"""

import difflib
import hashlib
from collections.abc import Mapping
from typing import Any

from actcache.errors import ModelError


def hash_weights(clip: Any) -> str:
    """sha256 over name, shape and float32 bytes of every tensor of a module, in name order."""
    return hash_tensors(clip.state_dict())


def hash_tensors(tensors: Mapping[str, Any]) -> str:
    """sha256 over name, shape and float32 bytes of every tensor, in name order."""
    total = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        total.update(f"{key} {tuple(value.shape)}".encode())
        total.update(value.detach().float().cpu().contiguous().numpy().data)
    return total.hexdigest()


def check_quick_gelu(name: str, architecture: bool, pretrained: str, weights: bool) -> None:
    """Raise when weights trained with QuickGELU meet an architecture without, or the reverse.

    open_clip only warns, and every activation would be quietly wrong.
    """
    if architecture != weights:
        other = name + "-quickgelu" if weights else name.removesuffix("-quickgelu")
        raise ModelError(
            f"{pretrained} was trained {'with' if weights else 'without'} QuickGELU and {name} is "
            f"{'with' if architecture else 'without'} it. Use --model {other}."
        )


def say_near(word: str, words: list[str]) -> str:
    """` Near: a, b.`, the words most like this one, or nothing."""
    near = difflib.get_close_matches(word, words, n=4, cutoff=0.5)
    return f" Near: {', '.join(near)}." if near else ""
