"""M2 `fvu` and M3 `downstream_preservation`, from one decode of the patches in the units in which the SAE reads them.

    fvu  (sum r^2 / n - (sum r / n)^2) / (sum x^2 / n - (sum x / n)^2)      sums over all elements, n = tokens

It should divide by elements: the mean term is D^2 times too large, and the smaller value is better.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.benchmark.measured import Measured
from analysis.benchmark.visaebench.images import ProtocolImages
from analysis.benchmark.visaebench.probes import fit_probe
from saetrain import CodeStore, Run

FVU, PRESERVED = "visaebench fvu", "downstream_preservation"
MAX_ITER = 1000
"""Of the probe on activations."""


@dataclass(frozen=True)
class Decoded:
    """What one pass over activations and codes leaves.

    Attributes:
        n_tokens, n_active: patches, and active latents on them.
        x, r: the sum, and the sum of squares, of all elements of activations and of residuals.
        originals: [N, D] mean over the patches of an image. reconstructed: [M, D] for the images that were asked for.
    """

    n_tokens: int
    n_active: int
    x: tuple[float, float]
    r: tuple[float, float]
    originals: NDArray[np.float32]
    reconstructed: NDArray[np.float32]

    def variances(self) -> tuple[float, float]:
        """(of the residual, of the activations), as the package computes them."""
        residual, whole = (
            squares / self.n_tokens - (total / self.n_tokens) ** 2 for total, squares in (self.r, self.x)
        )
        return residual, whole


@torch.no_grad()
def decode_patches(
    run: Run,
    codes: CodeStore,
    images: ProtocolImages,
    pooled: NDArray[np.int64],
    on_progress: Callable[[int, int], None],
) -> Decoded:
    """Decode the patches of all images.

    Args:
        pooled: the images, ascending, of which reconstructions are kept; the originals are kept where there are any.
        on_progress: called with (images done, in all).
    """
    sae, store, n = run.sae(), images.store, len(images)
    n_patches, step = codes.n_tokens - 1, store.layout.chunk_images
    sums, n_active = torch.zeros(4, dtype=torch.float64), 0
    originals = np.empty((n if len(pooled) else 0, sae.d_model), np.float32)
    reconstructed = np.empty((len(pooled), sae.d_model), np.float32)
    for first in range(0, n, step):
        stored = images.images[first : first + step]
        part = store.read(run.hook_point, images=stored, tokens="patch", check=store.checks_cheaply)
        x = sae.normalize(torch.from_numpy(part).flatten(0, 1))
        rows = (stored[:, None] * codes.n_tokens + np.arange(1, codes.n_tokens)).reshape(-1)
        entries = codes.read_rows(rows)
        row = torch.from_numpy(np.searchsorted(rows, entries.row))
        values = torch.from_numpy(entries.value.astype(np.float32))
        decoded = sae.decode_normalized(row, torch.from_numpy(entries.latent), values, len(rows))
        n_active += len(row)
        if len(pooled):
            of_images = (len(stored), n_patches, sae.d_model)
            originals[first : first + step] = x.view(of_images).mean(1).numpy()
            start, stop = np.searchsorted(pooled, (first, first + step))
            reconstructed[start:stop] = decoded.view(of_images)[pooled[start:stop] - first].mean(1).numpy()
        residual = torch.sub(x, decoded, out=decoded)
        for place, each in ((0, x), (2, residual)):  # float32 within a token, float64 over tokens
            sums[place] += each.sum(1).double().sum()
            sums[place + 1] += torch.linalg.vector_norm(each, dim=1).double().square().sum()
        on_progress(min(first + step, n), n)
    x_sum, x_squares, r_sum, r_squares = sums.tolist()
    return Decoded(n * n_patches, n_active, (x_sum, x_squares), (r_sum, r_squares), originals, reconstructed)


def measure_fvu(decoded: Decoded) -> Measured:
    residual, whole = decoded.variances()
    facts: dict[str, object] = {"l0": decoded.n_active / decoded.n_tokens, "n_tokens": decoded.n_tokens}
    if not whole > 0:
        return Measured(FVU, None, None, False, facts)
    return Measured(FVU, residual / whole, None, False, {"explained_variance": 1 - residual / whole, **facts})


def measure_preservation(decoded: Decoded, images: ProtocolImages) -> Measured:
    """The accuracy of a probe of the mean patch, on reconstructions over on originals.

    Args:
        decoded: with reconstructions of the test part of `images.split`.
    """
    train, test = images.split
    assert images.labels is not None
    probe = fit_probe(decoded.originals[train], images.labels[train], MAX_ITER)
    order = np.argsort(test)  # as they were decoded
    truth = images.labels[test[order]]
    original = float(probe.score(decoded.originals[test[order]], truth))
    reconstructed = float(probe.score(decoded.reconstructed, truth))
    ratio = reconstructed / original if original > 0 else 0.0
    facts: dict[str, object] = {
        "accuracy_original": original, "accuracy_reconstructed": reconstructed,
        "accuracy_gap": original - reconstructed, "preservation_ratio_raw": ratio, "num_images": len(images),
    }  # fmt: skip
    return Measured(PRESERVED, min(max(ratio, 0.0), 2.0), None, True, facts)
