"""The text tower: class names and templates in, text embeddings out.

Promises: embeddings equal open_clip's `encode_text` in float32; a class's embedding is the mean of its templates'
unit embeddings, normalized again (Radford et al. 2021, section 3.1.4); no text is truncated silently. Texts of similar
length are run together, only up to their EOT, which is exact under a causal mask: 796 words take 4.4 s on one thread in
the tower of ViT-B/16, and 53 s with all 77 tokens each. A tower that looks both ways (SigLIP, CLIPA) sees the padding
too, as it did in training, so its texts are always run at full length.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F

from actcache.errors import ModelError, SettingsError
from actcache.hub import fetch_file
from actcache.models.architecture import context_length
from actcache.models.clip import Clip
from actcache.models.device import choose_device
from actcache.models.refusals import PROMPTS_REFUSED
from actcache.models.templates import TEMPLATE_SETS

BATCH_TEXTS = 256
TOKENIZER_OPTIONS = ("additional_special_tokens", "clean", "language", "reduction_mask", "strip_sep_token")
"""What a model's config may set of its tokenizer. Others reach transformers, which one of them lets run a repository's
code (trust_remote_code), so what is not known here is refused."""


@dataclass(frozen=True)
class TextTower:
    """A CLIP text tower in eval mode on its device, float32.

    Attributes:
        module: open_clip's model, whose image tower is not used.
        tokenize: texts -> token ids [N, context]; takes another `context_length` too.
        logit_scale: factor of the cosines before a softmax or a sigmoid, exp of the trained parameter.
        embed_dim: E, the size of the embeddings.
        logit_bias: what a sigmoid loss adds to the scaled cosines; None for a model that was trained with a softmax.
    """

    module: Any
    tokenize: Callable[..., Tensor]
    model_id: str
    device: torch.device
    logit_scale: float
    embed_dim: int
    logit_bias: float | None = None

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings [N, E] float32. Raises SettingsError for a text longer than the context."""
        embedded = torch.empty(len(texts), self.embed_dim, device=self.device)
        if not texts:
            return embedded
        tokens = self.encode(texts)
        ends = tokens.argmax(1)
        for part in torch.split(ends.argsort(), BATCH_TEXTS):
            if self.causal:
                ids = tokens[part, : int(ends[part].max()) + 1].to(self.device)
                embedded[part] = self.run(self.modules.token_embedding(ids), ids)
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

    @property
    def refusal(self) -> str | None:
        """Why no prompts can be put into its texts, of PROMPTS_REFUSED; None where they can."""
        if not isinstance(self.modules, open_clip.CLIP | open_clip.transformer.TextTransformer):
            return PROMPTS_REFUSED["transformers"]
        return None if isinstance(self.tokenize, open_clip.SimpleTokenizer) else PROMPTS_REFUSED["tokenizer"]

    def run(
        self,
        x: Tensor,
        tokens: Tensor,
        *,
        before: Callable[[int, Tensor], Tensor] = lambda block, x: x,
        precision: str = "float32",
    ) -> Tensor:
        """The forward pass of open_clip's own text towers: embedded tokens [N, L, W] -> unit embeddings [N, E].

        Args:
            x: without positions. L is the whole context, unless the tower is causal.
            tokens: [N, L] ids, which say where a text ends.
            before: called with the number and the input of each block, returns the input to use.
            precision: `float32`, or `bfloat16` (the blocks' branches in bfloat16, the stream in float32).
        """
        module, own = self.modules, getattr(self.modules, "cls_emb", None)
        if own is not None:  # CoCa has a token of its own behind the text, and reads the embedding there
            x = torch.cat([x, own.expand(len(x), 1, -1)], 1)
        x, mask = x + module.positional_embedding[: x.shape[1]], self._make_mask(tokens)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            for i, block in enumerate(module.transformer.resblocks):
                x = block(before(i, x), attn_mask=mask)
        ends = self._find_ends(tokens) if own is None else torch.full_like(tokens[:, 0], x.shape[1] - 1)
        pooled = module.ln_final(x[torch.arange(len(x), device=x.device), ends])
        projection = module.text_projection
        if projection is not None:
            pooled = projection(pooled) if isinstance(projection, torch.nn.Linear) else pooled @ projection
        return F.normalize(pooled, dim=-1)

    def _make_mask(self, tokens: Tensor) -> Tensor | None:
        """What the blocks add to the attention of tokens [N, L]: one mask for all texts, or one for each text."""
        module, length = self.modules, tokens.shape[1]
        if getattr(module, "cls_emb", None) is not None or getattr(module, "use_pad_mask", False):
            made: Tensor = module._embeds(tokens)[1]
            return made
        return None if module.attn_mask is None else module.attn_mask[:length, :length]

    def _find_ends(self, tokens: Tensor) -> Tensor:
        """[N]: the token at which the embedding of each text is read."""
        module = self.modules
        kind = getattr(module, "text_pool_type", getattr(module, "pool_type", None))
        if kind == "first":
            return torch.zeros_like(tokens[:, 0])
        if kind == "last":
            return torch.full_like(tokens[:, 0], tokens.shape[1] - 1)
        if kind == "eos":
            number = int(getattr(module, "text_eos_id", getattr(module, "eos_id", 0)))
            return tokens.eq(number).int().argmax(1)
        return tokens.argmax(1)  # EOT has the largest number

    @property
    def n_layers(self) -> int:
        return len(self.modules.transformer.resblocks)

    @torch.no_grad()
    def embed_tokens(self, texts: Sequence[str]) -> Tensor:
        """[N, context, W]: token embeddings, before positions and blocks."""
        embedded: Tensor = self.modules.token_embedding(self.tokenize(list(texts)).to(self.device)).float()
        return embedded

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Token ids [N, context] of whole texts. Raises SettingsError for a text longer than the context."""
        tokens = self.tokenize(list(texts))
        padding = self.tokenize([""])[0, -1]
        full = (tokens[:, -2:] != padding).any(1)  # some tokenizers end with the token that they pad with
        for i in full.nonzero().squeeze(1).tolist():
            self._check_length(texts[i], tokens[i], padding)
        return tokens

    def _check_length(self, text: str, tokens: Tensor, padding: Tensor) -> None:
        """Raise SettingsError if a text was truncated: with twice the context it has other tokens."""
        context = len(tokens)
        whole = self.tokenize([text], context_length=2 * context)[0]
        if not torch.equal(whole[:context], tokens) or bool((whole[context:] != padding).any()):
            raise SettingsError(
                f"A text of {len(text.split())} words is longer than the context of {context} tokens. Shorten "
                f"it: {text}"
            )


def make_text_tower(clip: Clip, *, device: str = "auto") -> TextTower:
    """The text tower of a loaded CLIP, frozen.

    Raises:
        SettingsError: the model has no text tower, the device is not available, or the tokenizer cannot be downloaded.
        ModelError: the model's config gives the tokenizer an option that is not in TOKENIZER_OPTIONS.
    """
    if not clip.has_text:
        raise SettingsError(
            f"{clip.name} has no text tower, so its images cannot be compared with words. Give a model that was "
            "trained with texts, such as a CLIP or a SigLIP of open_clip."
        )
    target, bias = choose_device(device), getattr(clip.module, "logit_bias", None)
    return TextTower(
        module=clip.module.to(target),
        tokenize=_make_tokenizer(clip),
        model_id=clip.model_id,
        device=target,
        logit_scale=float(clip.module.logit_scale.exp()),
        embed_dim=int(clip.config["embed_dim"]),
        logit_bias=None if bias is None else float(bias),
    )


def _make_tokenizer(clip: Clip) -> Callable[[list[str]], Tensor]:
    config, place = clip.config["text_cfg"], clip.source.tokenizer
    options, length = config.get("tokenizer_kwargs") or {}, context_length(clip.config)
    if not isinstance(options, Mapping) or (unknown := sorted(set(options) - set(TOKENIZER_OPTIONS))):
        given = ", ".join(unknown)[:200] if isinstance(options, Mapping) else "no object"
        raise ModelError(
            f"The config of {clip.name} asks for a tokenizer with options that are not known: {given}. Its "
            f"tokenizer_kwargs may hold {', '.join(TOKENIZER_OPTIONS)}. Remove the others from it."
        )
    made: Callable[[list[str]], Tensor]
    try:
        if place is None:
            made = open_clip.SimpleTokenizer(context_length=length, **options)
            return made
        if importlib.util.find_spec("transformers") is None:
            raise ModelError("it needs the package transformers. Install it with `pip install transformers`")
        if not Path(
            place
        ).is_dir():  # asks once; the tokenizer's own loading asks for a minute when there is no network
            fetch_file(place, ("tokenizer_config.json", "tokenizer.json", "config.json"))
        made = open_clip.tokenizer.HFTokenizer(
            place,
            context_length=length,
            tokenizer_mode=config.get("tokenizer_mode"),
            trust_remote_code=False,  # said outright: where nothing is said, transformers may ask at the terminal
            **options,
        )
    except Exception as error:  # tokenizer and network libraries raise many kinds of errors
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise SettingsError(f"The tokenizer of {clip.name} could not be loaded: {reason[:400]}.") from error
    return made
