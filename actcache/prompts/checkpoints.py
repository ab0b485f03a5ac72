"""Checkpoints of the original implementations: `model.pth.tar-N` of CoOp, CoCoOp, VPT, IVLP and MaPLe.

In: a file and the CLIP it belongs to. Out: `Prompts`; and back. Promises: nothing in the file is run; every key is
accounted for: a prompt, a frozen weight that equals this CLIP's, or the class words, which are made anew.

A file holds `state_dict` and `epoch`, and mostly its optimizer and scheduler too. CoOp and CoCoOp save the prompts
alone; the others save the whole model: `image_encoder.X` is open_clip's `visual.X`, `text_encoder.X` its `X`.
"""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actcache.artifacts import temporary_path
from actcache.errors import ModelError, SettingsError
from actcache.models import Clip
from actcache.prompts.prompts import TEMPLATE, Prompts, guess_method, is_prompt

CLASS_WORDS = ("token_prefix", "token_suffix")
"""Buffers of the class names that the file was trained on, which original loaders drop too."""

_DICT = "collections.defaultdict"
_STATE = ("torch.optim.", "dassl.", _DICT, "builtins.dict")
_RTOL, _ATOL = 2e-3, 1e-4
"""The originals train in float16, whose rounding is 5e-4."""


class _Inert:
    """Stands for the optimizer and scheduler that a run left in its checkpoint: takes anything, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _empty_dict(*_: Any) -> dict[Any, Any]:
    return {}


def read_prompt_checkpoint(path: str | Path, clip: Clip, *, template: str = TEMPLATE, position: str = "end") -> Prompts:
    """Prompts of an original checkpoint: method, depth and lengths from its keys and shapes.

    Args:
        clip: the CLIP that was adapted; frozen weights in the file must be its own.
        template, position: what the file does not say, see `Prompts`.

    Raises:
        ModelError: not such a file, keys of no method, missing or left over, or of another CLIP; the text names them.
    """
    path = Path(path)
    state = _load(path)
    frozen = _frozen_weights(clip)
    try:
        method = guess_method(state)
        found = {name: value.float() for name, value in state.items() if is_prompt(name) and not _is_class_word(name)}
        prompts = Prompts(method, found, template, position)
        prompts.check_towers(clip)
        rest = {name: value for name, value in state.items() if name not in found and not _is_class_word(name)}
        _check_frozen(rest, frozen, clip.name)
    except ModelError as error:
        raise ModelError(f"{path.name}: {error}") from error
    return prompts


def write_prompt_checkpoint(
    prompts: Prompts, folder: str | Path, clip: Clip, *, epoch: int = 1, half: bool = True
) -> Path:
    """Write prompts as the original code reads them: FOLDER/<its name of the method>/model.pth.tar-EPOCH.

    Args:
        clip: whose frozen weights the methods that save the whole model want beside the prompts.
        half: float16, as the originals train; else float32.

    Raises:
        SettingsError: the file is there already.
    """
    target = Path(folder) / prompts.kind.folder / f"model.pth.tar-{epoch}"
    if target.exists():
        raise SettingsError(f"{target} is there already. Choose another folder or epoch.")
    state = dict(prompts.tensors)
    if prompts.kind.adapts_images:
        state |= _frozen_weights(clip)
    dtype = torch.float16 if half else torch.float32
    state = {name: value.detach().cpu().to(dtype).contiguous() for name, value in state.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(target)
    torch.save({"state_dict": state, "epoch": epoch}, temporary)
    os.replace(temporary, target)
    return target


def _load(path: Path) -> dict[str, Tensor]:
    """The state dict of a file, without running anything in it. Raises ModelError."""
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if foreign := [name for name in unknown if not name.startswith(_STATE)]:
            raise ValueError(f"it holds {', '.join(foreign[:3])}, which could run code")
        with torch.serialization.safe_globals([(_empty_dict if n == _DICT else _Inert, n) for n in unknown]):
            found = torch.load(path, map_location="cpu", weights_only=True)
        state = found["state_dict"]
        if not state or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("state_dict does not hold tensors")
        bad = [n for n, value in state.items() if not value.is_floating_point() or not value.isfinite().all()]
    except (OSError, ValueError, RuntimeError, EOFError, KeyError, TypeError, AttributeError, IndexError,
            pickle.UnpicklingError, zipfile.BadZipFile) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:160].rstrip(".")
        raise ModelError(
            f"{path} is no checkpoint of prompts ({reason}). Expected a torch file with state_dict and epoch."
        ) from error
    if bad:
        raise ModelError(f"{path.name}: {', '.join(bad[:3])} hold no finite numbers. Take another epoch.")
    return dict(state)


def _is_class_word(name: str) -> bool:
    return name.removeprefix("prompt_learner.") in CLASS_WORDS


def _frozen_weights(clip: Clip) -> dict[str, Tensor]:
    """The CLIP's own tensors under the names of the original CustomCLIP; token_embedding is not among them."""
    frozen = {}
    for name, value in clip.module.state_dict().items():
        if name.startswith("visual."):
            frozen[name.replace("visual.", "image_encoder.", 1)] = value
        elif name.startswith(("transformer.", "ln_final.", "positional_embedding", "text_projection")):
            frozen[f"text_encoder.{name}"] = value
        elif name == "logit_scale":
            frozen[name] = value
    return frozen


def _check_frozen(found: dict[str, Tensor], frozen: dict[str, Tensor], model: str) -> None:
    """Raise ModelError unless the file's other weights are this CLIP's; a file may leave all of them out."""
    unknown = sorted(set(found) - set(frozen))
    missing = sorted(set(frozen) - set(found)) if found else []
    other = [name for name in sorted(found) if name in frozen and not _equals(found[name], frozen[name])]
    for names, what in (
        (unknown, f"are neither prompts nor weights of {model}"),
        (missing, "are missing beside the other frozen weights"),
        (other, f"are not {model}'s: the prompts were made for another model"),
    ):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise ModelError(f"{', '.join(names[:4])}{more} {what}. Give the model that was adapted.")


def _equals(value: Tensor, ours: Tensor) -> bool:
    return value.shape == ours.shape and torch.allclose(value.float(), ours.cpu().float(), rtol=_RTOL, atol=_ATOL)
