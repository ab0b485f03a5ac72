"""The size of a token, by which an SAE of another package may normalize it, and which is needed again to decode.

    layer_norm               m = mean_d x, s = std_d x      x -> (x - m) / (s + 1e-5)      x = s x + m
    constant_norm_rescale    r = ||x|| / sqrt(D)            x -> x / r                     x = r x

The deviation has D - 1 in its denominator, and 1e-5 is added on the way in only. Source: ViT-Prisma's `sae.py` and
SAELens' `saes/sae.py` (normalize_activations). An SAE that divides by ||x|| is one of constant_norm_rescale whose
weights absorb sqrt(D).
"""

from typing import NamedTuple

from torch import Tensor, ones_like, where, zeros_like

EPS = 1e-5


class TokenSize(NamedTuple):
    """x -> (x - shift) / divisor on the way in, and x factor + shift on the way out; each is [..., 1] float32.

    A token of zeros has divisor 1 (or 1e-5) and factor 0: it is read as zeros, and reconstructed as zeros.
    """

    shift: Tensor
    divisor: Tensor
    factor: Tensor


def measure_tokens(normalize: str, x: Tensor) -> TokenSize:
    """The sizes of tokens x [..., D] of any float dtype, for one of TOKEN_NORMALIZATIONS."""
    x = x.float()
    if normalize == "layer_norm":
        mean = x.mean(-1, keepdim=True)
        deviation = ((x - mean).square().sum(-1, keepdim=True) / max(x.shape[-1] - 1, 1)).sqrt()
        return TokenSize(mean, deviation + EPS, deviation)
    if normalize != "constant_norm_rescale":
        raise AssertionError(normalize)
    root = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
    return TokenSize(zeros_like(root), where(root > 0, root, ones_like(root)), root)
