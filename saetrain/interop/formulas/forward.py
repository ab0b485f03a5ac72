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


def as_floats(tensors: Mapping[str, object]) -> dict[str, Tensor]:
    return {name: value.float() for name, value in tensors.items() if isinstance(value, Tensor)}
