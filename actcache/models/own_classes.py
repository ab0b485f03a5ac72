"""The classes that a checkpoint was trained to tell apart, for models that end in a classifier (timm's)."""

from collections.abc import Sequence
from typing import Any

from actcache.models.vision import VisionTower


def own_classes(vision: VisionTower, n_classes: int) -> tuple[tuple[str, ...], ...]:
    """For each class of the model's own classifier the names it is known by.

    A class has no names where nothing names the classes of this checkpoint.
    """
    module = vision.visual
    config = dict(getattr(module, "pretrained_cfg", None) or {})
    listed = config.get("label_names")
    if isinstance(listed, Sequence) and not isinstance(listed, str) and len(listed) == n_classes:
        said = config.get("label_descriptions") or {}
        return tuple(_names(str(name), str(said.get(name, "")) if isinstance(said, dict) else "") for name in listed)
    return _imagenet_classes(module, n_classes)


def _imagenet_classes(module: Any, n_classes: int) -> tuple[tuple[str, ...], ...]:
    """The synsets and lemmas of the ImageNet subset that has this number of classes."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(module)
    if subset is None:
        return ((),) * n_classes
    info: Any = ImageNetInfo(subset)
    if info.num_classes() != n_classes:
        return ((),) * n_classes
    return tuple(_names(name, info.label_name_to_description(name)) for name in info.label_names())


def _names(name: str, description: str) -> tuple[str, ...]:
    """n01440764 and "tench, Tinca tinca" -> the synset, the whole text, and each of its words."""
    words = [word.strip() for word in description.split(",")] if description else []
    return tuple(dict.fromkeys(text for text in (name, description, *words) if text))
