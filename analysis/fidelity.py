"""evaluate_fidelity(): what is left of the classifier when an SAE stands in for the stream.

In: runs, a store with labels. Out: zero-shot accuracy and loss, five ways: with the activations as they are
(`original`), with their reconstruction (`sae`), with reconstruction and error term (`sae+error`: the original again,
the check that the splice is right), with zeros (`zero`) and with the mean token of its kind (`mean`).

loss: cross-entropy of softmax(logit scale x cosine) over the class names, CLIP's contrastive loss with the classes as
texts. recovered: (ablated - sae) / (ablated - original); the share alone hides how much there was to lose, so the
absolute values stand beside it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from actcache import StoreGroup, Stores, open_stores, open_towers
from analysis.intervals import wilson_interval
from analysis.results import describe_result, find_result, finish_result
from analysis.splicing import Spliced, choose_tokens, splice
from analysis.zero_shot import BATCH_IMAGES, ZeroShot, as_numpy, batches, open_zero_shot
from saetrain import Run, held_out_images

VARIANTS = ("original", "sae", "sae+error", "zero", "mean")


@dataclass(frozen=True)
class Outcome:
    """What a classifier said of some images, in their order."""

    label: NDArray[np.int64]  # [I] true class
    predicted: NDArray[np.int64]  # [I]
    loss: NDArray[np.float64]  # [I]

    @property
    def right(self) -> NDArray[np.bool_]:
        return np.asarray(self.predicted == self.label)

    def numbers(self) -> dict[str, float]:
        """accuracy with its 95 % interval (Wilson), the mean over classes of their recall, and the mean loss."""
        low, high = wilson_interval(int(self.right.sum()), len(self.right))
        return {
            "accuracy": float(self.right.mean()),
            "accuracy_low": low,
            "accuracy_high": high,
            "class_accuracy": float(np.mean(list(self.recalls().values()))),
            "loss": float(self.loss.mean()),
        }

    def recalls(self) -> dict[int, float]:
        """Accuracy of each class."""
        classes, number, n_images = np.unique(self.label, return_inverse=True, return_counts=True)
        shares = np.bincount(number, weights=self.right) / n_images
        return dict(zip(classes.tolist(), shares.tolist(), strict=True))


class Outcomes:
    """Collects batches of logits into an Outcome."""

    def __init__(self) -> None:
        self._parts: list[tuple[NDArray[Any], ...]] = []

    def add(self, logits: Tensor, label: NDArray[np.int64]) -> None:
        """logits [B, C]."""
        truth = torch.from_numpy(label).to(logits.device)
        loss = F.cross_entropy(logits.double(), truth, reduction="none")
        self._parts.append((label, as_numpy(logits.argmax(1)), as_numpy(loss)))

    def result(self) -> Outcome:
        return Outcome(*(np.concatenate(column) for column in zip(*self._parts, strict=True)))


def evaluate_fidelity(
    run: Run | str | Path,
    store: Stores | StoreGroup,
    out: str | Path | None = None,
    *,
    templates: str | Sequence[str] = "photo",
    tokens: str | None = None,
    where: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    model: str | None = None,
    pretrained: str | None = None,
    device: str = "auto",
    batch_size: int = BATCH_IMAGES,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure one run, or every run of a folder (a sweep: several layers, several sizes), on labeled images.

    Args:
        store: with labels, of the run's model. Of the store that a run was trained on, only held-out images count.
        out: a JSON file for the result; the same call again returns what is there.
        templates, where, limit, seed, model, pretrained, device: see `open_zero_shot`.
        tokens: what is replaced, all, patch or cls; by default what the run was trained on.
        batch_size: images a forward pass. Speed only.
        on_progress: called with (images done, images in all).

    Returns:
        The result: settings, class names, and `runs`: for each its hook point, the number of images, the five
        variants' numbers, and the recovered share of accuracy and loss against either ablation (None where the ablation
        costs nothing).

    Raises:
        SettingsError, ParentMismatchError, SchemaError: see `open_zero_shot`, `find_runs`.
    """
    runs = find_runs(run)
    store = open_stores(store)
    parents = {_numbered("run", i): one.artifact for i, one in enumerate(runs)}
    parents |= {_numbered("store", i): one.artifact for i, one in enumerate(store.stores)}
    settings = {"templates": templates, "tokens": tokens, "where": where, "limit": limit, "seed": seed}
    head = describe_result("fidelity", settings, parents)
    out = None if out is None else Path(out)
    if found := find_result(out, head, overwrite=overwrite):
        return found
    for one in runs:
        one.check_store(store)
    towers = open_towers(store.stores[0].artifact, model=model, pretrained=pretrained, device=device)
    measured = []
    for number, one in enumerate(runs):
        kind = choose_tokens(one, tokens)
        scene = open_zero_shot(
            store, one.hook_point, templates=templates, where=where, within=unseen_images(one, store), limit=limit,
            seed=seed, towers=towers,
        )  # fmt: skip
        total = len(scene.images) * len(runs)

        def report(n_images: int, before: int = number * len(scene.images), total: int = total) -> None:
            if on_progress:
                on_progress(before + n_images, total)

        outcomes = compare_variants(scene, one, kind, batch_size=batch_size, report=report)
        measured.append(_describe(one, kind, scene, outcomes))
    body = {"n_classes": len(scene.names), "classes": list(scene.names), "runs": measured}
    return finish_result(out, head, body)


def find_runs(path: Run | str | Path) -> list[Run]:
    """A run, or the finished runs of a sweep's folder, by name. Raises ArtifactNotFoundError where there is none."""
    if isinstance(path, Run):
        return [path]
    members = sorted(file.parent for file in Path(path).glob("*/artifact.json"))
    if members and not (Path(path) / "artifact.json").exists():
        return [Run.open(member) for member in members]
    return [Run.open(path)]


def unseen_images(run: Run, store: StoreGroup) -> NDArray[np.int64]:
    """Images of a store that the run was not trained on: of its own store the held-out ones, of others all."""
    trained = {parent.id for name, parent in run.artifact.parents.items() if name.startswith("store")}
    parts = [
        start + np.array(held_out_images(one.n_images) if one.store_id in trained else range(one.n_images))
        for start, one in zip(store.starts.tolist(), store.stores, strict=False)
    ]
    return np.concatenate(parts)


@torch.no_grad()
def compare_variants(
    scene: ZeroShot, run: Run, tokens: str, *, batch_size: int = BATCH_IMAGES,
    report: Callable[[int], None] = lambda n_images: None,
) -> dict[str, Outcome]:  # fmt: skip
    """The five variants' outcomes on the scene's images."""
    sae = run.sae().to(scene.vision.device)
    means = mean_tokens(scene)
    outcomes = {name: Outcomes() for name in VARIANTS}
    done = 0
    for images in batches(scene.images, batch_size):
        spliced = splice(sae, scene.read(images), scene.store.n_tokens, tokens)
        for name in VARIANTS:
            outcomes[name].add(scene.logits(_variant(name, spliced, means)), scene.labels[images])
        done += len(images)
        report(done)
    return {name: collected.result() for name, collected in outcomes.items()}


def mean_tokens(scene: ZeroShot) -> Tensor:
    """[T, D]: the mean activation of each token's kind over the whole store, from its records."""
    store, hook = scene.store, scene.hook_point
    cls, patch = (torch.from_numpy(store.statistics(hook, kind).mean).float() for kind in ("cls", "patch"))
    return torch.cat([cls[None], patch.expand(store.n_tokens - 1, -1)]).to(scene.vision.device)


def _variant(name: str, spliced: Spliced, means: Tensor) -> Tensor:
    if name == "original":
        return spliced.x
    new = {
        "sae": lambda: spliced.whole,
        "sae+error": lambda: spliced.whole + spliced.error,
        "zero": lambda: torch.zeros_like(spliced.old),
        "mean": lambda: means[spliced.part].expand_as(spliced.old),
    }[name]()
    return spliced.stream(new)


def _describe(run: Run, tokens: str, scene: ZeroShot, outcomes: dict[str, Outcome]) -> dict[str, Any]:
    numbers = {name: outcome.numbers() for name, outcome in outcomes.items()}
    for name, outcome in outcomes.items():
        numbers[name]["same_prediction"] = float((outcome.predicted == outcomes["original"].predicted).mean())
    recovered = {
        f"{measure}_{ablation}": _recovered(
            measure, *(numbers[name][measure] for name in ("original", "sae", ablation))
        )
        for measure in ("accuracy", "loss")
        for ablation in ("zero", "mean")
    }
    return {
        "run": run.path.name,
        "hook_point": str(run.hook_point),
        "tokens": tokens,
        "n_images": len(scene.images),
        "variants": numbers,
        "recovered": recovered,
    }


def _recovered(measure: str, original: float, sae: float, ablated: float) -> float:
    """NaN where the ablation does no harm: accuracy does not fall, or loss does not rise."""
    harm = original - ablated if measure == "accuracy" else ablated - original
    return (sae - ablated) / (original - ablated) if harm > 0 else float("nan")


def _numbered(name: str, index: int) -> str:
    return name if index == 0 else f"{name} {index + 1}"
