"""Parity: how closely an SAE of ours and the checkpoint that it was read from agree on rows of activations.

The foreign side is computed from the files by the formulas of their package (`formulas/`), which share nothing with our
readers but the bytes. A difference beyond float32 rounding is an error.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actcache import CorruptError, HookPoint, SettingsError, open_stores
from saetrain.interop.formulas.forward import Forward
from saetrain.model import SAE

N_ROWS = 1024
TOLERANCE = 1e-3
"""Largest difference of a reconstruction relative to the norm of its row, and largest share of active entries that may
differ, because they are at a threshold."""


@dataclass(frozen=True)
class Parity:
    """How well two SAEs agree on rows of activations.

    Attributes:
        rows: `activations`, or `random` if no store was given.
        active_agreement: number of entries active in both, over the number active in either.
        max_code_difference: largest difference of an entry, relative to the largest value.
        max_reconstruction_difference: largest difference of a reconstruction, relative to the norm of its row.
        fvu_ours, fvu_foreign: centered fvu on these rows.
    """

    rows: str
    n_rows: int
    active_agreement: float
    max_code_difference: float
    max_reconstruction_difference: float
    fvu_ours: float
    fvu_foreign: float

    @property
    def holds(self) -> bool:
        """Whether the two are taken for the same SAE."""
        return self.max_reconstruction_difference <= TOLERANCE and self.active_agreement >= 1 - TOLERANCE


def read_rows(sae: SAE, store: Any, hook_point: int | HookPoint | None) -> tuple[Tensor, str]:
    """Rows [N, D] in float32 to compare on, and what kind they are."""
    if store is None:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(N_ROWS, sae.d_model, generator=generator)
        return sae.denormalize(rows, like=rows), "random"
    group = open_stores(store)
    images = group.valid.nonzero()[0][: 1 + N_ROWS // group.n_read_tokens("all")]
    values = group.read(group.hook_point(hook_point), images=images, check=group.checks_cheaply)
    if values.shape[-1] != sae.d_model:
        raise SettingsError(
            f"{group.path} holds activations of width {values.shape[-1]}, but the SAE reads width {sae.d_model}. "
            "Give a store of the model it was trained on."
        )
    return torch.from_numpy(values.reshape(-1, values.shape[-1])[:N_ROWS]).float(), "activations"


@torch.no_grad()
def compare(sae: SAE, forward: Forward, x: Tensor, name: str) -> Parity:
    """Make the parity report. Raises CorruptError if the two sides disagree."""
    both, either, n_negative, code_difference, largest, reconstruction_difference = 0, 0, 0, 0.0, 1e-12, 0.0
    errors = torch.zeros(2, dtype=torch.float64)
    for part in torch.split(x, 256):
        rows, latents, values = sae.encode(part)
        ours = torch.zeros(len(part), sae.config.n_latents).index_put_((rows, latents), values)
        decoded = sae.decode(rows, latents, values, len(part), like=part)
        if sae.norms is not None:  # in the units of the other package
            ours = ours / sae.norms
        theirs, foreign = forward(part)
        both += int(((ours != 0) & (theirs != 0)).sum())
        either += int(((ours != 0) | (theirs != 0)).sum())
        n_negative += int((theirs < 0).sum())
        code_difference = max(code_difference, float((ours - theirs).abs().max()))
        largest = max(largest, float(theirs.abs().max()))
        relative = (decoded - foreign).norm(dim=1) / part.norm(dim=1).clamp_min(1e-6)
        reconstruction_difference = max(reconstruction_difference, float(relative.max()))
        errors += torch.stack([(part - other).double().square().sum() for other in (decoded, foreign)])
    fvu = errors / (x.double() - x.double().mean(0)).square().sum().clamp_min(1e-12)
    parity = Parity(
        rows=name, n_rows=len(x), active_agreement=both / max(either, 1) if either else 1.0,
        max_code_difference=code_difference / largest, max_reconstruction_difference=reconstruction_difference,
        fvu_ours=float(fvu[0]), fvu_foreign=float(fvu[1]),
    )  # fmt: skip
    if not parity.holds:
        why = (
            f" {n_negative:,} codes of the other package are negative, which is impossible here." if n_negative else ""
        )
        raise CorruptError(
            f"The two SAEs disagree: their reconstructions differ by {parity.max_reconstruction_difference:.2g} of the "
            f"norm of a row (at most {TOLERANCE:g} is allowed), and {parity.active_agreement:.2%} of their active "
            f"entries are the same.{why} Nothing was written. Check that the checkpoint is complete."
        )
    return parity
