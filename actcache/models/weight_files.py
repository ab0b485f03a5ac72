"""Where the file of weights lies that a user named: a tag, a file, a folder, a repository of the hub.

In: the value of --pretrained. Out: `WeightFile`. The file is found, or downloaded, and not read.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip

from actcache.errors import ModelError
from actcache.hub import fetch_file, limit_waits
from actcache.models.timm_names import PREFIX as TIMM
from actcache.models.timm_names import TimmName, find_tag, list_tags

LOCAL, HUB, RANDOM = "local-dir:", "hf-hub:", "random:"
WEIGHTS = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth", "model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth",
)  # fmt: skip
"""Names of weights in a folder, in the order in which open_clip prefers them."""
TIMM_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
"""The same for timm: a repository of both libraries holds the whole CLIP under open_clip's names."""


@dataclass(frozen=True)
class WeightFile:
    """Attributes:
    file: None for random weights.
    origin: what it is, in messages.
    seed: of random weights.
    tag: what the library says about the tag, if the weights were named by one.
    """

    file: Path | None
    origin: str
    seed: int | None = None
    tag: Mapping[str, Any] = field(default_factory=dict)


def find_weights(name: str, pretrained: str, timm_name: TimmName | None) -> WeightFile:
    """Find the file. Raises ModelError when there is none, or it cannot be downloaded.

    Args:
        name: of the architecture.
        pretrained: `random:SEED`, a repository, a file, a tag or a folder.
    """
    names = WEIGHTS if timm_name is None else TIMM_WEIGHTS
    if pretrained.startswith(RANDOM):
        try:
            return WeightFile(None, "random", seed=int(pretrained.removeprefix(RANDOM)))
        except ValueError as error:
            raise ModelError(f"--pretrained {pretrained[:60]}: expected random:SEED with an integer.") from error
    if pretrained.startswith(HUB):
        file = fetch_file(pretrained.removeprefix(HUB), names)
        return WeightFile(file, f"{file.name} of {pretrained}")
    if not pretrained.startswith(LOCAL) and Path(pretrained).is_file():
        return WeightFile(Path(pretrained), Path(pretrained).name)
    if timm_name is not None and pretrained in list_tags(timm_name.architecture):
        return _find_timm_tag(timm_name.architecture, pretrained)
    if timm_name is None and (tag := open_clip.get_pretrained_cfg(name, pretrained)):
        return WeightFile(_download(name, pretrained, tag), f"open_clip's {pretrained}", tag=tag)
    if pretrained.startswith(LOCAL) or Path(pretrained).is_dir():
        return _find_in_folder(Path(pretrained.removeprefix(LOCAL)), names)
    raise ModelError(
        f"--pretrained {pretrained!r} is neither a file nor a tag of {name}.{say_tags(name, timm_name, pretrained)} "
        "`random:SEED` gives random weights."
    )


def find_repository(model: str | None, pretrained: str | None) -> str | None:
    """OWNER/NAME of the hub's repository that holds the weights of a named model, from the libraries' own tables.

    None where these do not say it, such as for files and random weights. Nothing is downloaded.
    """
    place = next((name.partition(HUB)[2] for name in (pretrained, model) if name and HUB in name), "")
    if not place and model and model.startswith(TIMM):
        architecture, _, tag = model.removeprefix(TIMM).partition(".")
        try:
            place = str(find_tag(architecture, tag if pretrained in (None, model) else pretrained).get("hf_hub_id"))
        except (ModelError, RuntimeError, ValueError):  # an architecture or tag that this version of timm lacks
            return None
    elif not place and model and pretrained:
        place = str((open_clip.get_pretrained_cfg(model, pretrained) or {}).get("hf_hub", ""))
    match = re.match(r"[\w.-]+/[\w.-]+", place, re.ASCII)
    return match[0] if match else None


def say_tags(name: str, timm_name: TimmName | None, near: str = "") -> str:
    """` Tags of ViT-B-32: openai, ...`, with the most similar ones first."""
    tags = open_clip.list_pretrained_tags_by_model(name) if timm_name is None else list_tags(timm_name.architecture)
    similar = difflib.get_close_matches(near, tags, n=4, cutoff=0.5) if near else []
    known = f" Tags of {name}: {', '.join(tags)}." if tags else f" {name} has no tags." if near else ""
    return (f" Near: {', '.join(similar)}." if similar else "") + known


def _find_in_folder(folder: Path, names: Sequence[str]) -> WeightFile:
    if not folder.is_dir():
        raise ModelError(f"There is no folder {folder}. Give a folder with weights, or a file with --pretrained.")
    for name in names:
        if (folder / name).is_file():
            return WeightFile(folder / name, name)
    others = sorted(file for suffix in ("safetensors", "bin", "pth", "pt") for file in folder.glob(f"*.{suffix}"))
    if len(others) != 1:
        found = ", ".join(file.name for file in others[:4]) or "none"
        raise ModelError(f"{folder} should hold one file of weights, found {found}. Name the file with --pretrained.")
    return WeightFile(others[0], others[0].name)


def _find_timm_tag(architecture: str, tag: str) -> WeightFile:
    cfg = find_tag(architecture, tag)
    repo, file = cfg.get("hf_hub_id"), cfg.get("hf_hub_filename")
    if not repo:
        raise ModelError(
            f"The weights of timm's {architecture}.{tag} are not on the Hugging Face hub but at "
            f"{cfg.get('url', 'no known place')}. Download them, and name the file with --pretrained."
        )
    try:
        return WeightFile(fetch_file(str(repo), (file,) if file else TIMM_WEIGHTS), f"timm's {tag}", tag=cfg)
    except ModelError as error:
        raise ModelError(f"The weights of {architecture}.{tag} could not be downloaded: {error}") from error


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


def find_tag_of(repo: str) -> tuple[str, str] | None:
    """open_clip's (architecture, tag) of the weights in a repository of the hub, OWNER/NAME; None if it lists none."""
    for name, tag in open_clip.list_pretrained():
        cfg = open_clip.get_pretrained_cfg(name, tag)
        is_it = "/".join(str(cfg.get("hf_hub", "")).split("/")[:2]) == repo
        if is_it and name.endswith("-quickgelu") == bool(cfg.get("quick_gelu", False)):
            return str(name), str(tag)
    return None
