"""The one place that says what a name of a model means: where its weights, preprocessing, tokenizer and activation lie.

In: what a user gives as the model and its weights. Out: `ModelSource`, with the source of each fact. Nothing is built
and no tensor is read. A model can be named as

    ViT-B-16                 one of open_clip's architectures, with a tag, a file or a folder of weights
    local-dir:DIR, or DIR    a folder with open_clip_config.json, or with config.json of transformers' CLIP
    hf-hub:OWNER/NAME        the same on the Hugging Face hub
    DIR/config.json          a config by itself, with or without preprocess_cfg

and its weights as a tag, a file, a folder or repository as above (the model's own by default), or `random:SEED`.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip

from actcache.errors import ModelError
from actcache.models import transformers_clip
from actcache.models.architecture import (
    TEXT,
    VISION,
    check_architecture,
    context_length,
    has_quick_gelu,
    image_size,
)
from actcache.models.hub import fetch_file, limit_waits
from actcache.models.preprocessing import CONFIG as OPEN_CLIP
from actcache.models.preprocessing import DEFAULT, assume_preprocess, check_fields, make_preprocess, read_tag
from actcache.preprocess import Preprocess

TRANSFORMERS, PREPROCESSOR = "config.json", "preprocessor_config.json"
LOCAL, HUB, RANDOM = "local-dir:", "hf-hub:", "random:"
WEIGHTS = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth", "model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth",
)  # fmt: skip
"""Names of weights in a folder, in the order in which open_clip prefers them."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
MAX_JSON = 1 << 22


@dataclass(frozen=True)
class ModelSource:
    """What a name of a model and of its weights mean.

    Attributes:
        name: in messages, without folders.
        config: open_clip's model config; its numbers are in bounds.
        weights: the file; None for random weights.
        seed: of random weights.
        preprocess: how an image becomes pixels.
        tokenizer: the folder or hub repository of a Hugging Face tokenizer; None for CLIP's own.
        sources: what each of `preprocess`, `tokenizer`, `activation`, `image_size` and `context` was taken from.
        notes: what the user should know about the choices, one sentence each.
    """

    name: str
    config: Mapping[str, Any]
    weights: Path | None
    seed: int | None
    preprocess: Preprocess
    tokenizer: str | None
    sources: Mapping[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Description:
    """An architecture with what was said beside it."""

    name: str
    config: Mapping[str, Any]
    origin: str
    preprocess: Mapping[str, Any] | None = None
    folder: Path | None = None
    repo: str | None = None


@dataclass(frozen=True)
class _Weights:
    file: Path | None
    origin: str
    seed: int | None = None
    tag: Mapping[str, Any] = field(default_factory=dict)


def resolve_model(
    model: str, pretrained: str | None = None, *, preprocess: Mapping[str, Any] | None = None
) -> ModelSource:
    """Find out what a model is made of.

    Args:
        model, pretrained: as the module describes; by default the weights in the model's own folder or repository.
        preprocess: the fields of `Preprocess` that a store recorded; they go before anything else.

    Raises:
        ModelError: a name is unknown (similar ones are listed), a file is missing or damaged, a number in the config is
            out of bounds, or two of the sources contradict each other.
    """
    described = _describe(model)
    weights = _find_weights(described, model, pretrained)
    beside = _beside(weights, described)
    fields, origin, notes = _choose_preprocess(described, weights, beside, preprocess)
    size = image_size(described.config)
    if preprocess is None and "size" in fields and _pair(fields["size"]) != size:
        raise ModelError(
            f"The preprocessing of {described.name} gives images of size {ascii(fields['size'])[:60]} ({origin}), but "
            f"its image_size is {size[0]} x {size[1]}. Correct the one that is wrong."
        )
    tokenizer, tokenizer_origin = _choose_tokenizer(described)
    return ModelSource(
        name=described.name, config=described.config, weights=weights.file, seed=weights.seed,
        preprocess=make_preprocess({**fields, "size": list(size)}, origin), tokenizer=tokenizer,
        sources={
            "preprocess": origin, "tokenizer": tokenizer_origin, "activation": described.origin,
            "image_size": described.origin, "context": described.origin, "weights": weights.origin,
        },
        notes=notes,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The architecture


def _describe(model: str) -> _Description:
    if model.startswith(HUB):
        repo = model.removeprefix(HUB)
        return _describe_file(fetch_file(repo, (OPEN_CLIP, TRANSFORMERS)), model, repo=repo)
    if model.startswith(LOCAL) or Path(model).is_dir():
        folder = Path(model.removeprefix(LOCAL))
        if not folder.is_dir():
            raise ModelError(f"--model {model}: there is no folder {folder}. Give the folder of {OPEN_CLIP}.")
        file = next((folder / name for name in (OPEN_CLIP, TRANSFORMERS) if (folder / name).is_file()), None)
        if file is None:
            raise ModelError(f"--model {model}: the folder has neither {OPEN_CLIP} nor {TRANSFORMERS} of a CLIP.")
        return _describe_file(file, folder.name or str(folder), folder=folder)
    if model.endswith(".json"):
        return _describe_file(Path(model), Path(model).name)
    config = open_clip.get_model_config(model)
    if config is None:
        raise ModelError(
            f"Unknown architecture {model!r}.{say_near(model, open_clip.list_models())} "
            "Give an open_clip name, the path of a config JSON or its folder."
        )
    return _Description(model, check_architecture(config, model), f"open_clip's {model}")


def _describe_file(file: Path, name: str, *, folder: Path | None = None, repo: str | None = None) -> _Description:
    fields = _read_json(file)
    preprocess = None
    if transformers_clip.is_transformers_clip(fields):
        place = file.parent if repo is None else _find_preprocessor(repo)
        if place is not None and (place / PREPROCESSOR).is_file():
            preprocess = transformers_clip.preprocess_fields(_read_json(place / PREPROCESSOR))
        fields = {"model_cfg": transformers_clip.open_clip_config(fields)}
    elif "model_cfg" in fields:
        preprocess = check_fields(fields.get("preprocess_cfg"), file.name)
    config = check_architecture(fields.get("model_cfg", fields), name)
    return _Description(name, config, file.name, preprocess, folder if repo is None else None, repo)


def _find_preprocessor(repo: str) -> Path | None:
    try:
        return fetch_file(repo, (PREPROCESSOR,)).parent
    except ModelError:
        return None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > MAX_JSON:
            raise ValueError("it is larger than 4 MB")
        fields = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"--model {file} cannot be read as an open_clip config JSON: {reason}.") from error
    if not isinstance(fields, dict):
        raise ModelError(f"--model {file} is not an open_clip config: it holds no object.")
    return fields


# ---------------------------------------------------------------------------------------------------------------------
# The weights


def _find_weights(described: _Description, model: str, pretrained: str | None) -> _Weights:
    if pretrained is None:
        if described.folder is None and described.repo is None:
            tags = open_clip.list_pretrained_tags_by_model(described.name)
            known = f" Tags of {described.name}: {', '.join(tags)}." if tags else ""
            raise ModelError(f"{described.name} needs weights: give a tag or a file with --pretrained.{known}")
        pretrained = model if described.repo is not None else f"{LOCAL}{described.folder}"
    if pretrained.startswith(RANDOM):
        try:
            return _Weights(None, "random", seed=int(pretrained.removeprefix(RANDOM)))
        except ValueError as error:
            raise ModelError(f"--pretrained {pretrained[:60]}: expected random:SEED with an integer.") from error
    if pretrained.startswith(HUB):
        file = fetch_file(pretrained.removeprefix(HUB), WEIGHTS)
        return _Weights(file, f"{file.name} of {pretrained}")
    if not pretrained.startswith(LOCAL) and Path(pretrained).is_file():
        return _Weights(Path(pretrained), Path(pretrained).name)
    if tag := open_clip.get_pretrained_cfg(described.name, pretrained):
        _check_tag(described, pretrained, tag)
        return _Weights(_download(described.name, pretrained, tag), f"open_clip's {pretrained}", tag=tag)
    if pretrained.startswith(LOCAL) or Path(pretrained).is_dir():
        return _find_in_folder(Path(pretrained.removeprefix(LOCAL)))
    tags = open_clip.list_pretrained_tags_by_model(described.name)
    known = f" Tags of {described.name}: {', '.join(tags)}." if tags else f" {described.name} has no tags."
    raise ModelError(
        f"--pretrained {pretrained!r} is neither a file nor a tag of {described.name}.{say_near(pretrained, tags)}"
        f"{known} "
        "`random:SEED` gives random weights."
    )


def _find_in_folder(folder: Path) -> _Weights:
    if not folder.is_dir():
        raise ModelError(f"There is no folder {folder}. Give a folder with weights, or a file with --pretrained.")
    for name in WEIGHTS:
        if (folder / name).is_file():
            return _Weights(folder / name, name)
    others = sorted(file for suffix in ("safetensors", "bin", "pth", "pt") for file in folder.glob(f"*.{suffix}"))
    if len(others) != 1:
        found = ", ".join(file.name for file in others[:4]) or "none"
        raise ModelError(f"{folder} should hold one file of weights, found {found}. Name the file with --pretrained.")
    return _Weights(others[0], others[0].name)


def _check_tag(described: _Description, pretrained: str, tag: Mapping[str, Any]) -> None:
    check_quick_gelu(described.name, has_quick_gelu(described.config), pretrained, bool(tag.get("quick_gelu", False)))


def _download(name: str, pretrained: str, tag: Mapping[str, Any]) -> Path:
    try:
        if hub := tag.get("hf_hub"):
            repo, _, file = str(hub).rpartition("/")
            names: Sequence[str] = (file,) if file else WEIGHTS
            stem = file.removesuffix(".bin").removesuffix(".pt") if file else ""
            return fetch_file(repo, (f"{stem}.safetensors", *names) if file.endswith((".bin", ".pt")) else names)
        with limit_waits():
            return Path(open_clip.download_pretrained(tag))
    except ModelError as error:
        raise ModelError(f"The weights of {name} {pretrained} could not be downloaded: {error}") from error
    except Exception as error:  # network libraries raise many kinds of errors
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ModelError(f"The weights of {name} {pretrained} could not be downloaded: {reason}.") from error


def _beside(weights: _Weights, described: _Description) -> _Description | None:
    """What a config beside the weights says, if the architecture was named by something else.

    It speaks for the weights if it has the same towers. Raises ModelError where it contradicts the architecture in what
    the weights cannot show: the activation, and the number of pixels and tokens.
    """
    if weights.file is None or weights.tag or described.repo is not None:
        return None
    folder = weights.file.absolute().parent
    if described.folder is not None and described.folder.absolute() == folder:
        return None
    for name in (OPEN_CLIP, TRANSFORMERS):
        if (folder / name).is_file():
            try:
                other = _describe_file(folder / name, f"{name} beside {weights.file.name}")
            except ModelError:  # it may belong to anything
                continue
            if _towers(other.config) != _towers(described.config):
                continue
            _check_beside(described, other, weights.file)
            return other
    return None


def _towers(config: Mapping[str, Any]) -> tuple[Any, ...]:
    vision, text = VISION | config["vision_cfg"], TEXT | config["text_cfg"]
    sizes = [vision[key] for key in ("layers", "width", "patch_size")]
    return (config["embed_dim"], *sizes, *(text[key] for key in ("layers", "width", "vocab_size")))


def _check_beside(described: _Description, other: _Description, file: Path) -> None:
    for what, read in (("quick_gelu", has_quick_gelu), ("image_size", image_size), ("context_length", context_length)):
        ours, theirs = read(described.config), read(other.config)
        if ours != theirs:
            raise ModelError(
                f"{other.name} says {what} {theirs}, but --model {described.name} has {ours}. Give --model "
                f"{file.parent} to use the weights as they were trained."
            )


# ---------------------------------------------------------------------------------------------------------------------
# The preprocessing


def _choose_preprocess(
    described: _Description, weights: _Weights, beside: _Description | None, recorded: Mapping[str, Any] | None
) -> tuple[Mapping[str, Any], str, tuple[str, ...]]:  # fmt: skip
    """(fields, where they come from, notes)."""
    if recorded is not None:
        return recorded, "the store", ()
    if described.preprocess is not None:
        return described.preprocess, f"preprocessing in {described.origin}", ()
    if weights.tag:
        return read_tag(weights.tag), weights.origin, ()
    if beside is not None and beside.preprocess is not None:
        return beside.preprocess, f"preprocessing in {beside.name}", ()
    if weights.file is None:
        return {}, DEFAULT, ()
    return assume_preprocess(described.name, weights.file.name)


def _pair(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value, value)


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer


def _choose_tokenizer(described: _Description) -> tuple[str | None, str]:
    """(folder or repository of a Hugging Face tokenizer or None, where it comes from)."""
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


def say_near(word: str, words: list[str]) -> str:
    """` Near: a, b.`, the most similar words, or an empty text."""
    near = difflib.get_close_matches(word, words, n=4, cutoff=0.5)
    return f" Near: {', '.join(near)}." if near else ""
