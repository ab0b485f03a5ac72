"""PromptConfig: how prompts are trained, as a frozen dataclass that names them. No torch.

In: a method and what differs from its usual values. Out: `resolve`, with every value filled in for towers of a depth.
"""

from dataclasses import dataclass, replace
from typing import Any

from actcache.errors import SettingsError

_USUAL: dict[str, dict[str, Any]] = {
    "coop": {"n_prompts": 16, "depth": 1, "n_epochs": 200, "batch_size": 32, "lr": 0.002, "augment": False},
    "cocoop": {"n_prompts": 4, "depth": 1, "n_epochs": 10, "batch_size": 1, "lr": 0.002, "augment": False},
    "vpt": {"n_prompts": 8, "depth": 12, "n_epochs": 5, "batch_size": 4, "lr": 0.0025, "augment": True},
    "ivlp": {"n_prompts": 2, "depth": 12, "n_epochs": 5, "batch_size": 4, "lr": 0.0035, "augment": True},
    "maple": {"n_prompts": 2, "depth": 9, "n_epochs": 5, "batch_size": 4, "lr": 0.0035, "augment": True},
}
"""The published settings for 16 shots on ViT-B/16. Without augmentation where image embeddings are computed once."""


@dataclass(frozen=True)
class PromptConfig:
    """How prompts are trained. None: the method's usual value.

    Attributes:
        n_prompts: tokens in each tower that gets any.
        depth: blocks that get prompts of their own; 1: the input only ("shallow"). At most the towers' blocks.
        position: of the class name among CoOp's prompts: end, middle or front.
        class_specific: CoOp with prompts of each class.
        shots: images a class.
        classes: all, base (the first half of the sorted names) or novel.
        template: the text around a class name.
        n_epochs, batch_size: an epoch sees every image once; the last batch, where it is short, is dropped.
        lr, momentum, weight_decay: of SGD; the rate follows a cosine, the first epoch has `warmup_lr`.
        augment: random crops and flips (vpt, ivlp, maple).
        seed: of shots, first values, order and crops.
    """

    method: str = "maple"
    n_prompts: int | None = None
    depth: int | None = None
    position: str = "end"
    class_specific: bool = False
    shots: int = 16
    classes: str = "all"
    template: str = "a photo of a {}."
    n_epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_lr: float = 1e-5
    augment: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in _USUAL:
            raise SettingsError(f"--method must be one of {', '.join(_USUAL)}, got {self.method!r}.")
        if self.class_specific and self.method != "coop":
            raise SettingsError(f"Only coop has prompts of each class, not {self.method}.")
        if self.augment and self.method in ("coop", "cocoop"):
            raise SettingsError(f"{self.method} computes image embeddings once: --augment is for vpt, ivlp and maple.")
        for name in ("n_prompts", "depth", "n_epochs", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
        if self.lr is not None and not self.lr > 0:
            raise SettingsError(f"--lr must be above 0, got {self.lr}.")
        if self.seed < 0:
            raise SettingsError(f"--seed must not be negative, got {self.seed}.")
        if self.depth not in (None, 1) and self.method in ("coop", "cocoop"):
            raise SettingsError(f"{self.method} has prompts at the input only: --depth 1.")

    def resolve(self, n_layers: int) -> "PromptConfig":
        """Every value filled in, for an image tower of so many blocks. Raises SettingsError for too large a depth."""
        usual = _USUAL[self.method]
        if self.depth is not None and self.depth > n_layers:
            raise SettingsError(f"--depth {self.depth} is more than the image tower's {n_layers} blocks.")
        filled = {name: value for name, value in usual.items() if getattr(self, name) is None}
        if "depth" in filled:
            filled["depth"] = min(filled["depth"], n_layers)
        return replace(self, **filled)
