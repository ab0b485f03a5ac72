"""The results of intervene --set and --add (what some latents move), and of steer (which latents move anything)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar

from analysis.results.fidelity import Scores
from analysis.results.result import Result, Row


@dataclass(frozen=True)
class Steering(Result):
    """The classifier before and after some latents are set.

    Attributes:
        shift: class -> mean change of its probability.
        predicted: class -> number of images classified as it, before and after.
    """

    KIND: ClassVar[str] = "steering"

    run: str
    hook_point: str
    tokens: str
    n_judged: int
    before: Scores
    after: Scores
    shift: Mapping[str, float]
    predicted: Mapping[str, tuple[int, int]]

    def __post_init__(self) -> None:
        if self.shift.keys() != self.predicted.keys():
            raise ValueError(f"shift and predicted should name the same classes, got {len(self.predicted)} classes")

    def tables(self) -> list[list[Row]]:
        """A row per class: how its probability moved, and how many images were classified as it."""
        rows: list[Row] = [
            {"class": name, "shift": shift, "before": self.predicted[name][0], "after": self.predicted[name][1]}
            for name, shift in self.shift.items()
        ]
        return [rows]


@dataclass(frozen=True)
class SteeringSummary:
    """Latents, or dimensions of the stream, set to one value.

    Attributes:
        kind: latent or dimension.
        steerable: share of the latents (or dimensions) that are steerable.
        coverage: number of different top words among the steerable ones.
        steerability, power: mean of S and P.
    """

    kind: str
    strength: float
    n: int
    steerable: float
    coverage: int
    steerability: float
    power: float


@dataclass(frozen=True)
class SteeringRow:
    """One latent or dimension: S, P and the word at which P is reached."""

    kind: str
    unit: int
    strength: float
    steerability: float
    power: float
    word: str


@dataclass(frozen=True)
class Steerability(Result):
    """How far single latents move the classifier's answers, beside single dimensions of the stream.

    Attributes:
        n_judged, n_words: images, and words or classes among which their probability moves.
        summary: one for each kind of unit and strength.
        rows: one for each latent or dimension and strength.
    """

    KIND: ClassVar[str] = "steerability"

    run: str
    hook_point: str
    tokens: str
    n_judged: int
    n_words: int
    summary: tuple[SteeringSummary, ...]
    rows: tuple[SteeringRow, ...]

    def tables(self) -> list[list[Row]]:
        """A row per kind and strength."""
        return [[asdict(row) for row in self.summary]]
