"""Which preprocessing belongs to weights: what a tag, a config or the habit of an architecture says.

open_clip keeps it with its tags and in open_clip_config.json. A file of weights alone says nothing, and open_clip then
takes OpenAI's, which is wrong for 51 of its 144 architectures.
"""

from collections.abc import Mapping
from typing import Any

import open_clip

from actcache.errors import CorruptError, ModelError
from actcache.preprocess import Preprocess

CONFIG = "open_clip_config.json"
DEFAULT = "open_clip's default"


def assume_preprocess(name: str, file: str) -> tuple[Mapping[str, Any], str, tuple[str, ...]]:
    """What the published weights of an architecture share, since a file of weights says nothing about it."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    kinds = [fill_fields(read_tag(open_clip.get_pretrained_cfg(name, tag))) for tag in tags]
    default = fill_fields({})
    if not kinds or kinds == [default] * len(kinds):
        return {}, DEFAULT, ()
    agree = kinds == [kinds[0]] * len(kinds)
    fields = kinds[0] if agree else default
    if agree:
        origin, why = f"what all tags of {name} share", f"as all published weights of {name} were trained"
    else:
        origin, why = DEFAULT, f"open_clip's default, although the published weights of {name} differ in it"
    shown = ", ".join(f"{key} {_brief(fields[key])}" for key in ("mean", "std", "interpolation", "resize_mode"))
    note = (
        f"{file} does not say how its images were prepared. Assumed: {shown}, {why}. To give another preprocessing, "
        f'write {{"model_cfg": ..., "preprocess_cfg": ...}} into an {CONFIG} and name it with --model.'
    )
    return fields, origin, (note,)


def read_tag(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A tag's preprocessing. Its size is that of the architecture, as open_clip takes it."""
    known: dict[str, Any] = open_clip.transform.merge_preprocess_dict({}, fields)
    return {key: value for key, value in known.items() if key != "size"}


def fill_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    filled = open_clip.transform.merge_preprocess_dict(open_clip.transform.PreprocessCfg(), fields)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in filled.items() if key != "size"}


def check_fields(fields: object, file: str) -> dict[str, Any] | None:
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
    try:
        made = Preprocess.from_json({**fill_fields(fields), "size": fields["size"]})
        made.check()
    except CorruptError as error:
        raise ModelError(f"The preprocessing from {origin} cannot be used: {error}") from error
    return made


def _brief(value: object) -> str:
    return "/".join(f"{number:.3g}" for number in value) if isinstance(value, list) else str(value)
