"""Loading a model: what its name means is found out (resolver.py), then it is built and its weights are loaded.

Out: `Clip`, from which vision.py and text.py take the towers. Promises: no code in a file of weights is run; nothing is
missing in the file and nothing in it is left over; what contradicts the config is an error where it can be seen
(tensors, context, QuickGELU where the tag, the archive or a config beside the file tells it), and positions that were
resized to another grid of patches are said and recorded; the same architecture, weights and preprocessing give the same
model_id.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import open_clip
import timm
import torch
from torch import Tensor

from actcache.artifacts import digest
from actcache.errors import ModelError
from actcache.models.architecture import context_length, grid, has_quick_gelu, has_trunk
from actcache.models.building import Trunk, build_open_clip, build_timm, check_built
from actcache.models.checkpoint import check_tensors, read_weights
from actcache.models.preprocessing import make_transform
from actcache.models.resolver import ModelSource, check_quick_gelu, resolve_model
from actcache.models.timm_names import TimmName
from actcache.models.timm_weights import fit_trunk, load_timm
from actcache.preprocess import Preprocess

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Clip:
    """A model in eval mode on the CPU: a CLIP of open_clip, or an image tower of timm by itself.

    Attributes:
        module: open_clip's model, or timm's.
        name: its name in messages.
        config: open_clip's model config; of timm `library`, `architecture`, the class and the constructor's arguments.
        model_id: hash of architecture, base weights and preprocessing; of timm and its trunks also of the constructor's
            arguments, some of which change values and leave no trace in the tensors.
        preprocess: what `transform` does.
        transform: PIL image -> float32 tensor [3, H, W], the library's own.
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
    def library(self) -> str:
        """open_clip or timm."""
        return "open_clip" if self.source.timm is None else "timm"

    @property
    def has_text(self) -> bool:
        """Whether there is a text tower, so that images can be compared with words."""
        return self.source.timm is None

    @property
    def classes(self) -> int:
        """Number of classes of the checkpoint's own classifier, of which the head gives the logits; 0 if it has none.

        The last layer of an image tower that was trained with texts makes embeddings, and is no classifier.
        """
        if self.source.timm is None:
            return 0
        count = int(getattr(self.module, "num_classes", 0) or 0)
        embeds = any(word in self.source.timm.architecture for word in _TRAINED_WITH_TEXTS)
        return 0 if embeds and timm.data.infer_imagenet_subset(self.module) is None else count

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the libraries that built it."""
        return {"open_clip": open_clip.__version__, "timm": timm.__version__}

    @property
    def facts(self) -> dict[str, str]:
        """What a store records about where the model's parts came from."""
        notes = {"notes": " ".join(self.source.notes)} if self.source.notes else {}
        return {**self.source.sources, **notes}


_TRAINED_WITH_TEXTS = ("_clip_", "pe_core", "siglip", "vitamin", "_mci_")


def load_clip(
    model: str, pretrained: str | None = None, *, preprocess: Mapping[str, Any] | None = None,
    image_size: str | None = None, preprocess_as: str | None = None,
) -> Clip:  # fmt: skip
    """Build the model and load its weights.

    Args:
        model, pretrained, preprocess, image_size, preprocess_as: see `resolve_model`.

    Raises:
        ModelError: see `resolve_model`; also if the model is larger than this machine's memory, QuickGELU does not
            match, or the checkpoint is truncated or has other tensors than the architecture.
    """
    source = resolve_model(model, pretrained, preprocess=preprocess, image_size=image_size, preprocess_as=preprocess_as)
    made = _load_open_clip(source) if source.timm is None else _load_timm(source, source.timm)
    module, identity, config, found = made
    notes = (*source.notes, *found)
    for note in notes:
        logger.warning("%s", note)
    source = replace(source, notes=notes)
    model_id = digest({**identity, "preprocess": source.preprocess.to_json()})
    module = module.requires_grad_(False).eval()
    transform = make_transform(source.preprocess)
    return Clip(module, source.name, config, model_id, source.preprocess, transform, source)


_Made = tuple[Any, dict[str, Any], Mapping[str, Any], list[str]]
"""Module, what its identity is made of besides the preprocessing, config, notes."""


def _load_open_clip(source: ModelSource) -> _Made:
    if has_trunk(source.config):
        check_built(build_open_clip(source.config, source.name, seed=0, meta=True)[0], source.name)
    module, trunk = build_open_clip(source.config, source.name, seed=source.seed)
    notes = [] if source.weights is None else _load_weights(module, trunk, source)
    identity: dict[str, object] = {"config": source.config, "weights": hash_weights(module)}
    if trunk is not None:
        identity["trunk"] = {"class": trunk.kind, "arguments": trunk.arguments}
    return module, identity, source.config, notes


def _load_timm(source: ModelSource, name: TimmName) -> _Made:
    buffers, notes = dict[str, Tensor](), list[str]()
    if source.weights is None:
        check_built(build_timm(name, seed=None, n_classes=0, meta=True)[0], source.name)
        module, trunk = build_timm(name, seed=source.seed, n_classes=0)  # a random classifier says nothing
    else:
        module, trunk, buffers, notes = load_timm(name, source.weights, source.name)
    if source.beside is not None:
        _check_construction(trunk, build_timm(source.beside, seed=None, meta=True)[1], source)
    described = {"library": "timm", "class": trunk.kind, "arguments": trunk.arguments}
    identity = {**described, "weights": hash_tensors({**module.state_dict(), **buffers})}
    return module, identity, {**source.config, **described}, notes


_OF_USE = ("img_size", "num_classes", "dynamic_img_size", "class_token", "global_pool", "fc_norm", "use_fc_norm")
"""Arguments that may differ between weights and their use: the size of images, the classifier, the pooling."""


def _check_construction(ours: Trunk, theirs: Trunk, source: ModelSource) -> None:
    """Raise ModelError where a config beside the weights describes another model than the one that was named.

    The tensors can be the same: another GELU, another number of heads.
    """
    assert source.weights is not None
    keys = {*ours.arguments, *theirs.arguments} - {*_OF_USE}
    differing = sorted(key for key in keys if ours.arguments.get(key) != theirs.arguments.get(key))
    if differing or ours.kind != theirs.kind:
        key = differing[0] if differing else "class"
        values = [trunk.arguments.get(key, "the default") if differing else trunk.kind for trunk in (theirs, ours)]
        raise ModelError(
            f"The config beside {source.weights.name} says {key} {ascii(values[0])[:60]}, but --model {source.name} "
            f"has {ascii(values[1])[:60]}. Give --model {source.weights.absolute().parent} to use the weights as they "
            "were trained."
        )


def _load_weights(module: Any, trunk: Trunk | None, source: ModelSource) -> list[str]:
    """Load the file into the module, strictly. Returns notes about what had to be adapted."""
    path, name = source.weights, source.name
    assert path is not None
    weights = read_weights(path)
    notes = [*weights.notes]
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
    if trunk is None:
        notes += _fit_positions(module, tensors, source)
    else:
        _check_context(tensors, source)
        notes += fit_trunk(tensors, module.visual, trunk, weights, path.name, name)
    check_tensors(tensors, wanted, path.name, name)
    module.load_state_dict(tensors, strict=True)
    return notes


def _fit_positions(module: Any, tensors: dict[str, Tensor], source: ModelSource) -> list[str]:
    """Resize the image tower's positions to the config's grid, if they are a grid at all. Raises ModelError for texts'.

    To run a tower at another resolution is common, and interpolated positions keep their meaning there. The positions
    of a text do not: position 40 of 77 is no position of 32.
    """
    assert source.weights is not None
    file = source.weights.name
    _check_context(tensors, source)
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


def _check_context(tensors: Mapping[str, Tensor], source: ModelSource) -> None:
    """Raise ModelError where the file's texts have another length. One token more is CoCa's CLS."""
    assert source.weights is not None
    text, context = source.config["text_cfg"], context_length(source.config)
    if "hf_model_name" in text:
        return
    for name in ("positional_embedding", "text.positional_embedding"):
        value = tensors.get(name)
        if value is not None and value.ndim == 2 and len(value) != context + bool(text.get("embed_cls")):
            raise ModelError(
                f"{source.weights.name} was trained with texts of {len(value)} tokens, but {source.name} has a "
                f"context_length of {context}. Correct the one in the config."
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
