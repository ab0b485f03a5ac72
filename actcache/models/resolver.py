"""The one place that says what a name of a model means: where its weights, preprocessing, tokenizer and activation lie.

In: what a user gives as the model and its weights. Out: `ModelSource`, with the source of each fact. Nothing is built
and no tensor is read. A model can be named as

    ViT-B-16                 one of open_clip's architectures, with a tag, a file or a folder of weights
    local-dir:DIR, or DIR    a folder with open_clip_config.json, or with config.json of timm or of transformers (CLIP,
                             SigLIP, DINOv2 with or without registers, DINOv3, ViT)
    hf-hub:OWNER/NAME        the same on the Hugging Face hub
    DIR/config.json          a config by itself, with or without preprocess_cfg
    timm:NAME, timm:NAME.TAG one of timm's architectures, with a tag, a file or a folder of weights
    timm:local-dir:DIR       a folder with config.json of timm, where a repository holds both libraries' configs
    timm:hf-hub:OWNER/NAME   the same on the Hugging Face hub

and its weights as a tag, a file, a folder or repository as above (the model's own by default), or `random:SEED`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import open_clip

from actcache.errors import ModelError
from actcache.models.architecture import TEXT, VISION, context_length, find_family, has_quick_gelu, image_size
from actcache.models.descriptions import PREPROCESSOR, TRANSFORMERS, Description, describe, describe_file
from actcache.models.preprocessing import (
    CONFIG,
    DEFAULT,
    assume_preprocess,
    find_preprocess,
    make_preprocess,
    read_tag,
    read_timm,
)
from actcache.models.refusals import check_family
from actcache.models.timm_names import PREFIX as TIMM
from actcache.models.timm_names import TimmName
from actcache.models.weight_files import LOCAL, TIMM_WEIGHTS, WeightFile, find_weights, say_tags
from actcache.preprocess import MAX_SIDE, Preprocess

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")


@dataclass(frozen=True)
class ModelSource:
    """What a name of a model and of its weights mean.

    Attributes:
        name: in messages, without folders.
        config: open_clip's model config, its numbers in bounds; of timm, the architecture and the arguments given.
        weights: the file; None for random weights.
        seed: of random weights.
        preprocess: how an image becomes pixels.
        tokenizer: the folder or hub repository of a Hugging Face tokenizer; None for CLIP's own.
        sources: what each of `preprocess`, `tokenizer`, `activation`, `image_size` and `context` was taken from.
        notes: what the user should know about the choices, one sentence each.
        timm: the model of timm; None for one of open_clip.
        beside: what a config beside the weights says instead; its construction has to agree.
    """

    name: str
    config: Mapping[str, Any]
    weights: Path | None
    seed: int | None
    preprocess: Preprocess
    tokenizer: str | None
    sources: Mapping[str, str]
    notes: tuple[str, ...] = ()
    timm: TimmName | None = None
    beside: TimmName | None = None


def resolve_model(
    model: str, pretrained: str | None = None, *, preprocess: Mapping[str, Any] | None = None,
    image_size: str | None = None, preprocess_as: str | None = None,
) -> ModelSource:  # fmt: skip
    """Find out what a model is made of.

    Args:
        model, pretrained: as the module describes; by default the weights in the model's own folder or repository.
        preprocess: the fields of `Preprocess` that a store recorded; they go before anything else, their size too.
        image_size: `H` or `HxW`, by default the model's own.
        preprocess_as: what a user gives as the preprocessing, see `find_preprocess`.

    Raises:
        ModelError: a name is unknown (similar ones are listed), a file is missing or damaged, a number in the config is
            out of bounds, two of the sources contradict each other, or nothing says which preprocessing is right.
    """
    described = describe(model)
    if described.timm is not None:
        check_family(described.name, find_family(described.timm.architecture))
    weights = _find_weights(described, model, pretrained)
    if described.timm is not None and weights.tag:
        described = replace(described, timm=replace(described.timm, cfg=weights.tag))
    beside = _beside(weights, described)
    fields, origin, notes = _choose_preprocess(described, weights, beside, preprocess, preprocess_as)
    described, size_origin = _choose_size(described, fields, origin, preprocess, image_size)
    tokenizer, tokenizer_origin = _choose_tokenizer(described)
    config = described.config
    if described.timm is not None:
        config = {"library": "timm", "architecture": described.timm.architecture}
    return ModelSource(
        name=described.name, config=config, weights=weights.file, seed=weights.seed,
        preprocess=make_preprocess({**fields, "size": list(described.image_size)}, origin), tokenizer=tokenizer,
        sources={
            "preprocess": origin, "tokenizer": tokenizer_origin, "activation": described.origin,
            "image_size": size_origin, "context": described.origin, "weights": weights.origin,
        },
        notes=notes, timm=described.timm, beside=None if beside is None else beside.timm,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The weights


def _find_weights(described: Description, model: str, pretrained: str | None) -> WeightFile:
    found = described.timm
    if pretrained is not None:  # a store records the model's own weights by the model's name
        pretrained = None if pretrained == model else pretrained.removeprefix(TIMM)
    name = described.name if found is None or described.folder or described.repo else found.architecture
    if pretrained is None and described.folder is None and described.repo is None:
        if found is None or not found.tag:
            raise ModelError(f"{name} needs weights: give a tag or a file with --pretrained.{say_tags(name, found)}")
        pretrained = found.tag
    elif pretrained is None:
        pretrained = model.removeprefix(TIMM) if described.repo is not None else f"{LOCAL}{described.folder}"
    if found is None and not Path(pretrained).is_file() and (tag := open_clip.get_pretrained_cfg(name, pretrained)):
        check_quick_gelu(name, has_quick_gelu(described.config), pretrained, bool(tag.get("quick_gelu", False)))
    weights = find_weights(name, pretrained, found)
    if found is not None and found.tag and weights.tag and pretrained != found.tag:
        raise ModelError(
            f"--model {TIMM}{described.name} names the tag {found.tag}, but --pretrained names {pretrained}. Leave one "
            "of them out."
        )
    return weights


def _beside(weights: WeightFile, described: Description) -> Description | None:
    """What a config beside the weights says, if the architecture was named by something else.

    It speaks for the weights if it has the same towers. Raises ModelError where it contradicts the architecture in what
    the weights cannot show: the activation, and the number of pixels and tokens.
    """
    if weights.file is None or weights.tag or described.repo is not None:
        return None
    folder = weights.file.absolute().parent
    if described.folder is not None and described.folder.absolute() == folder:
        return None
    for name in (CONFIG, TRANSFORMERS):
        if (folder / name).is_file():
            try:
                other = describe_file(folder / name, f"{name} beside {weights.file.name}")
            except ModelError:  # it may belong to anything
                continue
            if described.timm is not None and other.timm is not None and weights.origin in TIMM_WEIGHTS:
                return other
            if described.timm is not None or other.timm is not None:
                continue
            if _towers(other.config) != _towers(described.config):
                continue
            _check_beside(described, other, weights.file)
            return other
    return None


def _towers(config: Mapping[str, Any]) -> tuple[Any, ...]:
    vision, text = VISION | config["vision_cfg"], TEXT | config["text_cfg"]
    sizes = [vision.get(key) for key in ("timm_model_name", "layers", "width", "patch_size")]
    return (config["embed_dim"], *sizes, *(text[key] for key in ("layers", "width", "vocab_size")))


def _check_beside(described: Description, other: Description, file: Path) -> None:
    for what, read in (("quick_gelu", has_quick_gelu), ("image_size", image_size), ("context_length", context_length)):
        ours, theirs = read(described.config), read(other.config)
        if ours != theirs:
            raise ModelError(
                f"{other.name} says {what} {theirs}, but --model {described.name} has {ours}. Give --model "
                f"{file.parent} to use the weights as they were trained."
            )


# ---------------------------------------------------------------------------------------------------------------------
# The preprocessing, and the size of the image


def _choose_preprocess(
    described: Description, weights: WeightFile, beside: Description | None, recorded: Mapping[str, Any] | None,
    given: str | None,
) -> tuple[Mapping[str, Any], str, tuple[str, ...]]:  # fmt: skip
    """(fields, where they come from, notes)."""
    name = described.name if described.timm is None else described.timm.architecture
    if recorded is not None:
        return recorded, "the store", ()
    if given is not None:
        return *find_preprocess(given, name, described.timm), ()
    if described.preprocess is not None:
        return described.preprocess, f"preprocessing in {described.origin}", ()
    if weights.tag:
        return (read_tag if described.timm is None else read_timm)(weights.tag), weights.origin, ()
    if beside is not None and beside.preprocess is not None:
        return beside.preprocess, f"preprocessing in {beside.name}", ()
    if weights.file is None:
        return ({}, DEFAULT, ()) if described.timm is None else (read_timm(described.timm.cfg), "timm's default", ())
    if described.timm is not None and (described.folder or described.repo):
        raise ModelError(
            f"{described.name} has no {PREPROCESSOR}, so nothing says how its images were prepared. Copy that file "
            "too, or give the preprocessing with --preprocess."
        )
    return assume_preprocess(name, weights.file.name, described.timm)


def _choose_size(
    described: Description, fields: Mapping[str, Any], origin: str, recorded: Mapping[str, Any] | None,
    wanted: str | None,
) -> tuple[Description, str]:  # fmt: skip
    """(the model for the size of image that is wanted, where that comes from)."""
    size, own = None, described.image_size
    if wanted is not None:
        size, where = read_size(wanted), "--image-size"
    elif recorded is not None and "size" in recorded:
        height, width = _pair(recorded["size"])
        size, where = (int(height), int(width)), "the store"
    if size is None or size == own:
        if wanted is None and recorded is None and described.timm is None and "size" in fields:
            _check_size_of(described, fields["size"], origin)
        return described, described.origin
    return described.resize(size), where


def _check_size_of(described: Description, size: Any, origin: str) -> None:
    own = described.image_size
    if _pair(size) != own:
        raise ModelError(
            f"The preprocessing of {described.name} gives images of size {ascii(size)[:60]} ({origin}), but its "
            f"image_size is {own[0]} x {own[1]}. Correct the one that is wrong, or give --image-size."
        )


def read_size(text: str) -> tuple[int, int]:
    """(height, width) of `224` or `224x336`. Raises ModelError."""
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text.strip())
    sides = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not match or max(sides) > MAX_SIDE:
        raise ModelError(
            f"--image-size {ascii(text)[:40]} is no size. Expected a height, or height x width such as 224x336, in "
            f"pixels up to {MAX_SIDE:,}."
        )
    return sides


def _pair(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value, value)


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer


def _choose_tokenizer(described: Description) -> tuple[str | None, str]:
    """(folder or repository of a Hugging Face tokenizer or None, where it comes from)."""
    if described.timm is not None:
        return None, "none: the model has no text tower"
    name = described.config["text_cfg"].get("hf_tokenizer_name")
    if not name:
        return None, "open_clip's tokenizer of CLIP"
    if described.folder is not None and any((described.folder / file).is_file() for file in TOKENIZER_FILES):
        return str(described.folder), f"the files in {described.name}"
    return str(name), f"hf-hub:{name}, which {described.origin} names"


# ---------------------------------------------------------------------------------------------------------------------
# Checks that loading shares


def check_quick_gelu(name: str, architecture: bool, pretrained: str, weights: bool) -> None:
    """Raise ModelError when only one of weights and architecture uses QuickGELU.

    open_clip only warns, and every activation would be silently wrong.
    """
    if architecture != weights:
        other = name + "-quickgelu" if weights else name.removesuffix("-quickgelu")
        advice = f"Use --model {other}." if other in open_clip.list_models() else "Correct quick_gelu in the config."
        raise ModelError(
            f"{pretrained} was trained {'with' if weights else 'without'} QuickGELU and {name} is "
            f"{'with' if architecture else 'without'} it. {advice}"
        )
