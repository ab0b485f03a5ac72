"""The forward pass with prompts: both open_clip towers are unchanged, and the prompts are inserted between blocks.

In: a tower and `Prompts`. Out: an image tower with prompts, text embeddings of classes, logits.

    image   x = ln_pre([CLS; patches + position; prompts]); before block i the last n tokens become the i-th prompts
    text    x = [SOS; prompts; rest of the text; EOT] + position; before block i tokens 1..n become the i-th prompts,
            which then have no position; the causal mask and the place of EOT are the text's own
    logit   exp(logit_scale) * cosine of image and text

Promises: texts are run only up to the last EOT, which is exact under the causal mask; without prompts everything equals
the plain towers. Sources: see actcache/prompts/methods.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from actcache.artifacts import Artifact
from actcache.errors import ModelError, ParentMismatchError, SettingsError
from actcache.models import Clip, TextTower, VisionTower
from actcache.prompts.prompts import Prompts
from actcache.store import find_origin

PLACEHOLDER = "X"
"""A word of one token, in place of prompts that have no words of their own."""


def prompt_vision(tower: VisionTower, prompts: Prompts | None) -> VisionTower:
    """The image tower with its prompts; CoOp and CoCoOp do not change it. Gradients reach the prompts."""
    if prompts is None:
        return tower
    return replace(tower, prompts=tuple(value.to(tower.device) for value in prompts.vision))


@dataclass(frozen=True)
class PromptedText:
    """Class names, prepared for the text tower of an adapted model.

    Attributes:
        tower: the plain text tower.
        names: names of the classes.
        tokens: [C, L] token ids, L tokens of the longest text.
        embedded: [C, L, W] token embeddings, without positions.
        order: [C, L] index from which each token is taken; None if the class name is at the end.
        precision: `float32`, or `bfloat16`: branches in bfloat16, the stream in float32.
    """

    tower: TextTower
    names: tuple[str, ...]
    tokens: Tensor
    embedded: Tensor
    order: Tensor | None
    precision: str

    def embed(self, prompts: Prompts, images: Tensor | None = None) -> Tensor:
        """Unit text embeddings [C, E] float32; with CoCoOp [B, C, E], one set per image. Gradients reach the prompts.

        Args:
            images: unit image embeddings [B, E], which CoCoOp needs.
        """
        n_classes, n = len(self.names), prompts.n_text
        first, *deep = prompts.text or (self.embedded[:, 1:1],)
        x = self.embedded
        if prompts.kind.texts_by_image:
            assert images is not None
            first = (first + prompts.shift(images)[:, None])[:, None].expand(-1, n_classes, -1, -1).flatten(0, 1)
            x = x.repeat(len(images), 1, 1)
        x = self._put(x, first)
        if self.order is not None:
            x = x.gather(1, self.order[..., None].expand_as(x))

        def put_deep(block: int, x: Tensor) -> Tensor:
            return self._put(x, deep[block - 1]) if n and 0 < block <= len(deep) else x

        ends = self.tokens.argmax(1).repeat(len(x) // n_classes)
        embedded = self.tower.run(x, ends, before=put_deep, precision=self.precision)
        return embedded.view(-1, n_classes, embedded.shape[-1]) if prompts.kind.texts_by_image else embedded

    @staticmethod
    def _put(x: Tensor, prompts: Tensor) -> Tensor:
        """Tokens 1..n of x [N, L, W] become the prompts, [n, W] or [N, n, W]."""
        return torch.cat([x[:, :1], prompts.expand(len(x), -1, -1), x[:, 1 + prompts.shape[-2] :]], 1)


def prompt_text(
    tower: TextTower, prompts: Prompts, names: Sequence[str], *, precision: str = "float32"
) -> PromptedText:
    """Prepare class names: everything that can be computed once, before the prompts change.

    Raises:
        ModelError: the text tower is not causal, does not pool at EOT, or is not open_clip's.
        SettingsError: there are no names, a text is longer than the context, or class-specific prompts were trained for
            other classes.
    """
    if not names:
        raise SettingsError("There are no classes. Expected images in one folder per class, or a column label_name.")
    if prompts.n_classes not in (None, len(names)) or prompts.classes not in ((), tuple(names)):
        known = f" ({', '.join(prompts.classes[:5])})" if prompts.classes else ""
        raise SettingsError(
            f"These prompts were trained for {prompts.n_classes} specific classes{known}; you asked for {len(names)} "
            f"({', '.join(names[:5])}). Give the classes they were trained on."
        )
    if not tower.causal:
        raise ModelError(
            "Prompts need a causal text tower of open_clip that pools at EOT, like CLIP's. Choose a model that has one."
        )
    tokens = tower.tokenize(class_texts(prompts, names))
    for name, last in zip(names, tokens[:, -1].tolist(), strict=True):
        if last:
            raise SettingsError(
                f"{prompts.n_text} prompts and {name!r} may not fit into {tokens.shape[1]} tokens. Shorten the name."
            )
    tokens = tokens[:, : int(tokens.argmax(1).max()) + 1].to(tower.device)
    with torch.no_grad():
        embedded = tower.modules.token_embedding(tokens).float()
    order = None
    if prompts.position != "end":
        lengths = tower.tokenize(list(names)).argmax(1).tolist()  # SOS, the name, EOT
        order = name_order(lengths, prompts.n_text, tokens.shape[1], prompts.position).to(tower.device)
    return PromptedText(tower, tuple(names), tokens, embedded, order, precision)


def class_texts(prompts: Prompts, names: Sequence[str]) -> list[str]:
    """The text of every class, whose words 1..n the prompts will replace.

    IVLP and MaPLe replace the first n tokens of "a photo of a {}." if it has as many, and keep the rest as words.
    """
    before, after = prompts.template.split("{}")
    keeps_words = prompts.kind.keeps_words and len(before.split()) >= prompts.n_text
    if prompts.n_text and not keeps_words:
        before = f"{PLACEHOLDER} " * prompts.n_text
    return [before + name + after for name in names]


def name_order(name_lengths: Sequence[int], n: int, length: int, position: str) -> Tensor:
    """[C, length]: index from which each token of [SOS; prompts; name; rest] is taken when the name is moved.

    middle: half of the prompts, the name, the other half. front: the name, then the prompts. (CoOp.)
    """
    ahead = n // 2 if position == "middle" else 0
    rows = []
    for n_name in (k - 1 for k in name_lengths):
        prompts, name = list(range(1, 1 + n)), list(range(1 + n, 1 + n + n_name))
        moved = [0, *prompts[:ahead], *name, *prompts[ahead:]]
        rows.append([*moved, *range(len(moved), length)])
    return torch.tensor(rows)


def embed_images(tower: VisionTower, images: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] -> unit image embeddings [B, E] float32. Gradients flow if they are enabled."""
    x = tower.run_blocks(tower.embed(images), 0, tower.n_layers)
    return F.normalize(tower.head(x).float(), dim=-1)


def classify(images: Tensor, texts: Tensor, logit_scale: float) -> Tensor:
    """Unit embeddings of images [B, E] and of texts [C, E] or [B, C, E] -> logits [B, C]."""
    cosines = images @ texts.T if texts.dim() == 2 else torch.einsum("be,bce->bc", images, texts)
    return logit_scale * cosines


class Towers(NamedTuple):
    """The towers of a model. For an adapted model, the image tower includes its prompts, the text tower does not.

    Attributes:
        text_tower: None where the model has none; `text` refuses such a model.
        n_classes: number of classes of the checkpoint's own classifier, whose logits the head gives; 0 if it has none.
    """

    vision: VisionTower
    text_tower: TextTower | None
    prompts: Prompts | None = None
    n_classes: int = 0

    @property
    def text(self) -> TextTower:
        """Raises SettingsError where the model has no text tower."""
        if self.text_tower is None:
            raise SettingsError(
                f"Model {self.vision.model_id} has no text tower, but texts are compared with its images. Use a model "
                "that has one, or a judge that needs no texts: --judge probe or --judge head."
            )
        return self.text_tower

    def embed_classes(self, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Unit embeddings [C, E] of class names; an adapted model uses the template of its prompts.

        Raises:
            SettingsError: the method is CoCoOp, whose text embeddings differ for every image.
        """

        if self.prompts is None:
            return self.text.embed_classes(names, templates)
        if self.prompts.kind.texts_by_image:
            raise SettingsError("CoCoOp has different text embeddings for every image. Use prompts of another method.")
        return prompt_text(self.text, self.prompts, names).embed(self.prompts).detach()

    def texts_by_image(self, names: Sequence[str]) -> Callable[[Tensor], Tensor] | None:
        """Unit image embeddings [B, E] -> text embeddings [B, C, E]; None unless texts depend on images (CoCoOp)."""

        prompts = self.prompts
        if prompts is None or not prompts.kind.texts_by_image:
            return None
        text = prompt_text(self.text, prompts, names)
        return lambda images: text.embed(prompts, images).detach()


def open_towers(
    artifact: Artifact, *, model: str | None = None, pretrained: str | None = None,
    prompts: str | Path | None = None, device: str = "auto", precision: str | None = None,
) -> Towers:  # fmt: skip
    """Load the CLIP that a store was extracted with.

    Args:
        artifact: the activation store's artifact.
        model, pretrained, prompts: as they were given to `extract`; by default what the store recorded.
        precision: precision of the image tower; by default the store's.

    Raises:
        SettingsError: the model cannot be found.
        ModelError: it cannot be loaded.
        ParentMismatchError: it is not the store's model, or these are not the store's prompts.
    """
    from actcache.models import make_text_tower, make_vision_tower

    clip, adapted = _open_model(artifact, model, pretrained, prompts)
    has_text = getattr(clip, "has_text", True)
    text = make_text_tower(clip, device=device) if has_text else None  # this moves the whole module
    vision = make_vision_tower(clip, precision=precision or str(artifact.settings["precision"]), device=device)
    adapted = adapted.to(vision.device) if adapted else None
    return Towers(prompt_vision(vision, adapted), text, adapted, getattr(clip, "classes", 0))


def open_vision_tower(
    artifact: Artifact, *, model: str | None = None, pretrained: str | None = None, device: str = "auto",
    precision: str = "auto",
) -> VisionTower:  # fmt: skip
    """Load the image tower that a store was extracted with, with its prompts. Arguments and errors as `open_towers`."""
    from actcache.models import make_vision_tower

    clip, adapted = _open_model(artifact, model, pretrained, None)
    vision = make_vision_tower(clip, precision=precision, device=device)
    return prompt_vision(vision, adapted.to(vision.device) if adapted else None)


def _open_model(
    artifact: Artifact, model: str | None, pretrained: str | None, prompts: str | Path | None
) -> tuple[Clip, Prompts | None]:
    """The model of a store and its prompts. Raises as `open_towers`."""
    from actcache.models import load_clip
    from actcache.prompts.artifact import open_prompts

    names = find_origin(artifact, "model", model), find_origin(artifact, "pretrained", pretrained)
    clip = load_clip(*names, preprocess=artifact.settings.get("preprocess"))
    if clip.model_id != artifact.settings["model_id"]:
        raise ParentMismatchError(
            f"{names[0]} with {names[1]} is not the model of {artifact.path}. "
            "Name the right one with --model and --pretrained."
        )
    if "prompts" not in artifact.settings:
        return clip, None
    place = find_origin(artifact, "prompts", None if prompts is None else str(prompts))
    adapted = open_prompts(place, clip)
    if adapted.description != artifact.settings["prompts"]:
        raise ParentMismatchError(
            f"{place} does not hold the prompts of {artifact.path}. Name the right ones with --prompts."
        )
    return clip, adapted
