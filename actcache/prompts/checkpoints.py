"""Checkpoints of the original implementations: `model.pth.tar-N` of CoOp, CoCoOp, VPT, IVLP and MaPLe.

In: a file and the CLIP it belongs to. Out: `Prompts`, and back. Promises: no code in the file is run; every key is
either a prompt, a frozen weight that equals this CLIP's, or one of the class words, which are computed again.

A file holds `state_dict` and `epoch`, and usually its optimizer and scheduler too. CoOp and CoCoOp save only the
prompts;
the others save the whole model: `image_encoder.X` is open_clip's `visual.X`, `text_encoder.X` its `X`.
"""

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actcache.artifacts import write_output
from actcache.errors import ModelError, SettingsError
from actcache.models import Clip
from actcache.prompts.prompts import TEMPLATE, Prompts, guess_method, is_prompt

CLASS_WORDS = ("token_prefix", "token_suffix")
"""Buffers of the class names used in training, which the original loaders drop too."""

_DICT = "collections.defaultdict"
_STATE = ("torch.optim.", "dassl.", _DICT, "builtins.dict")
MAX_NAME = 200
"""Longest name of a tensor; those of the five methods have at most 70 characters."""
_RTOL, _ATOL = 2e-3, 1e-4
"""The original code trains in float16, which rounds by 5e-4."""


class _Inert:
    """Stands in for the optimizer and scheduler in a checkpoint: accepts anything and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _empty_dict(*_: Any) -> dict[Any, Any]:
    return {}


def read_prompt_checkpoint(path: str | Path, clip: Clip, *, template: str = TEMPLATE, position: str = "end") -> Prompts:
    """Read prompts from an original checkpoint. Method, depth and lengths follow from its keys and shapes.

    Args:
        clip: the CLIP that was adapted; frozen weights in the file must equal its weights.
        template, position: the file does not contain these; see `Prompts`.

    Raises:
        ModelError: this is not such a file, or its keys belong to no method or to another CLIP, are missing or are
            superfluous; the message names them.
    """
    path = Path(path)
    state = _load(path)
    frozen = _frozen_weights(clip)
    try:
        method = guess_method(state)
        learned = {name: value.float() for name, value in state.items() if is_prompt(name) and not _is_class_word(name)}
        prompts = Prompts(method, learned, template, position)
        prompts.check_towers(clip)
        rest = {name: value for name, value in state.items() if name not in learned and not _is_class_word(name)}
        _check_frozen(rest, frozen, clip.name)
    except ModelError as error:
        raise ModelError(f"{path.name}: {error}") from error
    return prompts


def write_prompt_checkpoint(
    prompts: Prompts, folder: str | Path, clip: Clip, *, epoch: int = 1, half: bool = True
) -> Path:
    """Write prompts as the original code reads them: FOLDER/<name of the method>/model.pth.tar-EPOCH.

    Args:
        clip: its frozen weights are added for the methods that save the whole model.
        half: write float16, as the original code does; otherwise float32.

    Raises:
        SettingsError: the file exists.
    """
    target = Path(folder) / prompts.kind.folder / f"model.pth.tar-{epoch}"
    if target.exists():
        raise SettingsError(f"{target} already exists. Choose another folder or epoch.")
    state = dict(prompts.tensors)
    if prompts.kind.adapts_images:
        state |= _frozen_weights(clip)
    dtype = torch.float16 if half else torch.float32
    state = {name: value.detach().cpu().to(dtype).contiguous() for name, value in state.items()}
    buffer = io.BytesIO()
    torch.save({"state_dict": state, "epoch": epoch}, buffer)
    return write_output(target, buffer.getvalue())


def _load(path: Path) -> dict[str, Tensor]:
    """The state dict of a file, without running any code in it. Raises ModelError."""
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if foreign := [name for name in unknown if not name.startswith(_STATE)]:
            raise ValueError(f"it contains {', '.join(foreign[:3])}, which could run code")
        with torch.serialization.safe_globals([(_empty_dict if n == _DICT else _Inert, n) for n in unknown]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        state = loaded["state_dict"]
        if not state or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("state_dict does not hold tensors")
        for key in state:
            if not isinstance(key, str) or len(key) > MAX_NAME or not key.isprintable():
                raise ValueError(f"state_dict has the name {str(ascii(key))[:60]}, which no tensor of a model has")
        bad = [n for n, value in state.items() if not value.is_floating_point() or not value.isfinite().all()]
    except Exception as error:  # a damaged pickle makes torch raise a dozen kinds, AssertionError among them
        reason = " ".join(str(error).split())[:160].rstrip(".")
        raise ModelError(
            f"{path} is not a prompt checkpoint ({reason}). Expected a torch file with state_dict and epoch."
        ) from error
    if bad:
        raise ModelError(f"{path.name}: {', '.join(bad[:3])} contain NaN or infinity. Use another epoch.")
    return dict(state)


def _is_class_word(name: str) -> bool:
    return name.removeprefix("prompt_learner.") in CLASS_WORDS


def _frozen_weights(clip: Clip) -> dict[str, Tensor]:
    """The CLIP's tensors under the names of the original CustomCLIP, which has no token_embedding."""
    frozen = {}
    for name, value in clip.module.state_dict().items():
        if name.startswith("visual."):
            frozen[name.replace("visual.", "image_encoder.", 1)] = value
        elif name.startswith(("transformer.", "ln_final.", "positional_embedding", "text_projection")):
            frozen[f"text_encoder.{name}"] = value
        elif name == "logit_scale":
            frozen[name] = value
    return frozen


def _check_frozen(others: dict[str, Tensor], frozen: dict[str, Tensor], model: str) -> None:
    """Raise ModelError unless the other weights of the file are this CLIP's. A file may omit all of them."""
    unknown = sorted(set(others) - set(frozen))
    missing = sorted(set(frozen) - set(others)) if others else []
    different = [name for name in sorted(others) if name in frozen and not _equals(others[name], frozen[name])]
    for names, what in (
        (unknown, f"are neither prompts nor weights of {model}"),
        (missing, "are missing beside the other frozen weights"),
        (different, f"are not {model}'s: the prompts were made for another model"),
    ):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise ModelError(f"{', '.join(names[:4])}{more} {what}. Give the model that was adapted.")


def _equals(value: Tensor, ours: Tensor) -> bool:
    return value.shape == ours.shape and torch.allclose(value.float(), ours.cpu().float(), rtol=_RTOL, atol=_ATOL)
