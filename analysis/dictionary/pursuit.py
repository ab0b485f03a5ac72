"""The best sparse code that is cheaply found: orthogonal matching pursuit with values that are not negative.

In: rows x [B, D], a dictionary with unit rows [F, D], how many latents each row may use. Out: reconstructions [B, D].
An SAE has one matrix product to choose latents and values; this looks at what is left after every choice. Codes of our
SAEs are not negative, so neither are these. Rows are worked on in blocks: no (B, F) array.

Source: Pati et al. 1993 for the pursuit; Bruckstein et al. 2008 for not negative values. The values are the
nonnegative least squares of the chosen latents, by coordinate descent on their K x K products.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK_ROWS = 256
N_SWEEPS = 200
TOLERANCE = 1e-5
"""Of a row's norm: coordinate descent ends when no value moves by more."""


@torch.no_grad()
def pursue(x: Tensor, dictionary: Tensor, n_active: Tensor) -> tuple[Tensor, Tensor]:
    """Reconstruct each row from at most `n_active` [B] latents, chosen one after the other.

    Returns:
        (reconstructions [B, D], latents used [B]): fewer where no latent points to what is left.
    """
    blocks = zip(torch.split(x, BLOCK_ROWS), torch.split(n_active, BLOCK_ROWS), strict=True)
    parts = [_pursue_block(rows, n, dictionary) for rows, n in blocks]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _pursue_block(x: Tensor, n_active: Tensor, dictionary: Tensor) -> tuple[Tensor, Tensor]:
    n_steps = int(n_active.max()) if len(x) else 0
    atoms = x.new_zeros(len(x), n_steps, x.shape[1])  # one that is not chosen is 0
    values = x.new_zeros(len(x), n_steps)
    chosen = torch.zeros(len(x), n_steps, dtype=torch.int64, device=x.device)
    residual, least = x, 1e-6 * x.norm(dim=1)
    for step in range(n_steps):
        products = residual @ dictionary.T
        products.scatter_(1, chosen[:, :step], -torch.inf)
        best, latent = products.max(1)
        grows = (step < n_active) & (best > least)
        chosen[:, step] = torch.where(grows, latent, chosen[:, 0] if step else latent)
        atoms[:, step] = dictionary[latent] * grows[:, None]
        values[:, : step + 1] = fit_values(x, atoms[:, : step + 1], values[:, : step + 1])
        residual = x - _combine(values, atoms)
    return x - residual, (values > 0).sum(1)


@torch.no_grad()
def refit(x: Tensor, dictionary: Tensor, rows: Tensor, latents: Tensor) -> Tensor:
    """Reconstruct each row from the latents that are active already, with the best values.

    Args:
        rows, latents: [N] active entries, sorted by row.
    """
    counts = torch.bincount(rows, minlength=len(x))
    starts = F.pad(counts.cumsum(0), (1, 0))
    parts = []
    for first in range(0, len(x), BLOCK_ROWS):
        stop = min(first + BLOCK_ROWS, len(x))
        entries = slice(int(starts[first]), int(starts[stop]))
        row = rows[entries]
        atoms = x.new_zeros(stop - first, int(counts[first:stop].max()), x.shape[1])
        atoms[row - first, torch.arange(entries.start, entries.stop, device=x.device) - starts[row]] = dictionary[
            latents[entries]
        ]
        parts.append(_combine(fit_values(x[first:stop], atoms, x.new_zeros(atoms.shape[:2])), atoms))
    return torch.cat(parts)


def fit_values(x: Tensor, atoms: Tensor, values: Tensor) -> Tensor:
    """Nonnegative least squares of x [B, D] on atoms [B, K, D], from `values` [B, K] on; an atom of 0 gets 0."""
    gram = atoms @ atoms.transpose(1, 2)
    target = (atoms @ x[:, :, None])[:, :, 0]
    scale = gram.diagonal(dim1=1, dim2=2)
    step = torch.where(scale > 0, 1 / scale.clamp_min(1e-12), 0.0)
    values, enough = values.clone(), TOLERANCE * x.norm(dim=1)
    for _ in range(N_SWEEPS):
        moved = torch.zeros_like(enough)
        for i in range(values.shape[1]):
            slope = target[:, i] - (gram[:, i] * values).sum(1)
            new = (values[:, i] + slope * step[:, i]).clamp_min(0)
            moved = torch.maximum(moved, (new - values[:, i]).abs())
            values[:, i] = new
        if (moved <= enough).all():
            break
    return values


def _combine(values: Tensor, atoms: Tensor) -> Tensor:
    return (values[:, None] @ atoms)[:, 0]
