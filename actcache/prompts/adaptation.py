"""adapt(): labeled images and a CLIP in, prompts that were trained on a few of the images out, and what they gained.

In: labeled images, a model, `PromptConfig`. Out: an `x.prompts` artifact, opened. Promises: the same call resumes;
accuracies are measured on images that were not learned from: those of `test`, or all of `images` that are no shots.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache.artifacts import Artifact, begin_artifact, open_artifact, read_manifest, remove_litter, seal_artifact
from actcache.errors import SettingsError
from actcache.models import Clip, load_clip, make_text_tower, make_vision_tower, read_templates
from actcache.progress import ProgressWithNote
from actcache.prompts.artifact import read_prompts, write_prompts
from actcache.prompts.config import PromptConfig
from actcache.prompts.few_shot import ClassSplit, choose_shots, class_words, split_classes
from actcache.prompts.prompts import Prompts
from actcache.prompts.towers import Towers, classify, prompt_text
from actcache.prompts.training import CHECKPOINT_FILE, Pixels, PromptTraining, Shots, embed_all, embed_texts
from actcache.sources import ImageSource, open_source
from actcache.store import remember_paths

N_CURVE = 100
"""Points of the loss curve that are kept."""

BATCH_TEXTS = 512
"""Texts that CoCoOp embeds at once when it classifies: images x classes."""


@dataclass(frozen=True)
class Adaptation:
    """A finished `x.prompts`.

    Attributes:
        accuracy: `zero_shot` and `adapted`: {all, base, novel, harmonic, per_class}; what was not measured is None.
        loss: the training loss, thinned to at most 100 points.
    """

    artifact: Artifact
    accuracy: dict[str, dict[str, Any]]
    loss: list[float]

    @classmethod
    def open(cls, path: str | Path) -> "Adaptation":
        """Raises ArtifactNotFoundError, SchemaError, IncompleteError, CorruptError."""
        artifact = open_artifact(path, "prompts", complete=True)
        manifest = read_manifest(artifact)
        return cls(artifact, manifest["accuracy"], manifest["loss"])

    def prompts(self) -> Prompts:
        return read_prompts(self.artifact)

    def __repr__(self) -> str:
        parts = []
        for name in ("all", "base", "novel", "harmonic"):
            before, after = (self.accuracy[how][name] for how in ("zero_shot", "adapted"))
            if before is not None and after is not None:
                parts.append(f"{name} {before:.1%} -> {after:.1%}")
        method = self.artifact.settings["config"]["method"]
        return f"Adaptation({self.artifact.path.name}: {method}, accuracy {', '.join(parts)})"


def adapt(
    images: ImageSource | str | Path,
    prompts: str | Path,
    *,
    model: str,
    pretrained: str,
    config: PromptConfig | None = None,
    test: ImageSource | str | Path | None = None,
    precision: str = "auto",
    device: str = "auto",
    checkpoint_every: int = 200,
    overwrite: bool = False,
    on_progress: ProgressWithNote | None = None,
) -> Adaptation:
    """Train prompts on a few labeled images of each class, the CLIP itself frozen.

    Args:
        images: labeled: a folder of class folders, or another source with labels.
        prompts: the artifact to write, e.g. `maple.prompts`.
        model, pretrained: see `load_clip`.
        config: how; None takes MaPLe's usual values.
        test: labeled images of the same classes to measure on; by default those of `images` that are no shots.
        precision: float32, or bfloat16 branches around a float32 stream.
        checkpoint_every: steps between checkpoints.
        on_progress: called with (steps done, steps in all, note), then with (images measured, images in all, note).

    Raises:
        SettingsError: bad values, too few images of a class, other classes in `test`.
        ModelError, ImageSourceError, NonFiniteError: see `load_clip`, `open_source`, `PromptTraining.run`.
    """
    source, tested = open_source(images), None if test is None else open_source(test)
    config = config or PromptConfig()
    table = source.plan().table
    split = split_classes(table["label_name"].to_pylist(), source.path.name)
    names = split.choose(config.classes)
    rows = choose_shots(table["uri"].to_pylist(), table["label_name"].to_pylist(), names, config.shots, config.seed)
    test_table = _test_table(table, rows, tested, split)
    clip = load_clip(model, pretrained)
    towers = Towers(make_vision_tower(clip, precision=precision, device=device), make_text_tower(clip, device=device))
    resolved = replace(config, template=read_templates(config.template)[0]).resolve(towers.vision.n_layers)
    artifact = _begin(prompts, source, tested, clip, towers, resolved, names, model, pretrained, overwrite)
    if artifact.complete:
        return Adaptation.open(artifact.path)
    remove_litter(artifact.path)
    pixels = Pixels(source, [table["uri"][int(row)].as_py() for row in rows], clip.transform)
    labels = np.repeat(np.arange(len(names)), config.shots)
    shots = Shots(pixels, labels, tuple(map(class_words, names)))
    training = PromptTraining(towers, shots, resolved, artifact.path)
    found = training.run(checkpoint_every=checkpoint_every, on_progress=on_progress)
    uris, label_names = test_table["uri"].to_pylist(), test_table["label_name"].to_pylist()
    measured = Pixels(tested or source, uris, clip.transform)
    accuracy = measure(towers, found, resolved, split, measured, label_names, on_progress=on_progress)
    write_prompts(artifact, found.tensors)
    (artifact.path / CHECKPOINT_FILE).unlink(missing_ok=True)
    every = max(1, -(-training.n_steps // N_CURVE))
    seal_artifact(artifact.path, accuracy=accuracy, loss=training.losses[::every].tolist(), n_test=len(uris))
    return Adaptation.open(artifact.path)


def _test_table(table: Any, shots: NDArray[np.int64], tested: ImageSource | None, split: ClassSplit) -> Any:
    """Labeled images that are measured on. Raises SettingsError where they are of other classes, or none is left."""
    if tested is None:
        table = table.take(np.setdiff1d(np.arange(table.num_rows), shots))
        what = "every labeled image is a shot. Give others with --test"
    else:
        table = tested.plan().table
        what = f"{tested.path.name} holds no labeled image. Give others with --test"
    labeled = np.array([bool(name) for name in table["label_name"].to_pylist()])
    if not labeled.any():
        raise SettingsError(f"There is nothing to measure on: {what}.")
    table = table.filter(labeled)
    there = set(table["label_name"].to_pylist())
    if other := sorted(there ^ set(split.all)):
        raise SettingsError(
            f"Test and training images have other classes: {', '.join(other[:5])} only in one of them. "
            "Expected the same class names in both."
        )
    return table


def _begin(
    path: str | Path, source: ImageSource, tested: ImageSource | None, clip: Clip, towers: Towers, config: PromptConfig,
    names: Sequence[str], model: str, pretrained: str, overwrite: bool,
) -> Artifact:  # fmt: skip
    parents = {"images": (source.plan().rows_id, source.path)}
    if tested is not None:
        parents["test images"] = (tested.plan().rows_id, tested.path)
    settings = {
        "model_id": clip.model_id,
        "method": config.method,
        "template": config.template,
        "position": config.position,
        "classes": list(names),
        "precision": towers.vision.precision,
        "config": asdict(config),
    }
    provenance = {
        "model": Path(model).name,
        "pretrained": Path(pretrained).name,
        "torch": torch.__version__,
        "device": towers.vision.device.type,
        "paths": remember_paths(Path(path), model=model, pretrained=pretrained),
    }
    return begin_artifact(
        path, "prompts", settings=settings, parents=parents, provenance=provenance, prepare=lambda folder: None,
        overwrite=overwrite,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def measure(
    towers: Towers, prompts: Prompts, config: PromptConfig, split: ClassSplit, pixels: Pixels,
    label_names: Sequence[str], *, on_progress: ProgressWithNote | None = None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Accuracy without and with prompts: among all classes, among the base and among the novel ones.

    `harmonic` is the harmonic mean of base and novel (Xian et al. 2017). Base and novel images are told apart among
    their own half only, as is usual. Prompts that are tied to their classes know no others: None.
    """
    adapted = bool(prompts.n_vision)
    total, done = len(pixels) * (1 + adapted), 0

    def report(n: int) -> None:
        nonlocal done
        done += n
        if on_progress:
            on_progress(done, total, "measuring")

    plain = embed_all(towers, None, pixels, on_batch=report)
    images = embed_all(towers, prompts, pixels, on_batch=report) if adapted else plain
    labels = np.asarray(label_names, dtype=object)
    found: dict[str, dict[str, Any]] = {"zero_shot": {}, "adapted": {}}
    for how, own, embedded in (("zero_shot", None, plain), ("adapted", prompts, images)):
        for classes in ("all", "base", "novel"):
            names = getattr(split, classes)
            tied = own is not None and own.n_classes is not None and names != split.choose(config.classes)
            mine = np.flatnonzero(np.isin(labels, np.array(names, dtype=object)))
            if tied or len(names) < 2 or not len(mine):
                found[how][classes] = None
                continue
            truth = np.searchsorted(np.array(names), labels[mine].astype(str))
            guess = predict(towers, own, embedded[torch.from_numpy(mine)], names, config.template)
            found[how][classes] = float((guess == truth).mean())
            if classes == "all":
                found[how]["per_class"] = {
                    name: float((guess == truth)[truth == i].mean())
                    for i, name in enumerate(names)
                    if (truth == i).any()
                }
        found[how]["harmonic"] = harmonic_mean(found[how]["base"], found[how]["novel"])
        found[how].setdefault("per_class", {})
    return found


@torch.no_grad()
def predict(
    towers: Towers, prompts: Prompts | None, images: Tensor, names: Sequence[str], template: str
) -> NDArray[np.int64]:
    """[N] the nearest of some classes for unit image embeddings [N, E]."""
    words = [class_words(name) for name in names]
    if prompts is not None and prompts.kind.texts_by_image:
        text, size = prompt_text(towers.text, prompts, words), max(1, BATCH_TEXTS // len(words))
        parts = [classify(x, text.embed(prompts, x), 1.0).argmax(1) for x in torch.split(images, size)]
        return np.asarray(torch.cat(parts).cpu().numpy())
    texts = embed_texts(towers.text, prompts, words, template)
    return np.asarray(classify(images, texts, 1.0).argmax(1).cpu().numpy())


def harmonic_mean(base: float | None, novel: float | None) -> float | None:
    if base is None or novel is None:
        return None
    return 2 * base * novel / (base + novel) if base + novel else 0.0
