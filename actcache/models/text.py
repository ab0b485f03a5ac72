"""The text tower: class names and templates in, text embeddings out.

Promises: embeddings equal open_clip's `encode_text` in float32; a class's embedding is the mean of its templates'
unit embeddings, normalized again (Radford et al. 2021, section 3.1.4); no text is truncated silently. Texts of similar
length are run together, only up to their EOT, which is exact under a causal mask: 796 words take 4.4 s on one thread in
the tower of ViT-B/16, and 53 s with all 77 tokens each.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F

from actcache.errors import ModelError, SettingsError
from actcache.models.architecture import context_length
from actcache.models.clip import Clip
from actcache.models.device import choose_device
from actcache.models.hub import fetch_file

TEMPLATE_SETS: dict[str, tuple[str, ...]] = {
    "photo": ("a photo of a {}.",),
    "simple": tuple(template("{}") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES),
    "openai": tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES),
}
"""Prompt templates by name: a single one, CLIP's best seven, and the 80 over which PatchSAE's paper averages."""
BATCH_TEXTS = 256


@dataclass(frozen=True)
class TextTower:
    """A CLIP text tower in eval mode on its device, float32.

    Attributes:
        module: open_clip's model, whose image tower is not used.
        tokenize: texts -> token ids [N, context].
        logit_scale: factor of the cosines before a softmax, exp of the trained parameter.
        logit_bias: what is added to a scaled cosine before the sigmoid loss; None where the model has none.
    """

    module: Any
    tokenize: Callable[[list[str]], Tensor]
    model_id: str
    device: torch.device
    logit_scale: float
    logit_bias: float | None = None

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings [N, E] float32. Raises SettingsError for a text longer than the context."""
        embedded = torch.empty(len(texts), self.embed_dim, device=self.device)
        if not texts:
            return embedded
        tokens = self._tokenize(texts)
        ends = tokens.argmax(1)
        for part in torch.split(ends.argsort(), BATCH_TEXTS):
            if self.causal:
                ids = tokens[part, : int(ends[part].max()) + 1].to(self.device)
                embedded[part] = self.run(self.modules.token_embedding(ids), ends[part])
            else:
                embedded[part] = self.module.encode_text(tokens[part].to(self.device), normalize=True)
        return embedded

    def embed_classes(self, names: Sequence[str], templates: Sequence[str] = TEMPLATE_SETS["photo"]) -> Tensor:
        """Unit embeddings [C, E] float32 of class names, each the mean over the templates.

        Args:
            templates: texts with one `{}` for the name.
        """
        texts = [template.format(name) for name in names for template in templates]
        means = self.embed(texts).view(len(names), len(templates), -1).mean(1)
        return F.normalize(means, dim=1)

    @property
    def modules(self) -> Any:
        """The module with open_clip's text modules: the CLIP itself, or its `text`."""
        return self.module if isinstance(self.module, open_clip.CLIP) else getattr(self.module, "text", None)

    @property
    def causal(self) -> bool:
        """Whether the embedding is read at EOT and no later token influences it, as in CLIP."""
        module = self.modules
        pool = getattr(module, "text_pool_type", getattr(module, "pool_type", None))
        masked = getattr(module, "attn_mask", None) is not None
        return masked and pool == "argmax" and getattr(module, "cls_emb", None) is None

    def run(
        self,
        x: Tensor,
        ends: Tensor,
        *,
        before: Callable[[int, Tensor], Tensor] = lambda block, x: x,
        precision: str = "float32",
    ) -> Tensor:
        """A causal tower's forward pass: embedded tokens [N, L, W] without positions -> unit embeddings [N, E].

        Args:
            ends: [N], position of each text's EOT.
            before: called with the number and the input of each block, returns the input to use.
            precision: `float32`, or `bfloat16` (the blocks' branches in bfloat16, the stream in float32).
        """
        module, length = self.modules, x.shape[1]
        x = x + module.positional_embedding[:length]
        mask = module.attn_mask[:length, :length]
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            for i, block in enumerate(module.transformer.resblocks):
                x = block(before(i, x), attn_mask=mask)
        pooled = module.ln_final(x[torch.arange(len(x), device=x.device), ends.to(x.device)])
        projection = module.text_projection
        if projection is not None:
            pooled = projection(pooled) if isinstance(projection, torch.nn.Linear) else pooled @ projection
        return F.normalize(pooled, dim=-1)

    @property
    def n_layers(self) -> int:
        return len(self.modules.transformer.resblocks)

    @torch.no_grad()
    def embed_tokens(self, texts: Sequence[str]) -> Tensor:
        """[N, context, W]: token embeddings, before positions and blocks."""
        embedded: Tensor = self.modules.token_embedding(self.tokenize(list(texts)).to(self.device)).float()
        return embedded

    @property
    def embed_dim(self) -> int:
        return int(self.module.visual.output_dim)

    def _tokenize(self, texts: Sequence[str]) -> Tensor:
        tokens = self.tokenize(list(texts))
        for i in (tokens[:, -1] != 0).nonzero().squeeze(1).tolist():
            self._check_length(texts[i], tokens.shape[1])
        return tokens

    def _check_length(self, text: str, context: int) -> None:
        """Raise SettingsError if a text was truncated, so that its last word makes no difference."""
        shorter = text.rsplit(maxsplit=1)[0]
        if shorter != text and torch.equal(self.tokenize([text]), self.tokenize([shorter])):
            raise SettingsError(
                f"A text of {len(text.split())} words is longer than the context of {context} tokens. Shorten "
                f"it: {text}"
            )


def make_text_tower(clip: Clip, *, device: str = "auto") -> TextTower:
    """The text tower of a loaded CLIP, frozen.

    Raises:
        SettingsError: the device is not available, or the tokenizer cannot be downloaded.
    """
    target = choose_device(device)
    bias = getattr(clip.module, "logit_bias", None)
    return TextTower(
        module=clip.module.to(target),
        tokenize=_make_tokenizer(clip),
        model_id=clip.model_id,
        device=target,
        logit_scale=float(clip.module.logit_scale.exp()),
        logit_bias=None if bias is None else float(bias),
    )


def _make_tokenizer(clip: Clip) -> Callable[[list[str]], Tensor]:
    config, place = clip.config["text_cfg"], clip.source.tokenizer
    options, length = config.get("tokenizer_kwargs") or {}, context_length(clip.config)
    made: Callable[[list[str]], Tensor]
    try:
        if place is None:
            made = open_clip.SimpleTokenizer(context_length=length, **options)
            return made
        if importlib.util.find_spec("transformers") is None:
            raise ModelError("it needs the package transformers. Install it with pip")
        if not Path(
            place
        ).is_dir():  # asks once; the tokenizer's own loading asks for a minute when there is no network
            fetch_file(place, ("tokenizer_config.json", "tokenizer.json", "config.json"))
        mode = config.get("tokenizer_mode")
        made = open_clip.tokenizer.HFTokenizer(place, context_length=length, tokenizer_mode=mode, **options)
    except Exception as error:  # tokenizer and network libraries raise many kinds of errors
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise SettingsError(f"The tokenizer of {clip.name} could not be loaded: {reason[:400]}.") from error
    return made


def read_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """Templates from the name of a set, a text with `{}`, a file with one template per line, or a sequence.

    Raises:
        SettingsError: it is none of these, or a template does not contain exactly one `{}`.
    """
    if isinstance(templates, str):
        if templates in TEMPLATE_SETS:
            return TEMPLATE_SETS[templates]
        path = Path(templates)
        if path.is_file():
            templates = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        else:
            templates = [templates]
    for template in templates:
        if template.count("{}") != 1 or template.count("{") != 1 or template.count("}") != 1:
            raise SettingsError(
                f"A template must contain one {{}} for the class name, got {template!r}. "
                f"Give such a text, a file of them, or one of {', '.join(TEMPLATE_SETS)}."
            )
    if not templates:
        raise SettingsError("There is no template. Give a text with {}, or a file with one template per line.")
    return tuple(templates)
