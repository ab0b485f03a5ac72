"""Loads what we wrote with the packages themselves: `python read_exports.py ROWS.npy OUT FORMAT`.

Every folder in OUT is an SAE of that format. The codes and reconstructions of the package go to OUT/NAME.npz.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from shared import keep, read_arguments
from torch import Tensor

Compute = Callable[[Path, Tensor], tuple[Tensor, Tensor]]


def saelens(path: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    from sae_lens import SAE

    sae = SAE.load_from_disk(path, device="cpu")
    codes = sae.encode(x)
    return codes, sae.decode(codes)


def dictionary_learning(path: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    from dictionary_learning.utils import load_dictionary

    sae, _ = load_dictionary(str(path), device="cpu")
    codes = sae.encode(x)
    return codes, sae.decode(codes)


def sparsify(path: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    from sparsify import SparseCoder

    sae = SparseCoder.load_from_disk(path)
    found = sae.encode(x)
    codes = torch.zeros(len(x), sae.num_latents).scatter_(1, found.top_indices, found.top_acts)
    return codes, sae.decode(found.top_acts, found.top_indices)


if __name__ == "__main__":
    x, out = read_arguments()
    compute: Compute = {"saelens": saelens, "dictionary_learning": dictionary_learning, "sparsify": sparsify}[
        sys.argv[3]
    ]
    with torch.no_grad():
        for folder in sorted(path for path in out.iterdir() if path.is_dir()):
            keep(out, folder.name, *compute(folder, x))
