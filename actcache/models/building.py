"""Building the module that a description means, first without memory and then with it.

In: open_clip's model config, or the name of a timm model with its arguments. Out: the module with random weights, and
for timm's classes what they were constructed with and how they read foreign checkpoints.

timm passes every construction through one function, `build_model_with_cfg`. It is watched here, because two things are
known nowhere else: the arguments behind a name (the kind of GELU, the temperature of a rotary embedding, the pooling
change values without a trace in the tensors, so they belong to a model's identity), and the filter that turns other
projects' files into the class's tensors.
"""

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any

import open_clip
import timm
import torch
from timm.models import PretrainedCfg

from actcache.errors import ModelError
from actcache.models.architecture import OUR_ARGUMENTS, check_memory, image_size
from actcache.models.timm_names import TimmName

Filter = Callable[..., Any]

_SWITCHES = ("TIMM_USE_NAFLEX", "TIMM_USE_NAFLEXVIT")
"""Environment variables with which timm builds another class under the same name."""
_CFG_FIELDS = {each.name for each in fields(PretrainedCfg)}
_WITHOUT_EFFECT = ("device", "dtype", "weight_init", "cache_dir")
_BUILDING = threading.Lock()
"""Held while timm's function is watched, which belongs to the whole process."""


@dataclass
class Trunk:
    """What a timm model was constructed with.

    Attributes:
        kind: name of the class.
        arguments: those of its constructor, as JSON holds them; what changes no value of a model in use is left out.
        filter: turns the tensors of a checkpoint into those of the class; takes (tensors, module).
    """

    kind: str = ""
    arguments: dict[str, object] = field(default_factory=dict)
    filter: Filter | None = None


def build_timm(
    name: TimmName, *, seed: int | None, n_classes: int | None = None, meta: bool = False
) -> tuple[Any, "Trunk"]:
    """(timm's model, what it was constructed with). Raises ModelError for arguments that the class does not take.

    Args:
        n_classes: of the classifier; by default that of the tag.
        meta: without memory, so without values.
    """
    arguments = dict(name.arguments) | ({} if n_classes is None else {"num_classes": n_classes})
    arguments["pretrained_cfg"] = {key: value for key, value in name.cfg.items() if key in _CFG_FIELDS}
    with watch_timm(name.architecture) as trunk:
        make = partial(timm.create_model, name.architecture, **arguments)
        return _construct(make, name.architecture, "timm", seed, meta), trunk


def build_open_clip(
    config: Mapping[str, Any], name: str, *, seed: int | None, meta: bool = False
) -> tuple[Any, "Trunk | None"]:
    """(open_clip's model, what its timm trunk was constructed with or None). Raises ModelError as `build_timm`."""
    parts = json.loads(json.dumps(config))
    custom = parts.pop("custom_text", False)
    arguments = parts["vision_cfg"].pop(OUR_ARGUMENTS, {})
    if "hf_model_name" in parts["text_cfg"]:
        parts["text_cfg"]["hf_model_pretrained"] = False
        custom = True
    kind: Any = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    if "multimodal_cfg" in parts:
        kind = open_clip.CoCa
    architecture = parts["vision_cfg"].get("timm_model_name")
    if architecture is None:
        return _construct(lambda: kind(**parts), name, "open_clip", seed, meta), None

    def make() -> Any:
        model = kind(**parts)
        size = image_size(config)
        declared = getattr(getattr(model.visual.trunk, "patch_embed", None), "img_size", None)
        if declared is not None and tuple(declared) != size:
            model.visual.set_input_size(size)
        return model

    with watch_timm(architecture, arguments) as trunk:
        return _construct(make, name, "open_clip", seed, meta), trunk


def _construct(make: Callable[[], Any], name: str, library: str, seed: int | None, meta: bool) -> Any:
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta") if meta else contextlib.nullcontext():
            torch.manual_seed(0 if seed is None else seed)
            return make()
    except Exception as error:  # neither library checks much, so anything may come out of their modules
        reason = " ".join(str(error).split())[:200].rstrip(".")
        article = "an open_clip" if library == "open_clip" else "a timm"
        raise ModelError(f"{name} does not describe {article} model: {reason}.") from error


def check_built(module: Any, name: str) -> None:
    """Raise ModelError if a module, built without memory, is larger than this machine's, or has no patches."""
    tower = getattr(module, "visual", module)
    patches: Any = getattr(getattr(tower, "trunk", tower), "patch_embed", None)
    if 0 in (getattr(patches, "grid_size", None) or ()):
        size = " x ".join(str(side) for side in patches.img_size)
        raise ModelError(f"--model {name}: images of {size} are smaller than a patch. Give a larger --image-size.")
    check_memory(name, 4 * sum(value.numel() for value in module.parameters()))


@contextlib.contextmanager
def watch_timm(architecture: str, extra: Mapping[str, Any] | None = None) -> Iterator[Trunk]:
    """Learn what timm constructs inside, and let the environment not change it.

    Args:
        extra: arguments that are added to the constructor's.
    """
    trunk = Trunk()
    home: Any = sys.modules[timm.models.model_entrypoint(architecture).__module__]
    with _BUILDING:
        build, naflex = home.build_model_with_cfg, getattr(home, "_USE_NAFLEX_DEFAULT", None)
        kept = {name: os.environ.pop(name) for name in _SWITCHES if name in os.environ}

        def record(kind: Any, variant: str, pretrained: bool, *rest: Any, **arguments: Any) -> Any:
            model = build(kind, variant, pretrained, *rest, **arguments | dict(extra or {}))
            trunk.kind, trunk.filter = type(model).__name__, arguments.get("pretrained_filter_fn")
            trunk.arguments = _constructed(arguments | dict(extra or {}), model.pretrained_cfg)
            return model

        home.build_model_with_cfg = record
        if naflex is not None:
            home._USE_NAFLEX_DEFAULT = False
        try:
            yield trunk
        finally:
            home.build_model_with_cfg = build
            if naflex is not None:
                home._USE_NAFLEX_DEFAULT = naflex
            os.environ.update(kept)


def _constructed(arguments: Mapping[str, Any], cfg: Mapping[str, Any]) -> dict[str, object]:
    """The constructor's arguments: those that were passed, and those that timm takes from `pretrained_cfg`."""
    known: dict[str, object] = {"num_classes": cfg.get("num_classes")}
    if cfg.get("fixed_input_size"):
        known["img_size"] = tuple(cfg["input_size"][-2:])
    known |= arguments
    return {
        name: describe(value)
        for name, value in sorted(known.items())
        if value is not None and not (name.startswith(("pretrained", "feature")) or "drop" in name)
        if name not in _WITHOUT_EFFECT
    }  # fmt: skip


def describe(value: Any) -> Any:
    """A constructor's argument as JSON holds it: classes and functions by name, whole numbers without a fraction."""
    if isinstance(value, bool | str | None):
        return value
    if isinstance(value, int | float):
        return int(value) if value == int(value) else float(value)
    if isinstance(value, partial):
        return {"call": describe(value.func), **{name: describe(entry) for name, entry in value.keywords.items()}}
    if is_dataclass(value) and not isinstance(value, type):
        return describe(asdict(value))
    if isinstance(value, Mapping):
        return {str(name): describe(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [describe(entry) for entry in value]
    return getattr(value, "__name__", type(value).__name__)
