"""The result of attribute: deletion curves of several ways to rank latents."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar

from analysis.results.result import Result, Row


@dataclass(frozen=True)
class DeletionPoint:
    """Mean evidence for the predicted class after deleting n latents, with its 95 % interval.

    Attributes:
        y: cosine with the text of the class; its logit, where the judge has no texts.
    """

    method: str
    n: int
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class DeletionMargin:
    """Area under a method's curve minus that of attribution, with a paired 95 % interval."""

    method: str
    margin: float
    low: float
    high: float


@dataclass(frozen=True)
class Deletion(Result):
    """areas: the mean of each method's curve over ln(1 + n); smaller is better."""

    KIND: ClassVar[str] = "deletion"

    run: str
    hook_point: str
    tokens: str
    n_judged: int
    curve: tuple[DeletionPoint, ...]
    areas: Mapping[str, float]
    margins: tuple[DeletionMargin, ...]

    def tables(self) -> list[list[Row]]:
        """A row per method and number of deleted latents."""
        return [[asdict(point) for point in self.curve]]
