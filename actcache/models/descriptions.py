"""What a name of a model describes: an architecture, and what its folder or its config says beside it.

In: what a user gives as the model. Out: `Description`. resolver.py puts it together with the weights.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import open_clip

from actcache.errors import ModelError
from actcache.hub import fetch_file
from actcache.models import transformers_clip, transformers_vision
from actcache.models.architecture import check_architecture, image_size
from actcache.models.preprocessing import CONFIG, MAX_JSON, check_fields, read_timm
from actcache.models.timm_names import PREFIX as TIMM
from actcache.models.timm_names import TimmName, find_name, read_config
from actcache.models.weight_files import HUB, LOCAL

TRANSFORMERS, PREPROCESSOR = "config.json", "preprocessor_config.json"
"""timm and transformers call their configs alike."""


@dataclass(frozen=True)
class Description:
    """An architecture with what was said beside it: `config` of open_clip, or `timm`."""

    name: str
    config: Mapping[str, Any]
    origin: str
    preprocess: Mapping[str, Any] | None = None
    folder: Path | None = None
    repo: str | None = None
    timm: TimmName | None = None

    @property
    def image_size(self) -> tuple[int, int]:
        return image_size(self.config) if self.timm is None else self.timm.image_size

    def resize(self, size: tuple[int, int]) -> "Description":
        """The same model for images of another size."""
        if self.timm is not None:
            return replace(self, timm=replace(self.timm, arguments={**self.timm.arguments, "img_size": size}))
        vision = {**self.config["vision_cfg"], "image_size": size[0] if size[0] == size[1] else list(size)}
        return replace(self, config=check_architecture({**self.config, "vision_cfg": vision}, self.name))


def describe(model: str) -> Description:
    own = model.removeprefix(TIMM)
    files = (CONFIG, TRANSFORMERS) if own == model else (TRANSFORMERS,)
    if own.startswith(HUB):
        repo = own.removeprefix(HUB)
        return describe_file(fetch_file(repo, files), model, repo=repo)
    if own.startswith(LOCAL) or (own == model and Path(own).is_dir()):
        folder = Path(own.removeprefix(LOCAL))
        if not folder.is_dir():
            raise ModelError(f"--model {model}: there is no folder {folder}. Give the folder of {files[0]}.")
        file = next((folder / name for name in files if (folder / name).is_file()), None)
        if file is None:
            what = f"neither {CONFIG} nor {TRANSFORMERS} of" if own == model else f"no {TRANSFORMERS} of timm or of"
            raise ModelError(f"--model {model}: the folder has {what} a model that is known. Name its folder.")
        return describe_file(file, folder.name or str(folder), folder=folder)
    if own.endswith(".json"):
        return describe_file(Path(own), Path(own).name)
    if own != model:
        found = find_name(own)
        fields = read_timm(found.cfg) if found.tag else None
        return Description(own, {}, f"timm's {own}", fields, timm=found)
    config = open_clip.get_model_config(model)
    if config is None:
        other = " timm has a model of this name: write timm: before it." if _is_timm(model) else ""
        raise ModelError(
            f"Unknown architecture {model!r}.{say_near(model, open_clip.list_models())}{other} "
            "Give an open_clip name, timm:NAME, the path of a config JSON or its folder."
        )
    return Description(model, check_architecture(config, model), f"open_clip's {model}")


def _is_timm(model: str) -> bool:
    try:
        return bool(find_name(model).architecture)
    except ModelError:
        return False


def describe_file(file: Path, name: str, *, folder: Path | None = None, repo: str | None = None) -> Description:
    fields = _read_json(file)
    preprocess, own = None, folder if repo is None else None
    if "model_cfg" not in fields and "architecture" in fields:
        found = read_config(fields, file.name)
        return Description(name, {}, file.name, read_timm(found.cfg), own, repo, found)
    kind = transformers_vision.read_kind(fields)
    if kind is not None or transformers_clip.is_transformers_clip(fields):
        place = file.parent if repo is None else _find_preprocessor(repo)
        if place is not None and (place / PREPROCESSOR).is_file():
            steps = _read_json(place / PREPROCESSOR)
            spelled = transformers_clip if kind in (None, "siglip") else transformers_vision
            preprocess = spelled.preprocess_fields(steps)
        if kind is not None and kind != "siglip":
            architecture, arguments = transformers_vision.timm_model(fields)
            size = (preprocess or {}).get("size") or _sides(fields.get("image_size", 224))
            found = find_name(architecture, arguments=arguments | {"img_size": _sides(size)})
            return Description(name, {}, file.name, preprocess, own, repo, found)
        convert = transformers_clip.open_clip_config if kind is None else transformers_vision.siglip_config
        fields = {"model_cfg": convert(fields)}
    elif isinstance(fields.get("model_type"), str):
        known = ", ".join(("clip", "siglip", *transformers_vision.DEFAULTS))
        raise ModelError(
            f"--model {name}: {file.name} describes a {ascii(fields['model_type'])[:60]} of transformers. Known are "
            f"{known}."
        )
    elif "model_cfg" in fields:
        preprocess = check_fields(fields.get("preprocess_cfg"), file.name)
    config = check_architecture(fields.get("model_cfg", fields), name)
    return Description(name, config, file.name, preprocess, own, repo)


def _find_preprocessor(repo: str) -> Path | None:
    try:
        return fetch_file(repo, (PREPROCESSOR,)).parent
    except ModelError:
        return None


def _read_json(file: Path) -> dict[str, object]:
    try:
        if file.stat().st_size > MAX_JSON:
            raise ValueError("it is larger than 4 MB")
        fields = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"--model {file} cannot be read as a config JSON of a model: {reason}.") from error
    if not isinstance(fields, dict):
        raise ModelError(f"--model {file} is not an open_clip config: it holds no object.")
    return fields


def _sides(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value, value)


def say_near(word: str, words: list[str]) -> str:
    """` Near: a, b.`, the most similar words, or an empty text."""
    near = difflib.get_close_matches(word, words, n=4, cutoff=0.5)
    return f" Near: {', '.join(near)}." if near else ""
