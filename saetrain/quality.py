"""Quality: what is measured of an SAE, by kind of token, as the manifest of a run holds it. No torch."""

from typing import NotRequired, TypedDict


class TokenQuality(TypedDict):
    """How well tokens of one kind are reconstructed."""

    fvu: float  # sum ||x - x^||^2 / sum ||x - mean||^2
    l0: float  # active latents per token
    cosine: float  # mean over tokens


class Quality(TypedDict):
    """The quality of an SAE on some images. Kinds of tokens that it was not trained on are absent."""

    all: NotRequired[TokenQuality]
    cls: NotRequired[TokenQuality]
    patch: NotRequired[TokenQuality]
    silent: float  # share of latents that never fired here
    dense: float  # share of latents that fired on more than 10 % of the tokens
    n_tokens: int
    dead: NotRequired[float]  # share of latents that were dead at the end of the training
    left_out: NotRequired[int]  # held-out images that were not measured because a copy of them was trained on
