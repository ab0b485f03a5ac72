"""PromptConfig: how prompts are trained. No torch.

In: a method, and the values that differ from its usual ones. Out: `ResolvedPromptConfig`, in which every value is
known.
"""

from dataclasses import dataclass
from typing import Any

from actcache.errors import SettingsError
from actcache.options import JudgingConfig, option
from actcache.prompts.methods import METHODS


@dataclass(frozen=True)
class PromptConfig(JudgingConfig):
    """How prompts are trained. None takes the method's usual value, see `METHODS`."""

    method: str = option("maple", "Adaptation method: coop, cocoop, vpt, ivlp or maple.")
    n_prompts: int | None = option(None, "Number of prompt tokens in each tower that gets prompts.")
    depth: int | None = option(
        None, "Number of blocks that get prompts of their own; 1 means at the input only (shallow)."
    )
    position: str = option("end", "Position of the class name among CoOp's prompts: end, middle or front.")
    class_specific: bool = option(False, "Learn separate prompts for each class (CoOp only).")
    shots: int = option(16, "Number of training images per class.")
    classes: str = option("all", "Classes to learn: all, base (the first half of the sorted names) or novel.")
    template: str = option("a photo of a {}.", "Text around the class name.")
    n_epochs: int | None = option(None, "Number of epochs, in each of which a short last batch is dropped.")
    batch_size: int | None = option(None, "Number of images in a batch.")
    lr: float | None = option(None, "Initial learning rate of SGD, which follows a cosine over the epochs.")
    momentum: float = option(0.9, "Momentum of SGD.")
    weight_decay: float = option(5e-4, "Weight decay of SGD.")
    warmup_lr: float = option(1e-5, "Learning rate during the first epoch.")
    augment: bool | None = option(None, "Train on random crops and flips (vpt, ivlp, maple).")
    seed: int = option(0, "Random seed for the shots, the initial values, the order and the crops.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in METHODS:
            raise SettingsError(f"--method must be one of {', '.join(METHODS)}, got {self.method!r}.")
        kind = METHODS[self.method]
        if self.class_specific and not kind.class_specific:
            raise SettingsError(f"{self.method} has no separate prompts for each class. Choose --method coop for them.")
        if self.augment and not kind.adapts_images:
            raise SettingsError(
                f"{self.method} computes image embeddings once, so --augment has no effect. Leave it out."
            )
        for name in ("n_prompts", "depth", "n_epochs", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
        if self.lr is not None and not self.lr > 0:
            raise SettingsError(f"--lr must be above 0, got {self.lr}.")
        if self.seed < 0:
            raise SettingsError(f"--seed must not be negative, got {self.seed}.")
        if self.depth not in (None, 1) and not kind.adapts_images:
            raise SettingsError(f"{self.method} has prompts at the input only. Give --depth 1 or leave it out.")

    def resolve(self, n_layers: int) -> "ResolvedPromptConfig":
        """Fill in every value, for an image tower of `n_layers` blocks. Raises SettingsError for too large a depth."""
        kind = METHODS[self.method]
        if self.depth is not None and self.depth > n_layers:
            raise SettingsError(f"--depth is {self.depth}, but the image tower has {n_layers} blocks. Lower --depth.")
        values: dict[str, Any] = {
            name: getattr(kind, name, None) if value is None else value for name, value in vars(self).items()
        }
        return ResolvedPromptConfig(**values | {"depth": min(values["depth"], n_layers)})


@dataclass(frozen=True, kw_only=True)
class ResolvedPromptConfig(PromptConfig):
    """A PromptConfig in which every value is known."""

    n_prompts: int
    depth: int
    n_epochs: int
    batch_size: int
    lr: float
    augment: bool
