"""The forward pass with prompts: both open_clip towers are unchanged, and the prompts are inserted between blocks.

In: a tower and `Prompts`. Out: an image tower with prompts, text embeddings of classes, logits.

    image   x = ln_pre([CLS; patches + position; prompts]); before block i the last n tokens become the i-th prompts
    text    x = [SOS; prompts; rest of the text; EOT] + position; before block i tokens 1..n become the i-th prompts,
            which then have no position; the mask and the place of EOT are the text's own
    logit   exp(logit_scale) * cosine of image and text; SigLIP's bias would change no softmax over classes

Promises: under a causal mask texts are run only up to the last EOT, which is exact; a text tower that looks both ways
gets the padding too, as in training; without prompts everything equals the plain towers. Sources: methods.py.
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
from actcache.models import (
    PROMPTS_REFUSED,
    Clip,
    TextTower,
    VisionTower,
    make_text_tower,
    make_vision_tower,
)
from actcache.prompts.methods import METHODS
from actcache.prompts.prompts import Prompts
from actcache.store import find_origin

PLACEHOLDER = "X"
"""A word of one token, in place of prompts that have no words of their own."""
TEXT_ADVICE = "Use --method vpt, whose prompts go into images, or a model with CLIP's text tower, such as ViT-B-16."


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
        tokens: [C, L] token ids: L tokens of the longest text, or of the whole context.
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
        n_classes = len(self.names)
        first, *deep = prompts.text
        x, tokens = self.embedded, self.tokens
        if prompts.kind.texts_by_image:
            assert images is not None
            first = (first + prompts.shift(images)[:, None])[:, None].expand(-1, n_classes, -1, -1).flatten(0, 1)
            x, tokens = x.repeat(len(images), 1, 1), tokens.repeat(len(images), 1)
        x = self._put(x, first)
        if self.order is not None:
            x = x.gather(1, self.order[..., None].expand_as(x))

        def put_deep(block: int, x: Tensor) -> Tensor:
            return self._put(x, deep[block - 1]) if 0 < block <= len(deep) else x

        embedded = self.tower.run(x, tokens, before=put_deep, precision=self.precision)
        return embedded.view(-1, n_classes, embedded.shape[-1]) if prompts.kind.texts_by_image else embedded

    @staticmethod
    def _put(x: Tensor, prompts: Tensor) -> Tensor:
        """Tokens 1..n of x [N, L, W] become the prompts, [n, W] or [N, n, W]."""
        return torch.cat([x[:, :1], prompts.expand(len(x), -1, -1), x[:, 1 + prompts.shape[-2] :]], 1)


@dataclass(frozen=True)
class FixedText:
    """Class names for a method that leaves the texts as they are: any text tower will do."""

    tower: TextTower
    names: tuple[str, ...]
    template: str

    def embed(self, prompts: Prompts, images: Tensor | None = None) -> Tensor:
        """Unit text embeddings [C, E] float32, the plain tower's."""
        return self.tower.embed_classes(self.names, [self.template])


def prompt_text(
    tower: TextTower, prompts: Prompts, names: Sequence[str], *, precision: str = "float32"
) -> PromptedText | FixedText:
    """Prepare class names: everything that can be computed once, before the prompts change.

    Args:
        precision: of the text tower where it has prompts; texts that stay as they are are embedded in float32.

    Raises:
        ModelError: prompts cannot be put into the texts of this tower (`TextTower.refusal`).
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
    if prompts.kind.text is None:
        tower.encode([prompts.template.format(name) for name in names])
        return FixedText(tower, tuple(names), prompts.template)
    if tower.refusal is not None:
        raise ModelError(f"{prompts.method} prompts cannot be used here: {tower.refusal}. {TEXT_ADVICE}")
    tokens = tower.tokenize(class_texts(prompts, names))
    for name, last in zip(names, tokens[:, -1].tolist(), strict=True):
        if last:
            raise SettingsError(
                f"{prompts.n_text} prompts and {name!r} may not fit into {tokens.shape[1]} tokens. Shorten the name."
            )
    tokens = (tokens[:, : int(tokens.argmax(1).max()) + 1] if tower.causal else tokens).to(tower.device)
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
    return F.normalize(tower.head(run_tower(tower, images)).float(), dim=-1)


def run_tower(tower: VisionTower, images: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] -> the stream after the last block [B, T, D]."""
    return tower.run_blocks(tower.embed(images), 0, tower.n_layers)


def classify(images: Tensor, texts: Tensor, logit_scale: float) -> Tensor:
    """Unit embeddings of images [B, E] and of texts [C, E] or [B, C, E] -> logits [B, C]."""
    cosines = images @ texts.T if texts.dim() == 2 else torch.einsum("be,bce->bc", images, texts)
    return logit_scale * cosines


def check_method(method: str, towers: "Towers", name: str) -> None:
    """Raise ModelError unless this method's prompts can be put into these towers.

    Args:
        name: what the message calls the model.
    """
    kind, text = METHODS[method], towers.text_tower
    if kind.adapts_images and not towers.vision.body.takes_prompts:
        reason, advice = PROMPTS_REFUSED["pairs"], "Choose a tower with positions of another kind, such as ViT-B-16."
    elif kind.text is not None and (text is None or text.refusal is not None):
        reason = PROMPTS_REFUSED["no text"] if text is None else str(text.refusal)
        advice = TEXT_ADVICE
    else:
        return
    raise ModelError(f"{name} cannot be adapted by {method}: {reason}. {advice}")


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


def make_towers(clip: Clip, *, precision: str = "auto", device: str = "auto") -> Towers:
    """The towers of a loaded model, without prompts. Raises as `make_vision_tower` and `make_text_tower`."""
    text = make_text_tower(clip, device=device) if clip.has_text else None  # this moves the whole module
    vision = make_vision_tower(clip, precision=precision, device=device)
    return Towers(vision, text, n_classes=clip.classes)


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
    clip, adapted = _open_model(artifact, model, pretrained, prompts)
    towers = make_towers(clip, precision=precision or str(artifact.settings["precision"]), device=device)
    adapted = adapted.to(towers.vision.device) if adapted else None
    return towers._replace(vision=prompt_vision(towers.vision, adapted), prompts=adapted)


def open_vision_tower(
    artifact: Artifact, *, model: str | None = None, pretrained: str | None = None, device: str = "auto",
    precision: str = "auto",
) -> VisionTower:  # fmt: skip
    """Load the image tower that a store was extracted with, with its prompts. Arguments and errors as `open_towers`."""
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
