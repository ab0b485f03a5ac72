"""learn_rules(): a few readable rules per class over latents, learned on some images and judged on others.

    b_i[s] = 1(latent s is above tau on at least m patches of image i)          PatchSAE equation 4, binary
    frog: latent 907 on >= 3 patches and not latent 12 on >= 3 patches  or  ...

In: codes, and what the rules explain: the labels, or the classes that the model itself predicts. Out: rules with their
accuracy (against labels), fidelity (against what they explain), coverage and size on the judging images.

The latents that go with a class most (phi coefficient) are found by counting, shard by shard; only their columns are
ever read image by image. How rules are made of them is in rules.py. An image takes the class of the most precise rule
that fires on it, or the default class.

Source: NeSyViT (Padalkar and Gupta 2025, arXiv 2505.06745) for rules as the classifier and for what is reported.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actcache import ParentMismatchError, SettingsError
from actcache.options import identity_of
from actcache.progress import Progress
from actcache.seen import LearnedImages, Seen, SeenImages
from analysis.concepts import ConceptTable
from analysis.config import RulesConfig
from analysis.intervals import wilson_interval
from analysis.lineage import open_parents, seen_in_codes
from analysis.naming import read_names
from analysis.reduce import Pairs, Piece, Statistic, join_columns, reduce_shards
from analysis.results import (
    ClassRules,
    Head,
    LearnedRules,
    RuleScores,
    RulesSize,
    describe_result,
    find_result,
    finish_result,
)
from analysis.rules.rules import Rule, RuleSet, choose_candidates, conjunction, learn_class, rank_rules
from saetrain import CodeStore

if TYPE_CHECKING:
    from analysis.classifier import Answers, ProbeTraining  # torch

JUDGE_SHARE = 0.2
"""The last images of the stored order, which is random, are judged where no other codes are given."""


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
    config: RulesConfig = RulesConfig(),
    *,
    judge: CodeStore | str | Path | None = None,
    concepts: ConceptTable | str | Path | None = None,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> LearnedRules:
    """Learn rules from codes with labels, and judge them.

    Args:
        out: a JSON file for the result; the same call again returns what the file holds.
        judge: codes to judge on, of the same run; by default the last 20 % of the images. Images that the rules, the
            run or the model have learned from are left out.
        concepts: names for the latents.
        on_progress: called with (shards done, shards in all), for one store of codes after the other.

    Raises:
        SettingsError: no labels, codes without patches, impossible counts, nothing left to judge, scikit-learn is
            missing.
        ParentMismatchError: `judge` is of another run.
    """
    learn = codes if isinstance(codes, CodeStore) else CodeStore.open(codes)
    other = judge if isinstance(judge, CodeStore) or judge is None else CodeStore.open(judge)
    _check(learn, other, config)
    parents = {"codes": learn.artifact} | ({} if other is None else {"judge": other.artifact})
    names: dict[int, str] = {}
    if concepts is not None:
        table = concepts if isinstance(concepts, ConceptTable) else ConceptTable.open(concepts)
        if table.table.num_rows != learn.n_latents:
            raise SettingsError(
                f"{table.path} has {table.table.num_rows} latents, but {learn.path} has {learn.n_latents}. "
                "Give the concepts that were made from these codes."
            )
        parents["concepts"], names = table.artifact, read_names(table)
    training, settings = None, identity_of(config)
    settings.pop("probe_store", None)  # a parent
    if config.explain == "probe" or (config.explain == "model" and config.probe_store is not None):
        from analysis.classifier import choose_training

        store = open_parents(learn)
        training = choose_training(store, config, other=config.probe_store)
        parents |= training.parents(store)
    head = describe_result(LearnedRules, settings, parents)
    if (earlier := find_result(LearnedRules, out, head, overwrite=overwrite)) is not None:
        return earlier

    firing, report = Firing(config.tau, config.n_patches), on_progress
    labels = _read_labels(learn)
    answers = None if config.explain == "label" else _ask_model(learn, config, training)
    targets = labels if answers is None else answers.classes
    chosen, judged = _split(learn, targets, other)
    judged_codes, judged_targets = learn, targets
    if other is not None:
        judged_codes, labels = other, _read_labels(other)
        answers = None if answers is None else _ask_model(other, config, answers.training)
        judged_targets = labels if answers is None else answers.classes
        judged = other.valid & (judged_targets != "")
        if not judged.any():
            raise SettingsError(f"No image of {other.path} has a label to judge with. Give codes of labeled images.")
    judged, seen = _leave_out(learn, chosen, judged_codes, judged, config, None if answers is None else answers.seen)
    rules = _learn(learn, np.where(chosen, targets, ""), firing, config, report)
    fires = read_firing(judged_codes, rules.latents, firing, report)
    result = _judge(head, int(chosen.sum()), rules, fires, labels, judged_targets, judged, config, names)
    return finish_result(out, replace(result, seen=(seen,), judge=None if answers is None else answers.judge))


def _leave_out(
    learn: CodeStore, chosen: NDArray[np.bool_], judge: CodeStore, judged: NDArray[np.bool_], config: RulesConfig,
    by_probe: Seen | None,
) -> tuple[NDArray[np.bool_], SeenImages]:  # fmt: skip
    """([I] images to judge on, without those that were learned from, and how many these were).

    Raises SettingsError if nothing is left.
    """
    # positions tell the images of the same codes apart, so names are asked only about others
    named = judged if judge is not learn else np.zeros(judge.n_images, dtype=bool)
    seen = LearnedImages.of("rules", learn.images, chosen).find(judge.images, judged, named) | seen_in_codes(judge)
    seen = seen if by_probe is None else seen | by_probe
    left, counted = seen.judge(np.flatnonzero(judged), config, str(judge.path))
    mask = np.zeros(judge.n_images, dtype=bool)
    mask[left] = True
    return mask, counted


def _check(learn: CodeStore, other: CodeStore | None, config: RulesConfig) -> None:
    if importlib.util.find_spec("sklearn") is None:
        raise SettingsError("Learning rules needs the package scikit-learn: pip install 'patchsae[quality]'.")
    most = learn.n_tokens - 1
    if config.n_patches > most:
        raise SettingsError(f"--n-patches must lie in 1..{most}, the patches of an image, got {config.n_patches}.")
    for codes in (learn, other):
        if codes is not None and codes.tokens == "cls":
            raise SettingsError(
                f"{codes.path} holds codes of CLS only, but rules count patches. Encode a run trained on all or patch."
            )
    if other is not None and other.artifact.parents["run"].id != learn.artifact.parents["run"].id:
        raise ParentMismatchError(
            f"{other.path} and {learn.path} are codes of different runs, so their latents differ. "
            "Encode the judging images with the run that the rules are about."
        )


def _read_labels(codes: CodeStore) -> NDArray[Any]:
    """[I] the labels; "" for an image that has none."""
    labels = np.array(codes.images["label_name"].to_pylist(), dtype=object)
    if not labels.astype(bool).any():
        raise SettingsError(f"No image of {codes.path} has a label. Extract a folder of class folders, or a table.")
    return labels


def _ask_model(codes: CodeStore, config: RulesConfig, training: "ProbeTraining | None") -> "Answers":
    """The classes that the model predicts, which rules explain."""
    from analysis.classifier import predict_classes

    judge = "auto" if config.explain == "model" else config.explain
    return predict_classes(codes, judge, config=config, training=training)


def _split(
    codes: CodeStore, targets: NDArray[Any], other: CodeStore | None
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """([I] images to learn from, [I] images to judge on)."""
    usable = codes.valid & (targets != "")
    images = np.flatnonzero(usable)
    n_judged = 0 if other is not None else max(1, round(JUDGE_SHARE * len(images)))
    chosen = usable.copy()
    chosen[images[len(images) - n_judged :]] = False
    classes = np.unique(targets[chosen])
    if len(classes) < 2:
        present = f"only {classes[0]}" if len(classes) else "nothing"
        raise SettingsError(
            f"Rules tell classes apart, but the learning images of {codes.path} show {present}. Give more classes."
        )
    return chosen, usable & ~chosen


# ---------------------------------------------------------------------------------------------------------------------
# Learning


def _learn(
    codes: CodeStore, targets: NDArray[Any], firing: Firing, config: RulesConfig, report: Progress | None
) -> RuleSet:
    classes = np.array(sorted(set(targets) - {""}), dtype=object)
    images = targets != ""
    label = np.where(images, np.searchsorted(classes, targets), -1)
    sizes = np.bincount(label[images], minlength=len(classes))
    table = count_classes(codes, label, len(classes), firing, report)
    fired = np.asarray(table.sum(axis=0)).reshape(-1)
    candidates = [
        choose_candidates(table[[c]].toarray()[0], fired, int(sizes[c]), int(sizes.sum()), config.n_candidates)
        for c in range(len(classes))
    ]
    fires = read_firing(codes, np.unique(np.concatenate(candidates)), firing, report)
    learned: list[Rule] = []
    for c, name in enumerate(classes.tolist()):
        own = np.stack([fires(latent)[images] for latent in candidates[c].tolist()], axis=1)
        mine = label[images] == c
        learned += learn_class(name, own, candidates[c], mine, len(classes), config.n_rules, config.n_literals)
    rules = RuleSet(rank_rules(learned), str(classes[sizes.argmax()]))
    left = label[images & (rules.apply(fires, codes.n_images)[1] < 0)]
    if not len(left):
        return rules
    return RuleSet(rules.rules, str(classes[np.bincount(left, minlength=len(classes)).argmax()]))


def count_classes(
    codes: CodeStore, label: NDArray[np.int64], n_classes: int, firing: Firing, report: Progress | None = None
) -> Any:
    """Images of each class that each latent fires on, a sparse [C, F]; label [I]; -1 is left out."""
    from scipy.sparse import csr_array

    def chunk(piece: Piece) -> Any:
        pairs = piece.pairs
        keep = firing(pairs) & (label[pairs.image] >= 0)
        entries = (label[pairs.image[keep]], pairs.latent[keep])
        return csr_array((np.ones(len(entries[0]), np.int64), entries), shape=(n_classes, len(piece.latents)))

    counted = Statistic(chunk, lambda parts: sum(parts[1:], parts[0]))
    return reduce_shards(codes, {"counts": counted}, tau=firing.tau, on_progress=report)["counts"]


def read_firing(
    codes: CodeStore, latents: NDArray[np.int64], firing: Firing, report: Progress | None = None
) -> Callable[[int], NDArray[np.bool_]]:
    """latent -> [I], whether it fires on each image; for the given latents (ascending) only."""

    def chunk(piece: Piece) -> Any:
        pairs = piece.pairs
        keep = firing(pairs) & np.isin(pairs.latent, latents)
        return pairs.latent[keep], pairs.image[keep]

    joined = Statistic(chunk, join_columns)
    latent, image = reduce_shards(codes, {"pairs": joined}, tau=firing.tau, on_progress=report)["pairs"]
    order = np.argsort(latent, kind="stable")
    latent, image = latent[order], image[order]

    def fires(wanted: int) -> NDArray[np.bool_]:
        on_image = np.zeros(codes.n_images, dtype=np.bool_)
        on_image[image[slice(*np.searchsorted(latent, [wanted, wanted + 1]))]] = True
        return on_image

    return fires


# ---------------------------------------------------------------------------------------------------------------------
# Judging


def _judge(
    head: Head, n_learned: int, rules: RuleSet, fires: Callable[[int], NDArray[np.bool_]], labels: NDArray[Any],
    targets: NDArray[Any], judged: NDArray[np.bool_], config: RulesConfig, names: dict[int, str],
) -> LearnedRules:  # fmt: skip
    answers, number = (column[judged] for column in rules.apply(fires, len(targets)))
    labels, targets = labels[judged], targets[judged]
    n_images, right, same = len(answers), int((answers == labels).sum()), int((answers == targets).sum())
    classes = {}
    for name in sorted({rule.label for rule in rules.rules} | set(targets)):
        mine, hit = targets == name, (answers == name) & (targets == name)
        scored = [
            _score(rule, conjunction(rule.literals, fires, len(judged))[judged], mine, names, config.n_patches)
            for rule in rules.rules
            if rule.label == name
        ]
        classes[name] = ClassRules(
            n_images=int(mine.sum()), recall=_share(hit.sum(), mine.sum()),
            precision=_share(hit.sum(), (answers == name).sum()), rules=tuple(scored),
        )  # fmt: skip
    low, high = wilson_interval(right, n_images)
    return LearnedRules(
        *head, n_learned=n_learned, n_judged=n_images, accuracy=right / n_images, accuracy_low=low, accuracy_high=high,
        fidelity=same / n_images, coverage=float((number >= 0).mean()),
        majority=float(max(np.unique(targets, return_counts=True)[1]) / n_images),
        model_accuracy=None if config.explain == "label" else float((targets == labels).mean()),
        size=RulesSize(
            len(rules.rules), sum(len(rule.literals) for rule in rules.rules), len(rules.latents)
        ),
        default=rules.default, classes=classes,
    )  # fmt: skip


def _score(
    rule: Rule, fires: NDArray[np.bool_], mine: NDArray[np.bool_], names: dict[int, str], n_patches: int
) -> RuleScores:
    n_fires, n_right = int(fires.sum()), int((fires & mine).sum())
    return RuleScores(
        text=rule.say(names, n_patches), literals=rule.literals, learned_precision=rule.precision, n_fires=n_fires,
        precision=_share(n_right, n_fires), recall=_share(n_right, int(mine.sum())),
    )  # fmt: skip


def _share(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None
