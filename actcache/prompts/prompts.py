"""Prompts: the learned tokens of CoOp, CoCoOp, VPT, IVLP and MaPLe, and where they go.

In: tensors, named as in the method's own checkpoints (see docs/reference/format.md). Out: checked `Prompts`: depth and
lengths follow from names and shapes, and every tensor has a place. No model is needed.

What a tower gets is a list of prompts: the first for its input, and one more before each of the next blocks.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from actcache.errors import ModelError, SettingsError
from actcache.models import hash_tensors, take_apart
from actcache.prompts.methods import FIRST_NUMBER, METHODS, VPT, VPT_BLOCKS, Method

Shape = tuple[int, ...]

TEMPLATE = "a photo of a {}."
"""The words with which all these methods begin."""


@dataclass(frozen=True)
class Prompts:
    """The prompts of one adapted CLIP.

    Attributes:
        method: one of METHODS.
        tensors: float32, named as in the method's checkpoints.
        template: the text around a class name; the prompts replace its first words.
        position: where the class name stands among CoOp's prompts: end, middle or front.
        classes: for class-specific prompts, the words of the classes in order; empty if unknown.

    Raises:
        ModelError: tensors are missing, superfluous, or do not fit each other; the message names them.
        SettingsError: an unknown method or position, or a template without one `{}`.
    """

    method: str
    tensors: Mapping[str, Tensor] = field(repr=False)
    template: str = TEMPLATE
    position: str = "end"
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise SettingsError(f"--method must be one of {', '.join(METHODS)}, got {self.method!r}.")
        if self.position not in self.kind.positions:
            known = ", ".join(self.kind.positions)
            raise SettingsError(
                f"With {self.method}, the position of the class name must be {known}, got {self.position!r}."
            )
        if self.template.count("{}") != 1:
            raise SettingsError(f"A template must contain one {{}} for the class name, got {self.template!r}.")
        _check_shapes(self.method, {name: tuple(value.shape) for name, value in self.tensors.items()})

    @property
    def kind(self) -> Method:
        """What describes the method: its usual values and the names of its tensors."""
        return METHODS[self.method]

    @property
    def text(self) -> tuple[Tensor, ...]:
        """[n, W] for the text tower's input and before each of its next blocks; empty if the text is fixed.

        With class-specific prompts of CoOp, the first is [C, n, W].
        """
        return tuple(self.tensors[name] for name in _text_names(self.kind, self.tensors))

    @property
    def vision(self) -> tuple[Tensor, ...]:
        """[n, D] for the image tower's input and before each of its next blocks; empty if it is unchanged.

        MaPLe's are projections of the text prompts, so gradients flow into the text prompts.
        """
        if not self.kind.maps_text:
            return tuple(self.tensors[name] for name in _vision_names(self.tensors))
        return tuple(
            F.linear(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])
            for name, x in zip(_map_names(len(self.text) - 1), self.text, strict=True)
        )

    def shift(self, images: Tensor) -> Tensor:
        """CoCoOp's meta_net: unit image embeddings [B, E] -> the shift of every ctx token, [B, W]."""
        first, second = ("meta_net.linear1", "meta_net.linear2")
        hidden = F.relu(F.linear(images, self.tensors[f"{first}.weight"], self.tensors[f"{first}.bias"]))
        return F.linear(hidden, self.tensors[f"{second}.weight"], self.tensors[f"{second}.bias"])

    @property
    def n_text(self) -> int:
        """Number of prompt tokens in the text tower."""
        return int(self.text[0].shape[-2]) if self.text else 0

    @property
    def n_vision(self) -> int:
        """Number of prompt tokens in the image tower, `n_extra` of a store."""
        return int(self.vision[0].shape[0]) if self.vision else 0

    @property
    def n_classes(self) -> int | None:
        """Number of classes for which the prompts were trained; None if they work for any class."""
        return int(self.text[0].shape[0]) if self.text and self.text[0].dim() == 3 else None

    @property
    def description(self) -> dict[str, object]:
        """What identifies these prompts, JSON-able: method, texts, and a hash of the tensors."""
        fields = {"method": self.method, "template": self.template, "position": self.position}
        return {**fields, "n_vision": self.n_vision, "hash": hash_tensors(self.tensors)}

    def to(self, device: torch.device) -> "Prompts":
        """The same prompts on another device."""
        moved = {name: value.to(device) for name, value in self.tensors.items()}
        return replace(self, tensors=moved)

    def check_towers(self, clip: Any) -> None:
        """Raise ModelError unless widths and depths fit a CLIP. `clip`: a loaded `Clip`."""
        visual, config = getattr(clip.module, "visual", clip.module), clip.config.get("text_cfg")
        if config is None and self.text:
            raise ModelError(
                f"These are {self.method} prompts, which go into texts, but {clip.name} has no text tower. They were "
                "made for another model; give that model."
            )
        body, config = take_apart(visual, clip.preprocess.size), config or {}
        widths = {"image": body.d_model, "text": config.get("width", 0)}
        n_blocks = {"image": len(body.blocks), "text": config.get("layers", 0)}
        for tower, prompts in (("image", self.vision), ("text", self.text)):
            for i, value in enumerate(prompts):
                if value.shape[-1] != widths[tower]:
                    raise ModelError(
                        f"The prompts for the {tower} tower are {value.shape[-1]} wide, but that of {clip.name} is "
                        f"{widths[tower]}. They were made for another model; give that model."
                    )
                mapped = self.kind.maps_text and tower == "text"  # the text tower may be the shallower one
                if i >= n_blocks[tower] and not mapped:
                    raise ModelError(
                        f"There are prompts for {len(prompts)} blocks of the {tower} tower, but {clip.name} has "
                        f"{n_blocks[tower]}. They were made for another model; give that model."
                    )
        if self.kind.texts_by_image and self.tensors["meta_net.linear1.weight"].shape[1] != clip.config["embed_dim"]:
            raise ModelError(
                f"meta_net.linear1.weight takes embeddings of size {self.tensors['meta_net.linear1.weight'].shape[1]}, "
                f"but those of {clip.name} have {clip.config['embed_dim']}. Give the model it was made for."
            )


def guess_method(names: Iterable[str]) -> str:
    """The method whose checkpoints have these keys. Raises ModelError if there is none."""
    names = set(names)
    for method, kind in METHODS.items():
        if any(name.startswith(kind.keys) for name in names):
            return method
    shown = ", ".join(sorted(names)[:5]) or "none"
    raise ModelError(
        f"These are not the keys of prompts ({shown} ...). Expected ctx, prompt_learner.ctx or image_encoder.VPT."
    )


def is_prompt(name: str) -> bool:
    """Whether a key of a checkpoint belongs to the prompts of any method; the others belong to the frozen CLIP."""
    learned = name in ("ctx", "image_encoder.VPT") or name.startswith(("prompt_learner.", "meta_net."))
    return learned or name.endswith(".VPT_shallow")


# ---------------------------------------------------------------------------------------------------------------------
# Names and shapes


def _text_names(kind: Method, names: Iterable[str]) -> list[str]:
    deep = _numbered(kind.text_blocks, names) if kind.text_blocks else []
    return [kind.text, *deep] if kind.text else []


def _vision_names(names: Collection[str]) -> list[str]:
    return [VPT, *_numbered(VPT_BLOCKS, names)] if VPT in names else []


def _numbered(series: str, names: Iterable[str]) -> list[str]:
    """The names of a series, sorted by number."""
    pattern = re.compile(re.escape(series).replace(r"\{\}", r"([0-9]{1,4})"))  # more digits are no number of a block
    numbered = [(int(match[1]), name) for name in names if (match := pattern.fullmatch(name))]
    return [name for _, name in sorted(numbered)]


def _map_names(n_deep: int) -> list[str]:
    """MaPLe's linear maps from text to image prompts."""
    return ["prompt_learner.proj", *(f"prompt_learner.compound_prompt_projections.{i}" for i in range(n_deep))]


def _check_shapes(method: str, shapes: dict[str, Shape]) -> None:
    """Raise ModelError unless these are exactly the tensors of the method, in shapes that fit each other."""
    expected = _expected_shapes(METHODS[method], shapes)
    problems = [f"{name} is missing" for name in expected if name not in shapes]
    problems += [f"{name[:80]} does not belong to {method}" for name in sorted(shapes) if name not in expected]
    problems += [
        f"{name} has shape {shapes[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in shapes and (shapes[name] != shape or 0 in shape)
    ]
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ModelError(f"These are not {method} prompts: {'; '.join(problems[:6])}{more}. Take another checkpoint.")


def _expected_shapes(kind: Method, shapes: dict[str, Shape]) -> dict[str, Shape]:
    """Single tensors determine lengths, widths and depth; the others must agree with them."""
    expected: dict[str, Shape] = {}
    ctx: Shape = shapes.get(kind.text or "", (1, 1))
    if kind.text:
        ctx = ctx if kind.class_specific and len(ctx) == 3 else _matrix(ctx)
        expected |= _series(kind.text, kind.text_blocks, ctx, shapes)
    if kind.texts_by_image:
        hidden, embed = _matrix(shapes.get("meta_net.linear1.weight", (1, 1)))
        expected |= _linear("meta_net.linear1", embed, hidden) | _linear("meta_net.linear2", hidden, ctx[-1])
    if kind.maps_text:
        width = shapes.get("prompt_learner.proj.weight", (1,))[0]
        for name in _map_names(len(expected) - 1):
            expected |= _linear(name, ctx[1], width)
    if kind.vision and (not kind.text or kind.vision in shapes):  # IVLP may adapt the text tower alone
        expected |= _series(kind.vision, VPT_BLOCKS, _matrix(shapes.get(kind.vision, (1, 1))), shapes)
    return expected


def _matrix(shape: Shape) -> tuple[int, int]:
    """Number of rows and columns that a matrix of this shape would have."""
    return (*shape, 1, 1)[:2] if len(shape) < 2 else shape[-2:]  # type: ignore[return-value]


def _linear(name: str, n_in: int, n_out: int) -> dict[str, Shape]:
    return {f"{name}.weight": (n_out, n_in), f"{name}.bias": (n_out,)}


def _series(first: str, deep: str | None, shape: Shape, shapes: Iterable[str]) -> dict[str, Shape]:
    """Shapes of the input's prompts and those of the next blocks, without a gap."""
    numbers = range(len(_numbered(deep, shapes))) if deep else ()
    return {first: shape} | {str(deep).format(FIRST_NUMBER[str(deep)] + i): shape for i in numbers}
