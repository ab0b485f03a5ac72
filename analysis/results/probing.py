"""The result of probe: what k latents tell about a column of the image table, beside what else could tell it."""

from dataclasses import dataclass
from typing import ClassVar

from analysis.results.result import Result, Row

N_SHOWN = 16
"""Latents that the screen and the page list."""


@dataclass(frozen=True)
class ProbePoint:
    """The score of probes on k latents.

    Attributes:
        selection: chosen; random, latents that fire as often; or shuffled, chosen and fitted with shuffled labels.
    """

    selection: str
    k: int
    score: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class ProbeMean:
    """The mean of a curve over log k."""

    selection: str
    score: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class ProbeDifference:
    """The score of the chosen latents minus another one's, with a paired interval.

    Attributes:
        to: raw, random or shuffled.
        verdict: higher; lower; or "no difference" where 0 lies inside of the interval.
    """

    to: str
    k: int
    difference: float | None
    low: float | None
    high: float | None
    verdict: str


@dataclass(frozen=True)
class RawProbe:
    """The probe on the raw activations. features: cls, patch (the mean patch), or both joined by +."""

    features: str
    n_features: int
    score: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class ProbeLatent:
    """A chosen latent.

    Attributes:
        ranking: F over the classes, or the correlation; None where F is infinite.
        images: share of the images that the ranking saw on which it fires.
        k: the smallest probe that sees it. weight: there, of its standardized score.
        class_: the class that the weight is largest for, in absolute value; None for numbers.
    """

    latent: int
    name: str
    ranking: float | None
    images: float
    k: int
    weight: float
    class_: str | None


@dataclass(frozen=True)
class Probing(Result):
    """The k-sparse curve.

    Attributes:
        measure: accuracy, or r2: 1 - sum of squared errors / sum of squared deviations from the judged images' mean.
        classes: those that are told apart; None for numbers.
        n_classes_left_out: classes with too few images to choose on or to judge. n_images_left_out: their images.
        chance: accuracy of the largest class; 0, the R^2 of the mean, for numbers.
        n_firing: latents that fire on the images that the ranking saw.
        raw: None where the activations were not found; `raw_left_out` says why.
    """

    KIND: ClassVar[str] = "probe"

    column: str
    target: str
    measure: str
    hook_point: str
    tokens: str
    classes: tuple[str, ...] | None
    n_classes_left_out: int
    n_images_left_out: int
    n_chosen: int
    n_judged: int
    n_latents: int
    n_firing: int
    chance: float
    curve: tuple[ProbePoint, ...]
    means: tuple[ProbeMean, ...]
    raw: RawProbe | None
    raw_left_out: str | None
    differences: tuple[ProbeDifference, ...]
    latents: tuple[ProbeLatent, ...]

    def tables(self) -> list[list[Row]]:
        """A row per k, and a row per chosen latent, of which the first 16."""
        points = {(point.selection, point.k): point for point in self.curve}
        rows: list[Row] = []
        for k in dict.fromkeys(point.k for point in self.curve):
            chosen = points["chosen", k]
            row: dict[str, str | int | float | None] = {
                "k": k,
                self.measure: chosen.score,
                "from": chosen.low,
                "to": chosen.high,
            }
            for selection in ("random", "shuffled"):
                other = points.get((selection, k))
                row[selection] = None if other is None else other.score
            for each in self.differences:
                if each.k == k:
                    row[f"minus {each.to}"] = say_difference(each)
            rows.append(row)
        latents: list[Row] = [
            {"latent": each.latent, "name": each.name, "F" if self.classes else "r": each.ranking,
             "images": each.images, "k": each.k, "weight": each.weight}
            | ({} if each.class_ is None else {"for": each.class_})
            for each in self.latents[:N_SHOWN]
        ]  # fmt: skip
        return [rows, latents]

    def notes(self) -> list[str]:
        """The probe on the raw activations, classes that were left out, and what every result says of its images."""
        raw = f"raw activations: left out, because {self.raw_left_out}"
        if self.raw is not None:
            interval = f"{say(self.raw.low)} to {say(self.raw.high)}"
            raw = f"raw activations ({self.raw.features}, {self.raw.n_features:,} numbers): {say(self.raw.score)} "
            raw += f"({interval})"
        left_out = []
        if self.n_classes_left_out:
            left_out = [
                f"{self.n_classes_left_out:,} classes with {self.n_images_left_out:,} images are left out because they "
                "have too few images to choose on or to judge"
            ]
        means = ", ".join(f"{mean.selection} {say(mean.score)}" for mean in self.means)
        base = "largest class" if self.classes is not None else "constant"
        return [
            raw,
            f"mean over log k: {means}; {base} {say(self.chance)}",
            f"chosen on {self.n_chosen:,} images and judged on {self.n_judged:,} others",
            *left_out,
            *super().notes(),
        ]


def say(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def say_difference(each: ProbeDifference) -> str:
    """For people: +0.123, or ±0.012, no difference."""
    if each.difference is None:
        return "n/a"
    return f"{each.difference:+.3f}" + (", no difference" if each.verdict == "no difference" else "")
