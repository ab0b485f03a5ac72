"""x.prompts/: the prompts of an adapted CLIP on disk. In: its path, or an original checkpoint. Out: `Prompts`.

artifact.json         method, template, classes, training settings; parents: the images
prompts.safetensors   float32, named as in the method's own checkpoints
manifest.json         the seal, with the accuracies
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load, save

from actcache.artifacts import ARTIFACT_FILE, Artifact, open_artifact, open_checked, read_settings, write_atomic
from actcache.errors import CorruptError, ParentMismatchError
from actcache.models import Clip
from actcache.prompts.accuracy import PromptSettings
from actcache.prompts.checkpoints import read_prompt_checkpoint
from actcache.prompts.class_names import class_words
from actcache.prompts.prompts import Prompts

PROMPTS_FILE = "prompts.safetensors"


def open_prompts(path: str | Path, clip: Clip) -> Prompts:
    """Read prompts from an artifact that `adapt` wrote, or from an original checkpoint, for the CLIP that was adapted.

    Raises:
        ParentMismatchError, ModelError: they were made for another model, or the file is not a checkpoint.
        ArtifactNotFoundError, SchemaError, IncompleteError, CorruptError: see `open_artifact`.
    """
    path = Path(path)
    if path.is_file() and path.name != ARTIFACT_FILE:
        return read_prompt_checkpoint(path, clip)
    artifact = open_artifact(path, "prompts", complete=True)
    settings = read_settings(artifact, PromptSettings)
    if settings.model_id != clip.model_id:
        raise ParentMismatchError(
            f"{path} adapts model {settings.model_id}, but {clip.name} is {clip.model_id}. "
            "Give --model and --pretrained as for `adapt`."
        )
    prompts = read_prompts(artifact)
    prompts.check_towers(clip)
    return prompts


def read_prompts(artifact: Artifact) -> Prompts:
    """The prompts in an artifact, without a check of the model. Raises CorruptError."""
    file, settings = artifact.path / PROMPTS_FILE, read_settings(artifact, PromptSettings)
    try:
        with open_checked(artifact, PROMPTS_FILE) as opened:
            tensors = load(opened.read())
        if bad := [name for name, value in tensors.items() if not value.is_floating_point() or value.dim() > 3]:
            raise ValueError(f"{bad[0]} is not a tensor of prompts")
        prompts = Prompts(settings.method, tensors, settings.template, settings.position)
        if prompts.n_classes is None:
            return prompts
        names = settings.classes
        if prompts.n_classes != len(names):
            raise ValueError(f"it has prompts for {prompts.n_classes} classes, but artifact.json names others")
        return replace(prompts, classes=tuple(class_words(name, names) for name in names))
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, CorruptError):
            raise
        raise CorruptError(f"{file} cannot be read ({str(error)[:200]}). {artifact.remedy}") from error


def write_prompts(artifact: Artifact, tensors: Mapping[str, Any]) -> None:
    """Write the tensors in one atomic step."""
    plain = {name: value.detach().float().cpu().contiguous() for name, value in tensors.items()}
    write_atomic(artifact.path / PROMPTS_FILE, save(plain))
