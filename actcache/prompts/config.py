"""PromptConfig: how prompts are trained. No torch.

In: a method, and the values that differ from its usual ones. Out: `ResolvedPromptConfig`, in which every value is
known.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actcache.errors import SettingsError
from actcache.options import JudgingConfig, option
from actcache.prompts.methods import METHODS


@dataclass(frozen=True)
class PromptConfig(JudgingConfig):
    """How prompts are trained. None takes the method's usual value, see `METHODS`."""

    method: str = option("maple", "Adaptation method: coop, cocoop, vpt, ivlp or maple.")
    n_prompts: int | None = option(None, "Number of prompt tokens in each tower that gets prompts.", at_least=1)
    depth: int | None = option(
        None, "Number of blocks that get prompts of their own; 1 means at the input only (shallow).", at_least=1
    )
    position: str = option("end", "Position of the class name among CoOp's prompts: end, middle or front.")
    class_specific: bool = option(False, "Learn separate prompts for each class (CoOp only).")
    shots: int = option(16, "Number of training images per class.", at_least=1)
    classes: str = option("all", "Classes to learn: all, base (the first half of the sorted names) or novel.")
    template: str = option("a photo of a {}.", "Text around the class name.")
    n_epochs: int | None = option(None, "Number of epochs, in each of which a short last batch is dropped.", at_least=1)
    batch_size: int | None = option(None, "Number of images in a batch.", at_least=1)
    lr: float | None = option(None, "Initial learning rate of SGD, which follows a cosine over the epochs.", above=0)
    momentum: float = option(0.9, "Momentum of SGD.", at_least=0, at_most=1)
    weight_decay: float = option(5e-4, "Weight decay of SGD.", at_least=0)
    warmup_lr: float = option(1e-5, "Learning rate during the first epoch.", at_least=0)
    augment: bool | None = option(None, "Train on random crops and flips (vpt, ivlp, maple).")
    seed: int = option(0, "Random seed for the shots, the initial values, the order and the crops.", at_least=0)
    class_level: int | None = option(
        None,
        "Which folder of a path is the class: 1 for the first, 2 ..., -1 for the innermost, 0 for none; by default the "
        "first, or the second where the first ones are called train, val, test ...",
        at_least=-64,
        at_most=64,
    )
    class_names: str | Path | None = option(
        None, "File with a text for each class: lines such as `n02012849,crane`, or a JSON object."
    )

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

    n_prompts: int = field()  # without field() it would inherit the default
    depth: int = field()
    n_epochs: int = field()
    batch_size: int = field()
    lr: float = field()
    augment: bool = field()
