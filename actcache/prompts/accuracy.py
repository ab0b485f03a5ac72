"""What x.prompts records: how it was made and what it gained, as records that are checked at reading. No torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from actcache.errors import SettingsError
from actcache.prompts.config import ResolvedPromptConfig
from actcache.seen import SeenImages

ZERO_SHOT, CLASS_MEANS = "zero-shot", "class means"
"""What tells classes apart: their texts, or the mean features of their shots in a model without texts."""


@dataclass(frozen=True)
class PromptSettings:
    """The settings of an adapted model."""

    model_id: str
    method: str
    template: str
    position: str
    classes: tuple[str, ...] = ()
    precision: str = "float32"
    config: ResolvedPromptConfig | None = None


@dataclass(frozen=True)
class ClassAccuracy:
    """Accuracy for all classes, the base classes and the novel classes; None where it was not measured.

    As usual, base and novel images are classified among the classes of their own half.

    Attributes:
        per_class: the accuracy of each class that has images, when all classes are candidates.
        harmonic: the harmonic mean of base and novel (Xian et al. 2017).
    """

    all: float | None
    per_class: Mapping[str, float]
    base: float | None
    novel: float | None
    harmonic: float | None


@dataclass(frozen=True)
class AdaptationAccuracy:
    """Accuracy without prompts (`zero_shot`, whatever tells classes apart) and with them, on the same images."""

    zero_shot: ClassAccuracy
    adapted: ClassAccuracy

    def to_json(self) -> dict[str, dict[str, object]]:
        return asdict(self)

    def parts(self) -> list[tuple[str, float, float | None]]:
        """(classes, accuracy without prompts, accuracy with them), as far as it was measured."""
        before, after = self.zero_shot, self.adapted
        parts = [(name, getattr(before, name), getattr(after, name)) for name in ("all", "base", "novel", "harmonic")]
        return [part for part in parts if part[1] is not None]


@dataclass(frozen=True)
class ShotList:
    """The images that prompts were trained on. A hash is None, or "", where the image was not hashed."""

    uri: tuple[str, ...]
    content_hash: tuple[str | None, ...]

    def __post_init__(self) -> None:
        if len(self.uri) != len(self.content_hash):
            raise SettingsError(f"content_hash must have {len(self.uri)} entries, got {len(self.content_hash)}")


@dataclass(frozen=True)
class PromptsSummary:
    """What the manifest says of prompts.

    Attributes:
        seen: test images that are shots. None, as `shots`, for prompts that were made before this was recorded.
        judge: ZERO_SHOT or CLASS_MEANS.
    """

    accuracy: AdaptationAccuracy
    loss: tuple[float, ...]
    seen: SeenImages | None = None
    shots: ShotList | None = None
    judge: str = ZERO_SHOT
