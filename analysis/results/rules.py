"""The result of rules: each class's rules, and how good they are on the judging images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from analysis.results.result import Result


@dataclass(frozen=True)
class RuleLiteral:
    latent: int
    fires: bool


@dataclass(frozen=True)
class RuleScores:
    """One rule.

    Attributes:
        learned_precision: on the learning images, (n right + 1) / (n + classes).
        n_fires: number of judging images that it fires on.
        precision, recall: on the judging images. None where it fires on none, or the class has none.
    """

    text: str
    literals: tuple[RuleLiteral, ...]
    learned_precision: float
    n_fires: int
    precision: float | None
    recall: float | None


@dataclass(frozen=True)
class ClassRules:
    n_images: int
    recall: float | None
    precision: float | None
    rules: tuple[RuleScores, ...]


@dataclass(frozen=True)
class RulesSize:
    rules: int
    literals: int
    latents: int


@dataclass(frozen=True)
class LearnedRules(Result):
    """Rules and their scores on the judging images.

    Attributes:
        accuracy: against the labels. fidelity: against what the rules explain.
        coverage: share of images on which a rule fires.
        majority: share of the largest class.
        model_accuracy: accuracy of the model's answers that are explained. None where labels are.
        default: the class of an image on which no rule fires.
    """

    KIND: ClassVar[str] = "rules"

    n_learned: int
    n_judged: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    fidelity: float
    coverage: float
    majority: float
    model_accuracy: float | None
    size: RulesSize
    default: str
    classes: Mapping[str, ClassRules]

    def lines(self) -> list[str]:
        """Each class with its rules, then how good they are."""
        lines = []
        for name, learned in self.classes.items():
            lines.append(name)
            for rule in learned.rules:
                share = "fires on none" if rule.precision is None else f"{rule.precision:.0%} of {rule.n_fires:,}"
                lines.append(f"  {rule.text}  ({share})")
        return [
            *lines,
            f"else {self.default}",
            f"accuracy {self.accuracy:.1%}, fidelity {self.fidelity:.1%}, on {self.n_judged:,} images; largest "
            f"class {self.majority:.1%}; {self.size.rules} rules, {self.size.literals} literals, "
            f"{self.size.latents} latents",
        ]
