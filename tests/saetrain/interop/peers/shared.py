"""What the scripts of this folder share. They run in an environment of benchmarks/peers-env.sh, with the packages.

Each is called `python write_PACKAGE.py ROWS.npy OUT`. For every SAE that it makes with its package it leaves the folder
OUT/NAME, as the package writes it, and OUT/NAME.npz: the codes and reconstructions that the package computes of the
rows, from that folder.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

D, F, K = 32, 40, 5


def read_arguments() -> tuple[Tensor, Path]:
    """(rows [N, D] float32, the folder to write into)."""
    return torch.from_numpy(np.load(sys.argv[1])), Path(sys.argv[2])


@torch.no_grad()
def shake(module: nn.Module, by: float = 0.2) -> None:
    """Move every parameter away from its initial value, the same way every time."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter += by * torch.randn(parameter.shape, generator=generator)


def keep(out: Path, name: str, codes: Tensor, decoded: Tensor) -> None:
    """Write OUT/NAME.npz: codes [N, F] and reconstructions [N, D]."""
    np.savez(out / f"{name}.npz", codes=codes.detach().numpy(), decoded=decoded.detach().numpy())
