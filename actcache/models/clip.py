"""Loading a CLIP: what its name means is found out (resolver.py), then it is built and its weights are loaded.

Out: `Clip`, from which vision.py and text.py take the towers. Promises: no code in a file of weights is run; nothing is
missing in the file and nothing in it is left over; what contradicts the config is an error where it can be seen
(tensors, context, QuickGELU where the tag, the archive or a config beside the file tells it), and positions that were
resized to another grid of patches are said and recorded; the same architecture, weights and preprocessing give the same
model_id.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import open_clip
import torch
from torch import Tensor

from actcache.artifacts import digest
from actcache.errors import ModelError
from actcache.models.architecture import context_length, grid, has_quick_gelu
from actcache.models.checkpoint import read_weights
from actcache.models.resolver import ModelSource, check_quick_gelu, resolve_model
from actcache.preprocess import Preprocess

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Clip:
    """A CLIP in eval mode on the CPU.

    Attributes:
        module: open_clip's model.
        name: its name in messages.
        config: open_clip's model config.
        model_id: hash of architecture, base weights and preprocessing.
        preprocess: what `transform` does.
        transform: PIL image -> float32 tensor [3, H, W], open_clip's own.
        source: where each of these was taken from.
    """

    module: Any
    name: str
    config: Mapping[str, Any]
    model_id: str
    preprocess: Preprocess
    transform: Callable[[Any], Tensor]
    source: ModelSource

    @property
    def facts(self) -> dict[str, str]:
        """What a store records about where the model's parts came from."""
        notes = {"notes": " ".join(self.source.notes)} if self.source.notes else {}
        return {**self.source.sources, **notes}


def load_clip(model: str, pretrained: str | None = None, *, preprocess: Mapping[str, Any] | None = None) -> Clip:
    """Build the model and load its weights.

    Args:
        model, pretrained, preprocess: see `resolve_model`.

    Raises:
        ModelError: see `resolve_model`; also if the tower is not a VisionTransformer, QuickGELU does not match, or the
            checkpoint is truncated or has other tensors than the architecture.
    """
    source = resolve_model(model, pretrained, preprocess=preprocess)
    module = _build(source.config, source.name, source.seed)
    notes = [*source.notes]
    if source.weights is not None:
        notes += _load_weights(module, source)
    for note in notes:
        logger.warning("%s", note)
    source = replace(source, notes=tuple(notes))
    fields = source.preprocess.to_json()
    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**fields), False)
    model_id = digest({"config": source.config, "weights": hash_weights(module), "preprocess": fields})
    module = module.requires_grad_(False).eval()
    return Clip(module, source.name, source.config, model_id, source.preprocess, transform, source)


def _build(config: Mapping[str, Any], name: str, seed: int | None) -> Any:
    """The module with random weights. Towers of other libraries are told apart here and in `check_architecture`."""
    fields = json.loads(json.dumps(config))
    custom = fields.pop("custom_text", False)
    if "hf_model_name" in fields["text_cfg"]:
        fields["text_cfg"]["hf_model_pretrained"] = False
        custom = True
    kind: Any = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    if "multimodal_cfg" in fields:
        kind = open_clip.CoCa
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0 if seed is None else seed)
            return kind(**fields)
    except Exception as error:  # open_clip checks nothing, so anything may come out of its modules
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ModelError(f"{name} does not describe an open_clip model: {reason}.") from error


def _load_weights(module: Any, source: ModelSource) -> list[str]:
    """Load the file into the module, strictly. Returns notes about what had to be adapted."""
    path, name = source.weights, source.name
    assert path is not None
    weights, notes = read_weights(path), []
    if weights.quick_gelu is not None:
        check_quick_gelu(name, has_quick_gelu(source.config), path.name, weights.quick_gelu)
    tensors, wanted = dict(weights.tensors), module.state_dict()
    if "positional_embedding" in tensors and "text.positional_embedding" in wanted:
        tensors = open_clip.model.convert_to_custom_text_state_dict(tensors)
    for scalar in ("logit_scale", "logit_bias"):  # a number or a vector of one
        if scalar in tensors and scalar in wanted and tensors[scalar].numel() == 1:
            tensors[scalar] = tensors[scalar].reshape(wanted[scalar].shape)
    if "logit_bias" in wanted and "logit_bias" not in tensors:
        tensors["logit_bias"] = torch.zeros_like(wanted["logit_bias"])
        notes.append(f"{path.name} has no logit_bias; it is 0.")
    ids = "text.transformer.embeddings.position_ids"  # derived; stored by older versions of transformers
    if ids not in wanted:
        tensors.pop(ids, None)
    notes += _fit_positions(module, tensors, source)
    _check_tensors(tensors, wanted, source)
    module.load_state_dict(tensors, strict=True)
    return notes


def _fit_positions(module: Any, tensors: dict[str, Tensor], source: ModelSource) -> list[str]:
    """Resize the image tower's positions to the config's grid, if they are a grid at all. Raises ModelError for texts'.

    To run a tower at another resolution is common, and interpolated positions keep their meaning there. The positions
    of a text do not: position 40 of 77 is no position of 32.
    """
    assert source.weights is not None
    file, context = source.weights.name, context_length(source.config)
    own_texts = "hf_model_name" not in source.config["text_cfg"]
    for name in ("positional_embedding", "text.positional_embedding") if own_texts else ():
        value = tensors.get(name)
        if (
            value is not None
            and value.ndim == 2
            and len(value) != context
            and "hf_model_name" not in source.config["text_cfg"]
        ):
            raise ModelError(
                f"{file} was trained with texts of {len(value)} tokens, but {source.name} has a context_length of "
                f"{context}. Correct the one in the config."
            )
    name, (rows, columns) = "visual.positional_embedding", grid(source.config)
    value = tensors.get(name)
    if value is None or value.ndim != 2 or len(value) == 1 + rows * columns:
        return []
    side = round((len(value) - 1) ** 0.5)
    if side < 1 or side * side != len(value) - 1 or value.shape[1] != module.visual.positional_embedding.shape[1]:
        return []  # the check of the shapes says what is wrong
    tensors[name] = tensors[name].float()
    open_clip.model.resize_pos_embed(tensors, module)
    return [
        f"{file} has positions for {side} x {side} patches; they were interpolated to the {rows} x {columns} of "
        f"{source.name}'s image_size. Give its own image_size in the config to use the weights as they were trained."
    ]


def _check_tensors(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: ModelSource) -> None:
    """Raise ModelError unless the file has exactly the tensors of the architecture."""
    assert source.weights is not None
    shapes = [
        f"{name} {list(tensors[name].shape)} instead of {list(value.shape)}"
        for name, value in wanted.items() if name in tensors and tensors[name].shape != value.shape
    ]  # fmt: skip
    missing = sorted(set(wanted) - set(tensors))
    more = sorted(ascii(name)[1:-1] for name in set(tensors) - set(wanted))
    for what, names in (("tensors are missing", missing), ("tensors are left over", more), ("shapes differ", shapes)):
        if names:
            rest = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
            shown = ", ".join(name[:80] for name in names[:3])
            raise ModelError(
                f"{source.weights.name} cannot be loaded into {source.name}: {what}: {shown}{rest}. Expected a "
                "complete file of exactly this architecture."
            )


def hash_weights(clip: Any) -> str:
    """sha256 over the name, shape and float32 bytes of every tensor of a module, in name order."""
    return hash_tensors(clip.state_dict())


def hash_tensors(tensors: Mapping[str, Any]) -> str:
    """sha256 over the name, shape and float32 bytes of every tensor, in name order."""
    total = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        total.update(f"{key} {tuple(value.shape)}".encode())
        total.update(value.detach().float().cpu().contiguous().numpy().data)
    return total.hexdigest()
