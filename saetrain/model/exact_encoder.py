"""Exact float32 codes, faster than a float32 product: bfloat16 finds the candidates; an exact dot product decides.

`make_encoder` turns an SAE into an `Encoder`, which computes the same as `SAE.encode`, up to the last bits of a float32
dot product (decision 12). Let u = 2^-8 be the rounding of bfloat16, x and w the float32 vectors, and x~ and w~ the
rounded ones. A pre-activation z = <x, w> + b and its coarse value then differ by at most

    e = ||x - x~|| ||w|| + ||x~|| ||w - w~|| + D 2^-23 ||x|| ||w|| + u |b|, and 3 u |z| of the result's own rounding

where the norms of the differences are computed instead of bounded, which gives a third of the worst case. A latent
whose coarse value is further than that below its threshold is not active. The others, a few times as many as are
active, are evaluated again.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from actcache.models import has_cpu_bfloat16
from saetrain.model.active_latents import BLOCK_ROWS, Blocks, Code, Entries, group_size, join, largest
from saetrain.model.sae import SAE
from saetrain.model.sparse import csr

Encoder = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""Activations [B, D] -> active entries (row, latent, value), like SAE.encode."""

U = 2.0**-8
MAX_SHARE = 1 / 16
"""Share of candidates among all entries above which the float32 product is faster."""

BATCH_ROWS = 4096


def encoder_bytes(n_latents: int, d_model: int) -> int:
    """The least memory of an SAE that encodes: both matrices in float32, and the encoder again in bfloat16."""
    return n_latents * d_model * (4 + 4 + (2 if has_cpu_bfloat16() else 0))


def make_encoder(sae: SAE) -> Encoder:
    """Make the fastest encoder for this machine: CoarseEncoder on a CPU that multiplies bfloat16, else `SAE.encode`."""
    if sae.mean.device.type == "cpu" and has_cpu_bfloat16():
        return CoarseEncoder(sae)
    return lambda x: sae.encode(x.to(sae.mean.device))


class CoarseEncoder:
    """The encoder that the module describes. It holds a second copy of the weights, in bfloat16."""

    def __init__(self, sae: SAE) -> None:
        self.sae, (self.weight, self.bias) = sae, sae.encoder_weights()
        self.coarse = self.weight.bfloat16()
        self.k = sae.config.k if sae.variant.exact_k else None
        self.threshold = sae.variant.floor(sae)
        self.offset = self.bias - self.threshold
        self.norm = float(self.weight.norm(dim=1).max())
        self.rest = float((self.weight - self.coarse.float()).norm(dim=1).max())
        self.bound = float(self.offset.abs().max())
        self.dense = False

    @torch.no_grad()
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.dense or not len(x):
            return self.sae.encode(x)
        parts = []
        for first in range(0, len(x), BATCH_ROWS):
            part = self._encode(x[first : first + BATCH_ROWS], first)
            if part is None:
                self.dense = True
                return self.sae.encode(x)
            parts.append(part)
        rows, latents, values = (torch.cat(column) for column in zip(*parts, strict=True))
        return rows, latents, values

    def _encode(self, x: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor] | None:
        sae = self.sae
        centered = sae.encoder_inputs(x)
        code = self._candidates(centered)
        if code is None:
            return None
        starts, order = code.by_latent(len(self.coarse))
        latents = code.latents[order]
        pattern = csr(starts, code.rows[order], torch.zeros(len(order)), (len(self.coarse), len(x)))
        product = torch.sparse.sampled_addmm(pattern, self.weight, centered.T, beta=0.0).values()
        z = torch.empty_like(product)
        z[order] = product + self.bias[latents]
        rows, latents = code.rows, code.latents
        limit = self.threshold[latents] if self.threshold.ndim else self.threshold
        kept = z > limit
        rows, latents, z = rows[kept], latents[kept], z[kept]
        if self.k is not None and len(z):
            top = largest(rows.numpy(), z.view(torch.int32).numpy(), len(x), self.k)
            rows, latents, z = rows[top], latents[top], z[top]
        values = sae.activate(z, latents)
        active = values > 0
        return rows[active] + first, latents[active], values[active]

    def _candidates(self, centered: Tensor) -> Code | None:
        """Every entry that may be active, or None if there are too many. All values are raised by a constant, so that
        the compared numbers are positive."""
        rounded = centered.bfloat16()
        norm, rest = centered.norm(dim=1), (centered - rounded.float()).norm(dim=1)
        slack = centered.shape[1] * 2.0**-23
        error = (rest * self.norm + (norm + rest) * self.rest + slack * norm * self.norm + U * self.bound) * 1.01
        lift = (
            2 * float(torch.minimum(error.max(), 4 * error.median())) + 1e-6
        )  # rows with a larger error are compared as signed numbers
        error += 2 * U * lift
        blocks = Blocks(rounded, self.coarse, self.offset + lift, True)
        n_latents, candidates, n_found, n_searched = len(self.coarse), list[Entries](), 0, 0
        size = group_size(n_latents, self.k or 1)
        for number, z in enumerate(blocks):
            e = error[number * BLOCK_ROWS :][: len(z)]
            floor = (lift - e) * (1 - 3 * U)
            if self.k is not None:
                floor = torch.maximum(floor, (self._bound(z, size) / (1 + 3 * U) - 2 * e) * (1 - 3 * U))
            found = blocks.above(z, (floor * (1 - 2 * U))[:, None])  # still a lower bound when rounded to bfloat16
            candidates += found
            n_found, n_searched = n_found + sum(len(part.latents) for part in found), n_searched + z.numel()
            if n_found > MAX_SHARE * n_searched:
                return None
        return join(candidates)

    def _bound(self, z: Tensor, size: int) -> Tensor:
        """A lower bound [b] of the k-th largest entry of each row: the k-th largest maximum of disjoint groups."""
        assert self.k is not None
        if size:  # positive numbers have the same order as their bits, and negative ones come before them
            maxima = z.view(torch.int16).view(len(z), size, -1).amax(1).topk(self.k, dim=1, sorted=False).values
            return maxima.amin(1).clamp_(min=0).view(torch.bfloat16).float()
        return z.topk(min(self.k, z.shape[1]), dim=1, sorted=False).values.amin(1).float()
