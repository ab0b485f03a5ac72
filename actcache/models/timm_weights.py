"""Fitting the tensors of a file to a model of timm, and loading them strictly.

timm's own loading is not used: as soon as the number of classes differs from the config's it leaves out what does not
fit, and a file of another model then changes nothing without an error. Here the class's filter is applied (it knows the
files of DINOv2, DINOv3, MAE, BEiT, DeiT, OpenAI, and resizes positions), what is left out is known and reported, and
everything else has to match.
"""

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actcache.errors import ModelError
from actcache.models.building import Trunk, build_timm, check_built
from actcache.models.checkpoint import Weights, check_tensors, read_weights
from actcache.models.timm_names import TimmName
from actcache.models.transformers_tensors import FOREIGN

Tensors = dict[str, Tensor]

PERIODS = "rope_embed.periods"
"""DINOv3's rotary periods. Published files hold them rounded to bfloat16, as they were trained; timm computes them in
float32, from which the embeddings differ by 3e-4."""
_PRETRAINING = re.compile(r"(decoder|dino_head|ibot_head|pooler|projectors|lm_head)[._]|local_cls_norm\.")
"""Modules that served the training only."""
_SILENT = re.compile(r"mask_token$|relative_position_index$|\.bias_mask$|rope_embed\.|k_bias$|position_ids$")
"""What a filter leaves out and a model computes by itself, or uses in training only: of no interest to anybody."""


def load_timm(name: TimmName, file: Path, shown: str) -> tuple[Any, Trunk, dict[str, Tensor], list[str]]:
    """(module, trunk, buffers that the file replaced, notes).

    Args:
        shown: the model's name in messages.

    Raises:
        ModelError: the file is damaged, is of another architecture, or is larger than this machine's memory.
    """
    empty, trunk = build_timm(name, seed=None, meta=True)
    check_built(empty, shown)
    weights = read_weights(file)
    check_activation(weights, trunk, file.name, shown)
    tensors, notes = fit_tensors(weights, empty, trunk, file.name, shown)
    periods = weights.tensors.get(PERIODS)
    classes = [len(tensors[key]) for layer in name.classifiers if (key := f"{layer}.weight") in tensors]
    module, trunk = build_timm(name, seed=0, n_classes=classes[0] if classes else 0)
    check_tensors(tensors, module.state_dict(), file.name, shown)
    module.load_state_dict(tensors, strict=True)
    return module, trunk, _copy_periods(module, periods), notes


def check_activation(weights: Weights, trunk: Trunk, file: str, shown: str) -> None:
    """Raise ModelError where an archive says that it has QuickGELU and the architecture has another, or the reverse."""
    ours = trunk.arguments.get("act_layer") == "quick_gelu"
    if weights.quick_gelu is not None and weights.quick_gelu != ours:
        raise ModelError(
            f"{file} was trained {'with' if weights.quick_gelu else 'without'} QuickGELU and {shown} is "
            f"{'with' if ours else 'without'} it. Choose the timm name {'with' if weights.quick_gelu else 'without'} "
            "_quickgelu."
        )


def fit_tensors(weights: Weights, module: Any, trunk: Trunk, file: str, shown: str) -> tuple[Tensors, list[str]]:
    """(tensors under the class's names and in its sizes, notes). The module may have no memory.

    Raises ModelError where the filter would leave out what matters, or cannot be applied.
    """
    raw, notes = dict(weights.tensors), list(weights.notes)
    for name in [name for name in raw if re.fullmatch(r"blocks\.\d+\.\d+\..+", name)]:
        raw[re.sub(r"^blocks\.\d+\.", "blocks.", name)] = raw.pop(name)  # chunks of blocks, as FSDP wraps them
    unused = [name for name in raw if _PRETRAINING.match(name)]
    if any(name.startswith("decoder") for name in unused):
        unused += [name for name in raw if name == "mask_token"]  # by which the filter would take it for DINOv2's
    left = {name: raw.pop(name) for name in unused}
    _check_biases(raw, module, file, shown)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timm indexes by a list, of which torch warns
            fitted: Tensors = dict(trunk.filter(dict(raw), module)) if trunk.filter is not None else dict(raw)
    except Exception as error:  # filters look at names only, so anything may come out of a foreign file
        reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        raise ModelError(
            f"{file} cannot be loaded into {shown}: its tensors are not those of this architecture ({reason}). "
            "Expected a complete file of exactly this architecture."
        ) from error
    width, head = getattr(module, "num_features", None), fitted.get("head.weight")
    if weights.kind.startswith(FOREIGN) and head is not None and head.shape[1:] != (width,):  # CLS and mean patch
        left |= {name: fitted.pop(name) for name in ("head.weight", "head.bias") if name in fitted}
    if "mask_token" not in module.state_dict():
        fitted.pop("mask_token", None)  # of a masked pretraining; some filters leave it
    left |= {name: raw[name] for name in _lost(raw, fitted)}
    notes += _describe_changes(raw, fitted, module, file, shown, weights.kind)
    if shown_names := sorted(name for name in left if not _SILENT.search(name)):
        rest = f" and {len(shown_names) - 3:,} more" if len(shown_names) > 3 else ""
        notes.append(
            f"{file} has tensors that are no part of the image tower and were left out: "
            f"{', '.join(shown_names[:3])}{rest}."
        )
    return {name: value.float() if value.is_floating_point() else value for name, value in fitted.items()}, notes


def _check_biases(raw: Tensors, module: Any, file: str, shown: str) -> None:
    """Leave out the biases of DINOv3's queries and values where they are 0 and the architecture has none.

    Raises ModelError where they are not 0: timm would leave them out and only print a line for each block.
    """
    parameters = {name for name, _ in module.named_parameters()}
    if "storage_tokens" not in raw or any(name.endswith(("q_bias", "q_proj.bias")) for name in parameters):
        return
    for name in [name for name in raw if name.endswith("attn.qkv.bias")]:
        if bool((raw.pop(name) != 0).any()):
            raise ModelError(
                f"{file} has biases of queries and values, and {shown} has none. Use the architecture with _qkvb "
                "behind its name."
            )


def _lost(raw: Mapping[str, Tensor], fitted: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors of which nothing arrived, neither their memory nor their name."""
    kept = [
        (value.data_ptr(), value.data_ptr() + max(1, value.numel() * value.element_size())) for value in raw.values()
    ]
    pointers = sorted(value.data_ptr() for value in fitted.values())
    starts = torch.tensor(pointers, dtype=torch.int64)
    lost = []
    for name, (first, stop) in zip(raw, kept, strict=True):
        place = int(torch.searchsorted(starts, first))
        arrived = place < len(pointers) and pointers[place] < stop
        if not arrived and not any(name == other or name.endswith(f".{other}") for other in fitted):
            lost.append(name)
    return lost


def _describe_changes(raw: Tensors, fitted: Tensors, module: Any, file: str, shown: str, kind: str) -> list[str]:
    notes = []
    renamed = sum(name not in raw for name in fitted)
    if kind.startswith(FOREIGN):
        notes.append(f"{file} has the names of {kind}; its tensors were renamed.")
    elif renamed:
        notes.append(f"{file} names {renamed} of its {len(raw)} tensors otherwise than timm; they were renamed.")
    before = next((value for name, value in raw.items() if name.endswith(_POSITIONS)), None)
    after = fitted.get("pos_embed")
    if before is not None and after is not None and after.ndim >= 3:
        n_before, n_after = before.numel() // before.shape[-1], after.numel() // after.shape[-1]
        extra = {0, 1, int(getattr(module, "num_prefix_tokens", 1))}
        counts = [n_before - n for n in sorted(extra, reverse=True) if n_before > n]
        side = next((math.isqrt(n) for n in counts if math.isqrt(n) ** 2 == n), 0)
        if n_before - n_after not in extra:
            rows, columns = module.patch_embed.grid_size
            theirs = f"{side} x {side}" if side else f"{n_before}"
            notes.append(
                f"{file} has positions for {theirs} patches; they were interpolated to the {rows} x {columns} of "
                f"{shown}'s image_size. Give its own --image-size to use the weights as they were trained."
            )
    for what, ending in (
        ("the patches", "patch_embed.proj.weight"),
        ("relative positions", "relative_position_bias_table"),
    ):
        old = next((value for name, value in raw.items() if name.endswith(ending)), None)
        new = next((value for name, value in fitted.items() if name.endswith(ending)), None)
        if old is not None and new is not None and old.ndim == new.ndim and old.shape != new.shape:
            notes.append(
                f"{file} has {what} in another size, {list(old.shape)}; they were resized to {list(new.shape)}."
            )
    return notes


_POSITIONS = ("pos_embed", "positional_embedding")


def fit_trunk(tensors: Tensors, visual: Any, trunk: Trunk, weights: Weights, file: str, shown: str) -> list[str]:
    """Resize, in place, the tensors of an open_clip model's timm trunk to the size of its images. Returns notes."""
    stem = "visual.trunk."
    own = {name.removeprefix(stem): value for name, value in tensors.items() if name.startswith(stem)}
    wanted = visual.trunk.state_dict()
    if not any(name in wanted and wanted[name].shape != value.shape for name, value in own.items()):
        return []
    fitted, notes = fit_tensors(Weights(own, weights.kind), visual.trunk, trunk, file, shown)
    for name in own:
        tensors.pop(stem + name)
    tensors |= {stem + name: value for name, value in fitted.items()}
    return notes


@torch.no_grad()
def _copy_periods(module: Any, periods: Tensor | None) -> dict[str, Tensor]:
    """Take DINOv3's rotary periods from the file, if they differ from timm's. Raises ModelError for another number."""
    rope: Any = getattr(module, "rope", None)
    if periods is None or getattr(rope, "periods", None) is None:
        return {}
    if periods.shape != rope.periods.shape:
        raise ModelError(
            f"{PERIODS} has {periods.numel()} periods, expected {rope.periods.numel()}. Check the number of heads."
        )
    if torch.equal(periods.float(), rope.periods):
        return {}
    rope.periods.copy_(periods.float())
    if rope.pos_embed_cached is not None:  # of a model whose grid is fixed
        rope.pos_embed_cached.copy_(rope._create_embed(rope.feat_shape, no_aug=True))
    return {"rope.periods": rope.periods}
