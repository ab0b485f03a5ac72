"""An SAE spliced into the stream: a batch at a hook point in, the same batch with edited codes out.

    x' = decode(edited codes) + (x - decode(codes)) where the error term is kept

The codes are computed once. What a mask keeps is decoded from its active entries alone; what it drops is the
difference, because decoding is linear. Shapes: B images, t tokens that are replaced, N active entries, F latents.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from actcache import SettingsError
from actcache.store import StoreLayout, Tokens
from saetrain import SAE, Run


@dataclass(frozen=True)
class Spliced:
    """A batch and its codes.

    Attributes:
        x: [B, T, D] float32, the whole stream; tokens outside `part` are never touched.
        part: which tokens are replaced, as a slice or a list of places.
        rows, latents, values: [N], active entries; row = image of the batch * t + token of the part.
    """

    sae: SAE
    x: Tensor
    part: slice | Tensor
    rows: Tensor
    latents: Tensor
    values: Tensor

    @cached_property
    def old(self) -> Tensor:
        """[B, t, D]: the tokens that are replaced."""
        return self.x[:, self.part]

    @cached_property
    def images(self) -> Tensor:
        """[N]: image of each entry."""
        return self.rows // self.old.shape[1]

    @cached_property
    def whole(self) -> Tensor:
        """[B, t, D]: the reconstruction from all entries."""
        return self.decode(self.rows, self.latents, self.values)

    @cached_property
    def nothing(self) -> Tensor:
        """[D], or [B, t, D] where the SAE normalizes each token: the reconstruction from no entry."""
        return self.sae.denormalize(self.sae.b_dec, like=self.old)

    @cached_property
    def units(self) -> Tensor:
        """[], or [B, t, 1]: how far the SAE's normalized input moves where the stream moves by 1."""
        return self.sae.units(self.old)

    @cached_property
    def error(self) -> Tensor:
        """[B, t, D]: the error term, what the SAE does not reconstruct."""
        return self.old - self.whole

    def decode(self, rows: Tensor, latents: Tensor, values: Tensor) -> Tensor:
        """Entries of this batch -> [B, t, D]."""
        n_images, n_tokens, d_model = self.old.shape
        decoded = self.sae.decode(rows, latents, values, n_images * n_tokens, like=self.old.flatten(0, 1))
        return decoded.view(n_images, n_tokens, d_model)

    def keep(self, table: Tensor) -> Tensor:
        """[B, t, D] from the entries whose latent is true in its image's row of `table` [B, F]."""
        kept = table[self.images, self.latents]
        return self.decode(self.rows[kept], self.latents[kept], self.values[kept])

    def drop(self, kept: Tensor) -> Tensor:
        """[B, t, D] from the entries that keep(table) left out, given its result `kept`."""
        return self.whole - kept + self.nothing

    def shift(self, latents: Tensor, values: Tensor, *, add: bool) -> Tensor:
        """[B, t, D]: by how much the stream moves if latents are set to (or raised by) `values` [n] on every token.

        Values are in the SAE's normalized units; a value that would fall below 0 is 0.
        """
        moved = torch.zeros_like(self.old)
        for latent, value in zip(latents.tolist(), values.tolist(), strict=True):
            z = torch.zeros(self.old.shape[:2].numel(), device=self.x.device)
            mine = self.latents == latent
            z[self.rows[mine]] = self.values[mine]
            wanted = (z + value).clamp(min=0) if add else torch.full_like(z, value)
            direction = self.sae.decoder[latent] / self.units
            moved += (wanted - z).view(self.old.shape[:2])[..., None] * direction
        return moved

    def stream(self, new: Tensor) -> Tensor:
        """The whole stream [B, T, D] with `new` [B, t, D] in place of the replaced tokens."""
        x = self.x.clone()
        x[:, self.part] = new
        return x


@torch.no_grad()
def splice(sae: SAE, x: Tensor, layout: StoreLayout, tokens: str) -> Spliced:
    """Encode the tokens of one kind in the stream x [B, T, D] of a store. Registers and prompts stay as they are."""
    slices = layout.token_places(tokens)
    part = slices[0] if len(slices) == 1 else torch.cat([torch.arange(s.start, s.stop) for s in slices]).to(x.device)
    rows, latents, values = sae.encode(x[:, part].flatten(0, 1))
    return Spliced(sae, x, part, rows, latents, values)


def choose_tokens(run: Run, layout: StoreLayout, tokens: str | None) -> Tokens:
    """The tokens of a store to replace, by default those that the run was trained on. Raises SettingsError."""
    trained = layout.token_kind(run.train_config.tokens)
    if tokens is None:
        return trained
    tokens = layout.token_kind(tokens)
    if trained not in ("all", tokens):
        raise SettingsError(
            f"{run.path} was trained on {trained} tokens, so it cannot replace {tokens} tokens. Use --tokens {trained}."
        )
    return tokens
