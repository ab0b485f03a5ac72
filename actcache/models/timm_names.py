"""What a name of timm means: an architecture of its registry, a tag of it, or the config.json of a folder.

A bare name stands for its default tag in timm, with that tag's preprocessing and number of classes. Weights from a file
may be those of another tag, so the tags of a name are compared here, and what they share is told apart from the rest.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm

from actcache.errors import ModelError
from actcache.models.architecture import check_arguments

PREFIX = "timm:"


@dataclass(frozen=True)
class TimmName:
    """A model of timm.

    Attributes:
        architecture: its name in the registry, without a tag.
        arguments: of `timm.create_model`, where they differ from what the name stands for.
        cfg: timm's `pretrained_cfg` of the tag, or of the name's default.
        tag: as it was given; empty for a bare name and for a config.json.
    """

    architecture: str
    arguments: Mapping[str, Any]
    cfg: Mapping[str, Any]
    tag: str = ""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width that it takes by default."""
        size = self.arguments.get("img_size") or self.cfg.get("input_size", (3, 224, 224))[-2:]
        sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
        if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise ModelError(f"{self.architecture} has img_size {ascii(size)[:60]}. Expected a height and a width.")
        return sides

    @property
    def classifiers(self) -> tuple[str, ...]:
        """The layers that give logits."""
        names = self.cfg.get("classifier") or "head"
        return (names,) if isinstance(names, str) else tuple(names)


def find_name(name: str, *, arguments: Mapping[str, Any] | None = None) -> TimmName:
    """A name with or without a tag, NAME or NAME.TAG. Raises ModelError for an unknown one; similar ones are listed."""
    architecture, _, tag = name.partition(".")
    if not architecture or not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=4, cutoff=0.5)
        advice = f" Near: {', '.join(near)}." if near else ""
        raise ModelError(
            f"timm {timm.__version__} has no model {ascii(architecture)[:80]}.{advice} Give a name that "
            "timm.list_models() lists, or timm:local-dir:DIR."
        )
    return TimmName(architecture, dict(arguments or {}), find_tag(architecture, tag), tag)


def find_tag(architecture: str, tag: str) -> Mapping[str, Any]:
    """The `pretrained_cfg` of a tag, or of the default tag where it is empty. Raises ModelError."""
    if tag and tag not in list_tags(architecture):
        known = ", ".join(list_tags(architecture)) or "none"
        raise ModelError(f"timm's {architecture} has no tag {ascii(tag)[:60]}. Its tags: {known}.")
    cfg = timm.get_pretrained_cfg(f"{architecture}.{tag}" if tag else architecture)
    return {} if cfg is None else dict(cfg.to_dict())


def list_tags(architecture: str) -> list[str]:
    names = timm.list_pretrained(f"{architecture}.*")
    return [name.partition(".")[2] for name in names if name.partition(".")[0] == architecture]


def read_config(fields: Mapping[str, Any], file: str) -> TimmName:
    """The model of a config.json that timm wrote. Raises ModelError."""
    name, cfg, arguments = fields.get("architecture"), fields.get("pretrained_cfg"), fields.get("model_args") or {}
    if not isinstance(name, str):
        raise ModelError(f"{file} is no config of timm: it has no architecture. Give the folder of a timm model.")
    cfg = (
        cfg
        if isinstance(cfg, Mapping)
        else {k: v for k, v in fields.items() if k not in ("architecture", "model_args")}
    )
    if not isinstance(arguments, Mapping):
        raise ModelError(f"{file}: model_args must be an object. Copy the file again.")
    check_arguments(file, arguments)
    found = find_name(name.partition(".")[0], arguments=arguments)
    known = {key: value for key, value in cfg.items() if key not in _PLACES and value is not None}
    size = known.get("input_size")
    if size is not None and not (isinstance(size, list) and len(size) == 3 and all(type(n) is int for n in size)):
        raise ModelError(f"{file}: input_size must be [3, height, width], got {ascii(size)[:60]}. Copy the file again.")
    classes = fields.get("num_classes", known.get("num_classes"))
    return TimmName(found.architecture, found.arguments, {**found.cfg, **known, "num_classes": classes})


_PLACES = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "custom_load", "state_dict")
"""Fields that say where weights are; those of a folder are in the folder."""
