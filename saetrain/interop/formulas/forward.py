"""Forward, and the activations that several packages share."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Forward = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Activations [B, D] -> (codes [B, F], reconstruction [B, D]), dense, by the package's own formulas."""


def keep_largest(z: Tensor, k: int) -> Tensor:
    """z [B, F] with all entries set to 0 except the k largest of each row."""
    top = z.topk(k, dim=1)
    return torch.zeros_like(z).scatter(1, top.indices, top.values)


def normalize_tokens(x: Tensor, name: str | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Tokens as ViT-Prisma and SAELens normalize them (run_time_activation_norm_fn_in), and the way back (.._out)."""
    if name == "layer_norm":
        mean = x.mean(dim=-1, keepdim=True)
        std = (x - mean).std(dim=-1, keepdim=True)
        return (x - mean) / (std + 1e-5), lambda y: y * std + mean
    if name == "constant_norm_rescale":
        coefficient = x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True)
        return x * coefficient, lambda y: y / coefficient
    return x, lambda y: y


def as_floats(tensors: Mapping[str, object]) -> dict[str, Tensor]:
    return {name: value.float() for name, value in tensors.items() if isinstance(value, Tensor)}
