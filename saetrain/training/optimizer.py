"""One update: sum over processes, clipping, Adam (fused: 10 ms per matrix; foreach: 45), unit rows.

Every pass over the dictionary goes by blocks of rows that stay in cache. The learning rate of a step is computed in
saetrain/config.py.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from saetrain.distributed import all_sum
from saetrain.model import SAE, gradient

_BLOCK_ROWS = 1024


def make_optimizer(sae: SAE) -> torch.optim.Adam:
    return torch.optim.Adam(sae.parameters(), lr=0.0, fused=True)


@torch.no_grad()
def apply_update(sae: SAE, optimizer: torch.optim.Adam, *, learning_rate: float, clip_norm: float) -> None:
    """Update the weights in place, and set the gradients to zero.

    The component of each decoder gradient along its row only changes the length of the row, which the renormalization
    reverts. It is removed first, so that it does not enter Adam's moments (Bricken et al. 2023).
    """
    grads = [all_sum(gradient(parameter)) for parameter in sae.parameters()]
    for row, grad in zip(_blocks(sae.decoder), _blocks(gradient(sae.decoder)), strict=True):
        grad.addcmul_(torch.linalg.vecdot(grad, row)[:, None], row, value=-1)
    if clip_norm:
        norm = torch.stack([torch.dot(grad.view(-1), grad.view(-1)) for grad in grads]).sum().sqrt()
        # fused Adam divides gradients by this while it reads them, which saves a pass
        vars(optimizer)["grad_scale"] = (norm / clip_norm).clamp_min(1.0)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    for row in _blocks(sae.decoder):
        row.div_(row.norm(dim=1, keepdim=True).clamp_min(1e-8))
    sae.variant.after_update(sae)
    for grad in grads:
        grad.zero_()


def _blocks(matrix: Tensor) -> Iterator[Tensor]:
    for first in range(0, len(matrix), _BLOCK_ROWS):
        yield matrix.detach()[first : first + _BLOCK_ROWS]


def reset_latents(sae: SAE, optimizer: torch.optim.Adam, index: Tensor) -> None:
    """Set Adam's moments of latents whose weights were replaced to zero."""
    for parameter in sae.parameters():
        state = optimizer.state.get(parameter)
        if state and len(parameter) == sae.config.n_latents:
            state["exp_avg"][index] = 0
            state["exp_avg_sq"][index] = 0


def optimizer_tensors(sae: SAE, optimizer: torch.optim.Adam) -> dict[str, Tensor]:
    """Adam's state as named tensors, for a safetensors file."""
    return {
        f"adam.{name}.{key}": value
        for name, parameter in sae.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(sae: SAE, optimizer: torch.optim.Adam, tensors: dict[str, Tensor]) -> None:
    """Restore what `optimizer_tensors` returned."""
    for name, parameter in sae.named_parameters():
        optimizer.state[parameter] = {
            key: tensors[f"adam.{name}.{key}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")
        }
