"""What a store was extracted from, and where that lies now: its images and its model.

In: an activation store and, where things moved, new paths. Out: paths that exist, or both towers, their identity
checked against the store's.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from actcache.artifact import Artifact
from actcache.errors import ParentMismatchError, SettingsError

if TYPE_CHECKING:
    from torch import Tensor

    from actcache.prompts import Prompts
    from actcache.text_tower import TextTower
    from actcache.vision_tower import VisionTower


def find_origin(artifact: Artifact, name: str, given: str | None = None) -> str:
    """`model`, `pretrained`, `prompts` or `masks`, as `extract` was given it; a path that was relative is made whole.

    Raises:
        SettingsError: the store does not say, or the file is not there any more.
    """
    if given is not None:
        return given
    value = artifact.provenance.get("paths", {}).get(name)
    if value is None:
        raise SettingsError(f"{artifact.path} does not say what it was extracted with. Give --{name}.")
    return whole_path(artifact, name, value)


def whole_path(artifact: Artifact, name: str, value: str) -> str:
    """A remembered value; a path beside the store, which begins with `..`, from here. Raises SettingsError."""
    if not value.startswith(".."):
        return value
    place = os.path.normpath(artifact.path.absolute() / value)
    if not os.path.exists(place):
        raise SettingsError(f"{place} is not there any more. Say with --{name} what the store was extracted with.")
    return place


def find_image_source(artifact: Artifact, images: str | Path | None = None) -> str | Path:
    """Where the images are. Raises SettingsError when they are not there any more."""
    source = images or artifact.parent_path("images")
    if not os.path.exists(source):
        raise SettingsError(f"{source} is not there any more. Say with --images where the images are.")
    return source


class Towers(NamedTuple):
    """Both towers of a CLIP; of an adapted one the image tower with its prompts, the text tower without."""

    vision: "VisionTower"
    text: "TextTower"
    prompts: "Prompts | None" = None

    def embed_classes(self, names: Sequence[str], templates: Sequence[str]) -> "Tensor":
        """Unit embeddings [C, E] of class names; the prompts of an adapted model have a template of their own.

        Raises:
            SettingsError: CoCoOp, whose text embeddings are another for every image.
        """
        from actcache.prompted_towers import prompt_text

        if self.prompts is None:
            return self.text.embed_classes(names, templates)
        if self.prompts.method == "cocoop":
            raise SettingsError("CoCoOp has other text embeddings for every image. Take prompts of another method.")
        return prompt_text(self.text, self.prompts, names).embed(self.prompts).detach()

    def texts_by_image(self, names: Sequence[str]) -> "Callable[[Tensor], Tensor] | None":
        """CoCoOp's texts: unit image embeddings [B, E] -> [B, C, E]. None where texts are the same for all images."""
        from actcache.prompted_towers import prompt_text

        prompts = self.prompts
        if prompts is None or prompts.method != "cocoop":
            return None
        text = prompt_text(self.text, prompts, names)
        return lambda images: text.embed(prompts, images).detach()


def open_towers(
    artifact: Artifact, *, model: str | None = None, pretrained: str | None = None,
    prompts: str | Path | None = None, device: str = "auto", precision: str | None = None,
) -> Towers:  # fmt: skip
    """Load the CLIP that a store was extracted with.

    Args:
        artifact: of an activation store.
        model, pretrained, prompts: as `extract` was given them; by default what the store remembers.
        precision: of the image tower; by default the store's.

    Raises:
        SettingsError: the model cannot be found. ModelError: it cannot be loaded.
        ParentMismatchError: it is another model than the store's, or it was adapted by other prompts.
    """
    from actcache.clip_model import load_clip
    from actcache.prompt_artifact import open_prompts
    from actcache.prompted_towers import prompt_vision
    from actcache.text_tower import make_text_tower
    from actcache.vision_tower import make_vision_tower

    names = find_origin(artifact, "model", model), find_origin(artifact, "pretrained", pretrained)
    clip = load_clip(*names)
    if clip.model_id != artifact.settings["model_id"]:
        raise ParentMismatchError(
            f"{names[0]} with {names[1]} is not the model of {artifact.path}. "
            "Say with --model and --pretrained which one was."
        )
    adapted = None
    if "prompts" in artifact.settings:
        place = find_origin(artifact, "prompts", None if prompts is None else str(prompts))
        adapted = open_prompts(place, clip)
        if adapted.description != artifact.settings["prompts"]:
            raise ParentMismatchError(f"{place} are not the prompts of {artifact.path}. Say with --prompts which were.")
    text = make_text_tower(clip, device=device)  # moves the whole module
    vision = make_vision_tower(clip, precision=precision or str(artifact.settings["precision"]), device=device)
    adapted = adapted.to(vision.device) if adapted else None
    return Towers(prompt_vision(vision, adapted), text, adapted)
