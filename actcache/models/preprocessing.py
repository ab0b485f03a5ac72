"""Which preprocessing belongs to weights: what a tag, a config or the habit of an architecture says.

open_clip keeps it with its tags and in open_clip_config.json, timm with its tags and in config.json. A file of weights
alone says nothing: open_clip then takes OpenAI's, which is wrong for 51 of its 144 architectures, and timm that of the
name's default tag, from which other tags differ for 28 of 306 names. Where all tags of a name agree, a file is assumed
to agree with them, and the user is told; where they differ it has to be given, since nothing tells which one is right.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import open_clip
import timm
from torch import Tensor

from actcache.errors import CorruptError, ModelError
from actcache.models.timm_names import PREFIX, TimmName, find_name, find_tag, list_tags
from actcache.preprocess import Preprocess

CONFIG = "open_clip_config.json"
DEFAULT = "open_clip's default"
MAX_JSON = 1 << 22


def assume_preprocess(
    name: str, file: str, timm_name: TimmName | None
) -> tuple[Mapping[str, Any], str, tuple[str, ...]]:
    """What the published weights of an architecture share, since a file of weights says nothing about it.

    Raises ModelError where they differ, because nothing then tells which of them the file belongs to.
    """
    default = fill_fields({}) if timm_name is None else read_timm(timm_name.cfg)
    kinds = list(_list_kinds(name, timm_name).values())
    origin = DEFAULT if timm_name is None else f"timm's default for {name}"
    if kinds and kinds != [kinds[0]] * len(kinds):
        example = name if timm_name is None else f"{PREFIX}{name}"
        raise ModelError(
            f"{file} does not say how its images were prepared, and the published weights of {name} differ in it. "
            f"Give it with --preprocess: a tag whose preprocessing fits ({example}.{_an_example(name, timm_name)}), "
            "`default`, or a JSON file."
        )
    if timm_name is None and (not kinds or kinds[0] == default):
        return {}, origin, ()
    fields = kinds[0] if kinds else default
    if kinds:
        origin, why = f"what all tags of {name} share", f"as all published weights of {name} were trained"
    else:
        why = origin
    shown = ", ".join(f"{key} {_brief(fields[key])}" for key in _SHOWN if key in fields)
    note = (
        f"{file} does not say how its images were prepared. Assumed: {shown}, {why}. To give another preprocessing, "
        f"use --preprocess, or write preprocess_cfg into an {CONFIG} and name it with --model."
    )
    return fields, origin, (note,)


_SHOWN = ("mean", "std", "interpolation", "resize_mode", "crop_mode", "crop_pct")


def _list_kinds(name: str, timm_name: TimmName | None) -> dict[str, Mapping[str, Any]]:
    """The preprocessing of every tag."""
    if timm_name is None:
        tags = open_clip.list_pretrained_tags_by_model(name)
        return {tag: fill_fields(read_tag(open_clip.get_pretrained_cfg(name, tag))) for tag in tags}
    return {tag: read_timm(find_tag(timm_name.architecture, tag)) for tag in list_tags(timm_name.architecture)}


def _an_example(name: str, timm_name: TimmName | None) -> str:
    return next(iter(_list_kinds(name, timm_name)))


def find_preprocess(given: str, name: str, timm_name: TimmName | None) -> tuple[Mapping[str, Any], str]:
    """(fields, where they come from) of a value of --preprocess.

    Args:
        given: `default`, a JSON file, a name of open_clip, or of timm with `timm:` before it; both may have a tag
            behind a dot.

    Raises:
        ModelError: it is none of these, or a name without a tag whose tags differ.
    """
    if given == "default":
        if timm_name is None:
            return {}, DEFAULT
        return read_timm(timm_name.cfg), f"timm's default for {name}"
    if given.endswith(".json") or Path(given).is_file():
        return _read_file(Path(given)), f"preprocessing in {Path(given).name}"
    other, _, tag = given.removeprefix(PREFIX).partition(".")
    is_timm = given.startswith(PREFIX) or other not in open_clip.list_models()
    if is_timm and not timm.is_model(other):
        raise ModelError(
            f"--preprocess {given[:80]} is no JSON file and no name of open_clip or timm. Give one of these, or "
            "`default`."
        )
    found = find_name(other) if is_timm else None
    kinds = _list_kinds(other, found)
    if tag and tag not in kinds:
        raise ModelError(f"--preprocess {given[:80]}: {other} has no tag {tag[:60]}. Its tags: {', '.join(kinds)}.")
    if tag:
        return kinds[tag], f"--preprocess {given}"
    several = list(kinds.values())
    if several != several[:1] * len(several):
        raise ModelError(
            f"--preprocess {given[:80]}: its tags differ. Name one of them, such as {given}.{next(iter(kinds))}."
        )
    return several[0] if several else read_timm(found.cfg) if found else {}, f"--preprocess {given}"


def _read_file(file: Path) -> Mapping[str, Any]:
    try:
        fields = json.loads(file.read_bytes()) if file.stat().st_size < MAX_JSON else None
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ModelError(f"--preprocess {file} cannot be read as JSON: {reason}. Copy the file again.") from error
    outer: dict[str, object] = fields if isinstance(fields, dict) else {}
    inner: Any = outer.get("preprocess_cfg", outer.get("pretrained_cfg", fields))
    if not isinstance(inner, dict):
        raise ModelError(f"--preprocess {file} holds no object. Expected mean, std, interpolation and so on.")
    if "pretrained_cfg" in outer and "preprocess_cfg" not in outer:
        return read_timm(inner)
    if not inner.get("crop_pct", 1):  # timm would take its default
        raise ModelError(f"--preprocess {file} has crop_pct {ascii(inner['crop_pct'])[:40]}. Expected 0.1 to 1.")
    if "crop_pct" in inner or "crop_mode" in inner or inner.get("library") == "timm":
        if unknown := set(inner) - {"library", *_TIMM, "size", "input_size"}:
            raise ModelError(f"--preprocess {file} has {ascii(min(unknown))[:60]}. Expected {', '.join(_TIMM)}.")
        return read_timm(inner)
    return check_fields({key: value for key, value in inner.items() if key != "library"}, file.name) or {}


_TIMM = ("mean", "std", "interpolation", "crop_pct", "crop_mode")


def read_timm(cfg: Mapping[str, Any]) -> dict[str, object]:
    """timm's own resolution of a `pretrained_cfg`; what it leaves out has timm's default. Its size is the model's."""
    known = timm.data.resolve_data_config(pretrained_cfg={"mean": None, **cfg})
    fields = {key: known[key] for key in _TIMM}
    return {"library": "timm"} | {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


def read_tag(fields: Mapping[str, Any]) -> dict[str, object]:
    """A tag's preprocessing. Its size is that of the architecture, as open_clip takes it."""
    known: dict[str, object] = open_clip.transform.merge_preprocess_dict({}, fields)
    return {key: value for key, value in known.items() if key != "size"}


def fill_fields(fields: Mapping[str, Any]) -> dict[str, object]:
    filled = open_clip.transform.merge_preprocess_dict(open_clip.transform.PreprocessCfg(), fields)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in filled.items() if key != "size"}


def check_fields(fields: object, file: str) -> dict[str, object] | None:
    """The `preprocess_cfg` of a config; None if there is none. An unknown field would be left out of the transform."""
    if fields is None:
        return None
    known = set(fill_fields({})) | {"size"}
    if not isinstance(fields, dict) or not set(fields) <= known:
        unknown = (
            ascii(next((key for key in fields if key not in known), "")) if isinstance(fields, dict) else "no object"
        )
        raise ModelError(f"preprocess_cfg in {file} has {unknown[:60]}. Expected {', '.join(sorted(known))}.")
    return {key: value for key, value in fields.items() if value is not None}


def make_preprocess(fields: Mapping[str, Any], origin: str) -> Preprocess:
    known = fields if fields.get("library") == "timm" else {**fill_fields(fields), "size": fields["size"]}
    try:
        made = Preprocess.from_json(known)
        made.check()
    except CorruptError as error:
        raise ModelError(f"The preprocessing from {origin} cannot be used: {error}") from error
    return made


def make_transform(preprocess: Preprocess) -> Callable[[Any], Tensor]:
    """PIL image -> float32 tensor [3, H, W], by the library whose preprocessing it is."""
    fields: dict[str, Any] = preprocess.to_json()
    made: Callable[[Any], Tensor]
    if preprocess.library == "timm":
        del fields["library"]
        made = timm.data.create_transform(input_size=(3, *fields.pop("size")), is_training=False, **fields)
    else:
        made = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**fields), False)
    return made


def _brief(value: object) -> str:
    return "/".join(f"{number:.3g}" for number in value) if isinstance(value, list) else str(value)
