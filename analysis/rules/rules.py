"""Rules over latents: conjunctions of latents that fire and latents that do not. Plain arrays in and out.

    frog: latent 907 on >= 3 patches and not latent 12 on >= 3 patches

For each class, a small decision tree (scikit-learn) is grown over the latents that go with it most, and the leaves of
this class become conjunctions. A literal is dropped if its removal costs no precision. A rule needs at least one latent
that fires, so negative literals are exceptions. Shapes: I images, n candidate latents of a class.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.results import RuleLiteral

Path = tuple[tuple[int, bool], ...]
"""(column, whether it fires) from the root of a tree to a leaf."""


@dataclass(frozen=True)
class Rule:
    """A conjunction. precision: (n right + 1) / (n + classes) on the n learning images that it fires on."""

    label: str
    literals: tuple[RuleLiteral, ...]
    precision: float

    def say(self, names: Mapping[int, str], n_patches: int) -> str:
        """For people: latent 907 ("red stripes") on >= 3 patches and not latent 12 on >= 3 patches."""
        patches = f"on >= {n_patches} patches" if n_patches > 1 else "on a patch"
        parts = []
        for literal in self.literals:
            name = f' ("{names[literal.latent]}")' if literal.latent in names else ""
            parts.append(f"{'' if literal.fires else 'not '}latent {literal.latent}{name} {patches}")
        return " and ".join(parts)


@dataclass(frozen=True)
class RuleSet:
    """Rules of every class, the most precise first, and the class of an image on which none fires."""

    rules: tuple[Rule, ...]
    default: str

    @property
    def latents(self) -> NDArray[np.int64]:
        """Latents that appear in a rule, ascending."""
        return np.unique([literal.latent for rule in self.rules for literal in rule.literals]).astype(np.int64)

    def apply(self, fires: Callable[[int], NDArray[np.bool_]], n_images: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """([I] class names, [I] number of the rule, -1: default). fires: latent -> [I]."""
        number = np.full(n_images, -1, dtype=np.int64)
        for i, rule in enumerate(self.rules):
            number[(number < 0) & conjunction(rule.literals, fires, n_images)] = i
        labels = np.array([*(rule.label for rule in self.rules), self.default], dtype=object)
        return labels[number], number


def rank_rules(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """The most precise rules first; ties are broken by class name and literals."""
    key = [
        (-rule.precision, rule.label, [(literal.latent, literal.fires) for literal in rule.literals]) for rule in rules
    ]
    return tuple(rules[i] for i in sorted(range(len(rules)), key=key.__getitem__))


def conjunction(
    literals: Sequence[RuleLiteral], fires: Callable[[int], NDArray[np.bool_]], n_images: int
) -> NDArray[np.bool_]:
    """[I]: the images on which every literal holds."""
    holds = np.ones(n_images, dtype=np.bool_)
    for literal in literals:
        holds &= fires(literal.latent) == literal.fires
    return holds


def choose_candidates(
    both: NDArray[Any], fired: NDArray[Any], n_class: int, n_images: int, n_candidates: int
) -> NDArray[np.int64]:
    """The latents [n] with the largest |phi| between firing and the class, ascending.

    Args:
        both: [F] number of images of the class that each latent fires on. fired: [F] the same over all images.
    """
    both, fired = both.astype(np.float64), fired.astype(np.float64)
    spread = fired * (n_images - fired) * n_class * (n_images - n_class)
    phi = np.abs(n_images * both - n_class * fired) / np.sqrt(np.maximum(spread, 1))
    order = np.lexsort((np.arange(len(phi)), -phi))[:n_candidates]
    return np.sort(order)


def learn_class(
    name: str, fires: NDArray[np.bool_], latents: NDArray[np.int64], mine: NDArray[np.bool_], n_classes: int,
    n_rules: int, n_literals: int,
) -> list[Rule]:  # fmt: skip
    """The best rules of one class, given which latents fire [I, n] and which images are of the class [I]."""
    from sklearn.tree import DecisionTreeClassifier

    if not 0 < mine.sum() < len(mine):
        return []
    least = max(2, min(20, int(mine.sum()) // 10))  # smallest number of images per leaf
    tree = DecisionTreeClassifier(
        max_depth=n_literals, max_leaf_nodes=4 * n_rules, min_samples_leaf=least, class_weight="balanced",
        random_state=0,
    ).fit(fires.astype(np.float32), mine).tree_  # fmt: skip
    paths: set[Path] = set()
    stack: list[tuple[int, Path]] = [(0, ())]
    while stack:
        node, path = stack.pop()
        if tree.children_left[node] >= 0:
            column = int(tree.feature[node])
            stack += [
                (int(tree.children_left[node]), (*path, (column, False))),
                (int(tree.children_right[node]), (*path, (column, True))),
            ]
        elif tree.value[node][0][-1] > tree.value[node][0][0]:  # weighted: the class is overrepresented in this leaf
            paths.add(_simplify(path, fires, mine))
    paths = {path for path in paths if any(positive for _, positive in path)}
    scored = [(_laplace(path, fires, mine, n_classes), path) for path in paths]
    scored.sort(key=lambda pair: (-pair[0], pair[1]))
    return [
        Rule(name, tuple(RuleLiteral(int(latents[column]), positive) for column, positive in path), precision)
        for precision, path in scored[:n_rules]
    ]


def _simplify(path: Path, fires: NDArray[np.bool_], mine: NDArray[np.bool_]) -> Path:
    """The path without literals that do not add precision, latents that fire first."""
    kept = list(path)
    for literal in path:
        shorter = [other for other in kept if other != literal]
        if shorter and _laplace(shorter, fires, mine, 2) >= _laplace(kept, fires, mine, 2):
            kept = shorter
    return tuple(sorted(kept, key=lambda literal: (not literal[1], literal[0])))


def _laplace(
    path: Sequence[tuple[int, bool]], fires: NDArray[np.bool_], mine: NDArray[np.bool_], n_classes: int
) -> float:
    """Precision of a path, smoothed: (n right + 1) / (n + classes)."""
    holds = np.ones(len(mine), dtype=np.bool_)
    for column, positive in path:
        holds &= fires[:, column] == positive
    return float((int((holds & mine).sum()) + 1) / (int(holds.sum()) + n_classes))
