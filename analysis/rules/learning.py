"""learn_rules(): a few readable rules a class over latents, learned on some images and judged on others.

    b_i[s] = 1(latent s is above tau on at least m patches of image i)          PatchSAE equation 4, binary
    frog: latent 907 on >= 3 patches and not latent 12 on >= 3 patches  or  ...

In: codes and what the rules explain, the labels or the model's own zero-shot classes. Out: rules, and on the judging
images their accuracy (against labels), fidelity (against what they explain), coverage and size.

Latents that go with a class most (phi coefficient) are found by counting, shard by shard; only their columns are ever
looked at image by image. How rules are made of them: analysis/rules/rules.py. An image takes the class of the most
precise rule that fires on it, or the default class.

Source: NeSyViT (Padalkar and Gupta 2025, arXiv 2505.06745) for rules as the classifier and for what is reported.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache import ParentMismatchError, SettingsError
from analysis.concepts import ConceptTable
from analysis.intervals import wilson_interval
from analysis.naming import read_names
from analysis.reduce import TAU, Pairs, Piece, Statistic, reduce_shards
from analysis.results import describe_result, find_result, finish_result
from analysis.rules.rules import Rule, RuleSet, choose_candidates, conjunction, learn_class, rank_rules
from saetrain import CodeStore

Progress = Callable[[int, int], None]
JUDGE_SHARE = 0.2
"""Of the stored order, its last images: judged on where no other codes are given. The order is random."""
EXPLAINED = ("label", "zero-shot")


@dataclass(frozen=True)
class Firing:
    """When a latent fires on an image: on at least n_patches patches above tau. CLS does not count."""

    tau: float
    n_patches: int

    def __call__(self, pairs: Pairs) -> NDArray[np.bool_]:
        """Of pairs found with this tau, [N]."""
        return np.asarray(pairs.n_above - (pairs.cls > np.float32(self.tau)) >= self.n_patches)


def learn_rules(
    codes: CodeStore | str | Path,
    out: str | Path | None = None,
    *,
    judge: CodeStore | str | Path | None = None,
    explain: str = "label",
    tau: float = TAU,
    n_patches: int = 3,
    n_candidates: int = 64,
    n_rules: int = 4,
    n_literals: int = 3,
    concepts: ConceptTable | str | Path | None = None,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Learn rules from codes with labels, and judge them.

    Args:
        out: a JSON file for the result; the same call again returns what is there.
        judge: other codes of the same run; by default the last 20 % of the images.
        explain: what the rules learn: `label`, or `zero-shot`, the class that the model names.
        tau, n_patches: a latent fires on an image when so many patches are above tau.
        n_candidates: latents a class may choose from.
        n_rules, n_literals: rules a class, literals a rule, at most.
        concepts: names for the latents.
        on_progress: called with (shards done, shards in all), for one codes after the other.

    Returns:
        The result: settings; `classes`: name -> rules as texts with the numbers of each on the judging images;
        `accuracy`, `fidelity`, `coverage`, `size`, `majority`.

    Raises:
        SettingsError: no labels, codes without patches, impossible counts, scikit-learn is missing.
        ParentMismatchError: `judge` is of another run.
    """
    learn = codes if isinstance(codes, CodeStore) else CodeStore.open(codes)
    other = judge if isinstance(judge, CodeStore) or judge is None else CodeStore.open(judge)
    _check(learn, other, explain, n_patches, n_candidates, n_rules, n_literals)
    settings = {
        "explain": explain, "tau": tau, "n_patches": n_patches, "n_candidates": n_candidates, "n_rules": n_rules,
        "n_literals": n_literals,
    }  # fmt: skip
    parents = {"codes": learn.artifact} | ({} if other is None else {"judge": other.artifact})
    names: dict[int, str] = {}
    if concepts is not None:
        table = concepts if isinstance(concepts, ConceptTable) else ConceptTable.open(concepts)
        if table.table.num_rows != learn.n_latents:
            raise SettingsError(f"{table.path} has {table.table.num_rows} latents, {learn.path} {learn.n_latents}.")
        parents["concepts"], names = table.artifact, read_names(table)
    head = describe_result("rules", settings, parents)
    if found := find_result(out, head, overwrite=overwrite):
        return found

    firing, report = Firing(tau, n_patches), on_progress
    told, labels = _explained(learn, explain)
    chosen, judged = _split(learn, told, other)
    rules = _learn(learn, np.where(chosen, told, ""), firing, n_candidates, n_rules, n_literals, report)
    target = learn if other is None else other
    if other is not None:
        told, labels = _explained(other, explain)
        judged = other.valid & (told != "")
        if not judged.any():
            raise SettingsError(f"No image of {other.path} has a label to judge by.")
    fires = read_firing(target, rules.latents, firing, report)
    body = _judge(rules, fires, labels, told, judged, explain, names, n_patches)
    return finish_result(out, head, {"n_learned": int(chosen.sum()), **body})


def _check(
    learn: CodeStore, other: CodeStore | None, explain: str, n_patches: int, n_candidates: int, n_rules: int,
    n_literals: int,
) -> None:  # fmt: skip
    if importlib.util.find_spec("sklearn") is None:
        raise SettingsError("Rules need the package scikit-learn: pip install 'patchsae[quality]'.")
    if explain not in EXPLAINED:
        raise SettingsError(f"--explain must be {' or '.join(EXPLAINED)}, got {explain!r}.")
    most = learn.n_tokens - 1
    if not 1 <= n_patches <= most:
        raise SettingsError(f"--n-patches must lie in 1..{most}, the patches of an image, got {n_patches}.")
    for flag, value in (("--n-candidates", n_candidates), ("--n-rules", n_rules), ("--n-literals", n_literals)):
        if value < 1:
            raise SettingsError(f"{flag} must be at least 1, got {value}.")
    if "cls" in (learn.tokens, other.tokens if other else ""):
        raise SettingsError(f"{learn.path} holds codes of CLS only. Rules count patches: encode a run of all or patch.")
    if other is not None and other.artifact.parents["run"].id != learn.artifact.parents["run"].id:
        raise ParentMismatchError(
            f"{other.path} and {learn.path} are codes of different runs, so their latents differ. "
            "Encode the judging images with the run that the rules are about."
        )


def _explained(codes: CodeStore, explain: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """([I] what rules are to say, [I] the labels); "" for an image that has none."""
    labels = np.array(codes.images["label_name"].to_pylist(), dtype=object)
    if not labels.astype(bool).any():
        raise SettingsError(f"No image of {codes.path} has a label. Extract a folder of class folders, or a table.")
    if explain == "label":
        return labels, labels
    from analysis.classifier import predict_classes

    return predict_classes(codes), labels


def _split(
    codes: CodeStore, told: NDArray[Any], other: CodeStore | None
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(images to learn from [I], to judge on [I])."""
    usable = codes.valid & (told != "")
    images = np.flatnonzero(usable)
    n_judged = 0 if other is not None else max(1, round(JUDGE_SHARE * len(images)))
    chosen, judged = usable.copy(), usable.copy()
    chosen[images[len(images) - n_judged :]] = False
    judged &= ~chosen
    classes = np.unique(told[chosen])
    if len(classes) < 2:
        found = f"only {classes[0]}" if len(classes) else "nothing"
        raise SettingsError(f"Rules tell classes apart; the images of {codes.path} that are learned from show {found}.")
    return chosen, judged


# ---------------------------------------------------------------------------------------------------------------------
# Learning


def _learn(
    codes: CodeStore, told: NDArray[Any], firing: Firing, n_candidates: int, n_rules: int, n_literals: int,
    report: Progress | None,
) -> RuleSet:  # fmt: skip
    classes = np.array(sorted(set(told) - {""}), dtype=object)
    images = told != ""
    label = np.where(images, np.searchsorted(classes, told), -1)
    sizes = np.bincount(label[images], minlength=len(classes))
    table = count_classes(codes, label, len(classes), firing, report)
    fired = np.asarray(table.sum(axis=0)).reshape(-1)
    candidates = [
        choose_candidates(table[[c]].toarray()[0], fired, int(sizes[c]), int(sizes.sum()), n_candidates)
        for c in range(len(classes))
    ]
    fires = read_firing(codes, np.unique(np.concatenate(candidates)), firing, report)
    found: list[Rule] = []
    for c, name in enumerate(classes.tolist()):
        own = np.stack([fires(latent)[images] for latent in candidates[c].tolist()], axis=1)
        found += learn_class(name, own, candidates[c], label[images] == c, len(classes), n_rules, n_literals)
    rules = RuleSet(rank_rules(found), str(classes[sizes.argmax()]))
    left = label[images & (rules.apply(fires, codes.n_images)[1] < 0)]
    if not len(left):
        return rules
    return RuleSet(rules.rules, str(classes[np.bincount(left, minlength=len(classes)).argmax()]))


def count_classes(
    codes: CodeStore, label: NDArray[np.int64], n_classes: int, firing: Firing, report: Progress | None = None
) -> Any:
    """Images of each class that each latent fires on, a sparse [C, F]; label [I]: -1 is left out."""
    from scipy.sparse import csr_array

    def chunk(piece: Piece) -> Any:
        pairs = piece.pairs
        keep = firing(pairs) & (label[pairs.image] >= 0)
        entries = (label[pairs.image[keep]], pairs.latent[keep])
        return csr_array((np.ones(len(entries[0]), np.int64), entries), shape=(n_classes, len(piece.latents)))

    counted = Statistic(chunk, lambda parts: sum(parts[1:], parts[0]), lambda total: total)
    return reduce_shards(codes, {"counts": counted}, tau=firing.tau, on_progress=report)["counts"]


def read_firing(
    codes: CodeStore, latents: NDArray[np.int64], firing: Firing, report: Progress | None = None
) -> Callable[[int], NDArray[np.bool_]]:
    """latent -> [I], whether it fires on each image; for the given latents (ascending) only."""

    def chunk(piece: Piece) -> Any:
        pairs = piece.pairs
        keep = firing(pairs) & np.isin(pairs.latent, latents)
        return pairs.latent[keep], pairs.image[keep]

    def join(parts: Sequence[Any]) -> Any:
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))

    found = Statistic(chunk, join, lambda total: total)
    latent, image = reduce_shards(codes, {"pairs": found}, tau=firing.tau, on_progress=report)["pairs"]
    order = np.argsort(latent, kind="stable")
    latent, image = latent[order], image[order]

    def fires(one: int) -> NDArray[np.bool_]:
        mask = np.zeros(codes.n_images, dtype=np.bool_)
        mask[image[slice(*np.searchsorted(latent, [one, one + 1]))]] = True
        return mask

    return fires


# ---------------------------------------------------------------------------------------------------------------------
# Judging


def _judge(
    rules: RuleSet, fires: Callable[[int], NDArray[np.bool_]], labels: NDArray[Any], told: NDArray[Any],
    judged: NDArray[np.bool_], explain: str, names: dict[int, str], n_patches: int,
) -> dict[str, Any]:  # fmt: skip
    said, number = rules.apply(fires, len(told))
    said, number, labels, told = said[judged], number[judged], labels[judged], told[judged]
    n_images, right, same = len(said), int((said == labels).sum()), int((said == told).sum())
    classes: dict[str, Any] = {}
    for name in sorted({rule.label for rule in rules.rules} | set(told)):
        mine, hit = told == name, (said == name) & (told == name)
        classes[name] = {
            "n_images": int(mine.sum()), "recall": _share(hit.sum(), mine.sum()),
            "precision": _share(hit.sum(), (said == name).sum()),
            "rules": [
                _describe(rule, conjunction(rule.literals, fires, len(judged))[judged], mine, names, n_patches)
                for rule in rules.rules if rule.label == name
            ],
        }  # fmt: skip
    low, high = wilson_interval(right, n_images)
    return {
        "n_judged": n_images, "accuracy": right / n_images, "accuracy_low": low, "accuracy_high": high,
        "fidelity": same / n_images, "coverage": float((number >= 0).mean()),
        "majority": float(max(np.unique(told, return_counts=True)[1]) / n_images),
        "model_accuracy": None if explain == "label" else float((told == labels).mean()),
        "size": {
            "rules": len(rules.rules), "literals": sum(len(rule.literals) for rule in rules.rules),
            "latents": len(rules.latents),
        },
        "default": rules.default, "classes": classes,
    }  # fmt: skip


def _describe(
    rule: Rule, fires: NDArray[np.bool_], mine: NDArray[np.bool_], names: dict[int, str], n_patches: int
) -> dict[str, Any]:
    return {
        "text": rule.say(names, n_patches),
        "literals": [{"latent": literal.latent, "fires": literal.fires} for literal in rule.literals],
        "learned_precision": rule.precision, "n_fires": int(fires.sum()),
        "precision": _share((fires & mine).sum(), fires.sum()), "recall": _share((fires & mine).sum(), mine.sum()),
    }  # fmt: skip


def _share(part: int, whole: int) -> float:
    """NaN of nothing; the result says null."""
    return float(part / whole) if whole else float("nan")
