"""adapt(): train prompts on a few labeled images, and measure what they gain.

In: labeled images, a model, `PromptConfig`. Out: an opened `x.prompts` artifact. Promises: the same call resumes;
accuracies are measured on images that were not used for training: those of `test`, or the rest of `images`, without
copies of shots.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actcache.artifacts import (
    ARTIFACT_FILE,
    Artifact,
    OutputLock,
    begin_artifact,
    check_apart,
    open_artifact,
    read_settings,
    read_summary,
    seal_artifact,
    storage_errors,
)
from actcache.errors import PipelineError, SettingsError
from actcache.models import Clip, load_clip, read_templates
from actcache.options import check_number, identity_of
from actcache.progress import ProgressWithNote
from actcache.prompts.accuracy import CLASS_MEANS, ZERO_SHOT, AdaptationAccuracy, PromptSettings, PromptsSummary
from actcache.prompts.artifact import read_prompts, write_prompts
from actcache.prompts.class_names import class_words, read_class_names, warn_about_shared_texts
from actcache.prompts.config import PromptConfig
from actcache.prompts.few_shot import ClassSplit, choose_shots, split_classes
from actcache.prompts.measuring import measure
from actcache.prompts.pixels import Pixels, Shots
from actcache.prompts.prompts import Prompts
from actcache.prompts.shots import leave_out_shots, list_shots
from actcache.prompts.towers import Towers, check_method, make_towers
from actcache.prompts.training import CHECKPOINT_FILE, PromptTraining
from actcache.seen import SeenImages
from actcache.sources import ImageSource, open_source
from actcache.store import remember_paths

N_CURVE = 100
"""Maximum number of points of the loss curve that are kept."""


@dataclass(frozen=True)
class Adaptation:
    """A finished `x.prompts`, with the training loss thinned to at most 100 points.

    Attributes:
        seen: test images that are shots. None for an artifact that was made before they were looked for.
        judge: what told classes apart, see `PromptsSummary`.
    """

    artifact: Artifact
    accuracy: AdaptationAccuracy
    loss: list[float]
    seen: SeenImages | None = None
    judge: str = ZERO_SHOT

    @classmethod
    def open(cls, path: str | Path) -> "Adaptation":
        """Open a finished adaptation. Raises ArtifactNotFoundError, SchemaError, IncompleteError, CorruptError."""
        artifact = open_artifact(path, "prompts", complete=True)
        read_settings(artifact, PromptSettings)
        summary = read_summary(artifact, PromptsSummary)
        return cls(artifact, summary.accuracy, list(summary.loss), summary.seen, summary.judge)

    def prompts(self) -> Prompts:
        """Read the prompts. Raises CorruptError."""
        return read_prompts(self.artifact)

    def to_json(self) -> dict[str, object]:
        """Every fact that is shown."""
        return {
            "prompts": str(self.artifact.path),
            "prompts_id": self.artifact.id,
            "judge": self.judge,
            "accuracy": self.accuracy.to_json(),
            **({} if self.seen is None else {"seen": asdict(self.seen)}),
        }

    def rows(self) -> list[dict[str, object]]:
        """The table that the command line prints: the accuracy by what tells classes apart, and with the prompts."""
        plain = self.judge.replace("-", "_")
        return [{"classes": name, plain: before, "adapted": after} for name, before, after in self.accuracy.parts()]

    def notes(self) -> list[str]:
        """What the command line says about test images that are shots, below the table."""
        return [] if self.seen is None else self.seen.lines()

    def __repr__(self) -> str:
        measured = [part for part in self.accuracy.parts() if part[2] is not None]
        parts = [f"{name} {before:.1%} -> {after:.1%}" for name, before, after in measured]
        method = read_settings(self.artifact, PromptSettings).method
        return f"Adaptation({self.artifact.path.name}: {method}, accuracy {', '.join(parts)})"


def adapt(
    images: ImageSource | str | Path,
    prompts: str | Path,
    *,
    model: str,
    pretrained: str | None = None,
    config: PromptConfig | None = None,
    test: ImageSource | str | Path | None = None,
    path_column: str | None = None,
    label: str | None = None,
    image_size: str | None = None,
    preprocess: str | Path | None = None,
    precision: str = "auto",
    device: str = "auto",
    checkpoint_every: int = 200,
    overwrite: bool = False,
    on_progress: ProgressWithNote | None = None,
) -> Adaptation:
    """Train prompts on a few labeled images of each class; the model itself stays frozen.

    Without a text tower, the classes are the mean features of their shots instead of texts (class_means.py).

    Args:
        images: labeled images: a folder of class folders, or another source with labels.
        prompts: the artifact to write, e.g. `maple.prompts`.
        model, pretrained: see `load_clip`.
        config: how to train; None takes MaPLe's usual values.
        test: labeled images of the same classes for the evaluation; by default those of `images` not used as shots.
        path_column, label: the columns of the images and of the labels of tables, as in `open_source`.
        image_size, preprocess: see `ExtractConfig`.
        precision: auto, float32, or bfloat16 (branches in bfloat16, the residual stream in float32).
        checkpoint_every: number of steps between checkpoints.
        on_progress: called with (steps done, all steps, note), then with (images measured, all images, note).

    Raises:
        SettingsError: a bad value, a class with too few images, or other classes in `test`.
        ModelError: the method does not suit the model, see `check_method`. Others as `load_clip`, `open_source` and
            `PromptTraining.run` raise them.
    """
    checkpoint_every = check_number("checkpoint_every", checkpoint_every, int, at_least=1)
    config = config or PromptConfig()
    source = open_source(images, class_level=config.class_level, path_column=path_column, label=label)
    test_source = None
    if test is not None:
        test_source = open_source(test, class_level=config.class_level, path_column=path_column, label=label)
    table = _list_images(source, config)
    split = split_classes(table["label_name"].to_pylist(), source.path.name)
    names = split.choose(config.classes)
    warn_about_shared_texts(names)
    rows = choose_shots(table["uri"].to_pylist(), table["label_name"].to_pylist(), names, config.shots, config.seed)
    test_table = _test_table(table, rows, test_source, split, config)
    shot_table = table.take(rows)
    shots_listed, seen = list_shots(source, shot_table["uri"].to_pylist()), None
    if overwrite or not _is_complete(prompts):
        test_table, seen = leave_out_shots(
            test_table, test_source or source, shots_listed, shot_table["bytes"].to_pylist(), config
        )
    as_given = None if preprocess is None else str(preprocess)
    clip = load_clip(model, pretrained, image_size=image_size, preprocess_as=as_given)
    towers = make_towers(clip, precision=precision, device=device)
    check_method(config.method, towers, clip.name)
    resolved = replace(config, template=read_templates(config.template)[0]).resolve(towers.vision.n_layers)
    labels = np.repeat(np.arange(len(names)), config.shots)
    shots = Shots(Pixels(source, shots_listed.uri, clip), labels, tuple(class_words(name, names) for name in names))
    training = PromptTraining(towers, shots, resolved)
    with OutputLock(prompts) as lock:
        artifact = _begin(
            prompts, source, test_source, clip, towers, resolved, names, model, pretrained, overwrite, lock
        )
        if artifact.complete or seen is None:
            return Adaptation.open(artifact.path)
        trained = training.run(artifact.path, checkpoint_every=checkpoint_every, on_progress=on_progress)
        uris, label_names = test_table["uri"].to_pylist(), test_table["label_name"].to_pylist()
        measured = Pixels(test_source or source, uris, clip)
        accuracy = measure(
            towers, trained, resolved, split, measured, label_names, means=training.class_means,
            on_progress=on_progress,
        )  # fmt: skip
        write_prompts(artifact, trained.tensors)
        with storage_errors(artifact.path):
            (artifact.path / CHECKPOINT_FILE).unlink(missing_ok=True)
        every = max(1, -(-training.n_steps // N_CURVE))
        loss = training.losses[::every].tolist()
        known: dict[str, object] = {"seen": asdict(seen), "shots": asdict(shots_listed)}
        if training.class_means is not None:
            known["judge"] = CLASS_MEANS
        seal_artifact(artifact.path, accuracy=accuracy.to_json(), loss=loss, n_test=len(uris), **known)
        return Adaptation.open(artifact.path)


def _is_complete(path: str | Path) -> bool:
    try:
        return open_artifact(path, "prompts").complete
    except PipelineError:
        return False


def _list_images(source: ImageSource, config: PromptConfig) -> Any:
    """The images of a source, with the classes' names as the user gave them."""
    plan = source.plan()
    if config.class_names is not None:
        plan = plan.rename_classes(read_class_names(config.class_names, plan.classes))
    return plan.table


def _test_table(
    table: Any, shots: NDArray[np.int64], test_source: ImageSource | None, split: ClassSplit, config: PromptConfig
) -> Any:
    """The labeled test images. Raises SettingsError if their classes differ from training, or if there are none."""
    if test_source is None:
        table = table.take(np.setdiff1d(np.arange(table.num_rows), shots))
        problem = "all labeled images are used as shots"
    else:
        table = _list_images(test_source, config)
        problem = f"{test_source.path.name} has no labeled image"
    labeled = np.array([bool(name) for name in table["label_name"].to_pylist()])
    if not labeled.any():
        raise SettingsError(f"There are no test images: {problem}. Give others with --test.")
    table = table.filter(labeled)
    test_classes = set(table["label_name"].to_pylist())
    if other := sorted(test_classes ^ set(split.all)):
        raise SettingsError(
            f"Test and training images have different classes: only one of them has {', '.join(other[:5])}. "
            "Expected the same class names in both."
        )
    return table


def _begin(
    path: str | Path, source: ImageSource, test_source: ImageSource | None, clip: Clip, towers: Towers, config:
    PromptConfig,
    names: Sequence[str], model: str, pretrained: str | None, overwrite: bool, lock: OutputLock,
) -> Artifact:  # fmt: skip
    parents = {"images": (source.plan().rows_id, source.path)}
    if test_source is not None:
        parents["test images"] = (test_source.plan().rows_id, test_source.path)
    settings = {
        "model_id": clip.model_id,
        "method": config.method,
        "template": config.template,
        "position": config.position,
        "classes": list(names),
        "precision": towers.vision.precision,
        # `classes` records what the last two fields decide
        "config": {
            name: value for name, value in identity_of(config).items() if name not in ("class_level", "class_names")
        },
    }
    provenance = {
        "model": Path(model).name,
        "pretrained": Path(pretrained or clip.source.sources["weights"]).name,
        "model_sources": clip.facts,
        "torch": torch.__version__,
        "device": towers.vision.device.type,
        "paths": remember_paths(Path(path), model=model, pretrained=pretrained or model),
    }
    if not (Path(path) / ARTIFACT_FILE).exists():
        check_apart(Path(path), {name: where for name, (_, where) in parents.items()})
    return begin_artifact(
        path, "prompts", settings=settings, parents=parents, provenance=provenance, overwrite=overwrite, lock=lock
    )
