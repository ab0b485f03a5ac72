"""The quality of an SAE by kind of token: fvu, l0, cosine, and how often latents fire. Sums are float64."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from actcache import HookPoint, SettingsError, open_stores
from actcache.store import StoreGroup, Stores
from saetrain.config import Tokens
from saetrain.model import SAE
from saetrain.quality import Quality, TokenQuality

DENSE = 0.1
"""A latent is dense if it fires on more than this share of the tokens."""


class _Sums:
    """Running sums over the rows of one kind of token."""

    def __init__(self, d_model: int) -> None:
        self.count, self.active = 0, 0
        self.error, self.cosine, self.squares = 0.0, 0.0, 0.0
        self.total = torch.zeros(d_model, dtype=torch.float64)

    def add(self, x: Tensor, reconstruction: Tensor, n_active: int) -> None:
        x64, r64 = x.double(), reconstruction.double()
        self.count += len(x)
        self.active += n_active
        self.error += float((x64 - r64).square().sum())
        self.squares += float(x64.square().sum())
        self.total += x64.sum(0)
        self.cosine += float(F.cosine_similarity(x64, r64).sum())

    def result(self) -> TokenQuality:
        variance = self.squares - float(self.total.square().sum()) / self.count
        return {
            "fvu": self.error / max(variance, 1e-12),
            "l0": self.active / self.count,
            "cosine": self.cosine / self.count,
        }


@torch.no_grad()
def evaluate(
    sae: SAE, store: Stores | StoreGroup, hook_point: HookPoint, images: Iterable[int], *, tokens: Tokens = "all"
) -> Quality:
    """Measure the quality of an SAE on some images of a store.

    The mean in the fvu is taken over the same tokens (centered; 1 - R^2). Of a store without CLS all tokens are
    patches, and only these are in the result.
    """
    store = open_stores(store)
    tokens = store.layout.token_kind(tokens)
    positions = np.array([image for image in images if store.valid[image]], dtype=np.int64)
    if not len(positions):
        raise SettingsError(f"No readable image of {store.path} is held out. Extract more images.")
    kinds: tuple[Tokens, ...] = ("all", "cls", "patch") if tokens == "all" else (tokens,)
    sums = {kind: _Sums(sae.d_model) for kind in kinds}
    fired = torch.zeros(sae.config.n_latents, dtype=torch.int64)
    step = store.layout.chunk_images
    for first in range(0, len(positions), step):
        part = store.read(hook_point, images=positions[first : first + step], tokens=tokens, check=store.checks_cheaply)
        n_images, n_tokens, d_model = part.shape
        x = torch.from_numpy(part.reshape(-1, d_model))
        rows, latents, values = sae.encode(x)
        reconstruction = sae.decode(rows, latents, values, len(x), like=x)
        fired += torch.bincount(latents, minlength=len(fired))
        per_row = torch.bincount(rows, minlength=len(x)).view(n_images, n_tokens)
        is_cls = (torch.arange(len(x)) % n_tokens) == 0  # where CLS is read together with patches, it comes first
        for kind in kinds:
            mask = _kind_mask(kind, tokens, is_cls)
            sums[kind].add(x[mask].float(), reconstruction[mask], int(per_row.flatten()[mask].sum()))
    count = max(total.count for total in sums.values())
    by_kind: dict[Tokens, TokenQuality] = {kind: total.result() for kind, total in sums.items()}
    return {
        **by_kind,  # type: ignore[typeddict-item]
        "silent": float((fired == 0).float().mean()),
        "dense": float((fired > DENSE * count).float().mean()),
        "n_tokens": count,
    }


def _kind_mask(kind: str, tokens: str, is_cls: Tensor) -> Tensor:
    if kind == tokens:
        return torch.ones_like(is_cls)
    return is_cls if kind == "cls" else ~is_cls
