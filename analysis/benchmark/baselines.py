"""Baselines as SAEs of ours, so that every measure reads them as it reads a run: from sparse codes and a dictionary.

    untrained   the configuration, initial weights and normalization of a run, with as many active latents
    pca         +v and -v of every principal direction v; a token keeps the k coefficients that are largest in size
    raw         the same with the dimensions of the centered stream in place of principal directions
    k-means     unit directions, one per token, with the token's product with it as the value

A topk SAE with both signs of orthonormal directions keeps exactly the k largest |coefficients|: of v and -v only one
has a positive product. Sources: Heap et al. 2025 (arXiv 2501.17727) for untrained SAEs beside trained ones; saev's
trait_discovery (arXiv 2511.17735) for PCA by |coefficient| and k-means.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saetrain import SAE, Run, SAEConfig
from saetrain.model import select_batch_topk

N_L0 = 4096
"""Tokens on which L0 is measured to set a floor, at most."""


def make_signed(mean: NDArray[np.float64], directions: NDArray[np.float64], k: int) -> SAE:
    """A topk SAE whose latents are +v and -v of orthonormal directions.

    Args:
        mean: [D], which is subtracted first.
        directions: [K', D] rows.
        k: number of coefficients that a token keeps; all of them where there are no more than k.
    """
    both = np.concatenate([directions, -directions])
    return _make_dictionary(mean, torch.from_numpy(both).float(), min(k, len(directions)))


def make_clusters(mean: NDArray[np.float64], centroids: Tensor) -> SAE:
    """A topk SAE with k = 1 and unit directions [K, D]."""
    return _make_dictionary(mean, centroids, 1)


@torch.no_grad()
def _make_dictionary(mean: NDArray[np.float64], rows: Tensor, k: int) -> SAE:
    config = SAEConfig(variant="topk", n_latents=len(rows), k=k).resolve(rows.shape[1])
    sae = SAE(config, rows.shape[1])
    sae.decoder.copy_(rows)
    sae.encoder.copy_(rows)
    sae.mean.copy_(torch.from_numpy(mean))
    return sae.requires_grad_(False).eval()


@torch.no_grad()
def make_untrained(run: Run, x: Tensor, l0: float) -> SAE:
    """An SAE of a run's configuration with its initial weights, and its normalization of the input.

    topk needs nothing else. Elsewhere the floor above which a latent is active is set so that `l0` latents of a token
    are active on average; relu and gated have no floor, there the bias of the encoder is lowered instead.

    Args:
        x: [n, D] activations of choosing images.
    """
    trained = run.sae()
    sae = SAE(trained.config, run.d_model, seed=run.train_config.seed)
    sae.mean.copy_(trained.mean)
    sae.scale.copy_(trained.scale)
    if not sae.variant.exact_k:
        floor = find_floor(sae, x, l0)
        if sae.config.variant in ("batchtopk", "jumprelu"):
            sae.threshold.fill_(floor)
        else:
            sae.b_enc.sub_(floor)
    return sae.requires_grad_(False).eval()


def find_floor(sae: SAE, x: Tensor, l0: float) -> float:
    """The pre-activation above which `l0` latents of a token lie on average; at least 0."""
    inputs, (weight, bias) = sae.encoder_inputs(x), sae.encoder_weights()
    n_wanted, most = round(l0 * len(x)), sae.config.n_latents
    code, _ = select_batch_topk(inputs, weight, bias, min(int(l0) + 1, most), 0.0)
    values = code.values[code.values > 0]
    if len(values) <= n_wanted:
        return 0.0
    return float(values.topk(n_wanted + 1, sorted=True).values[-1])


def measure_l0(sae: SAE, x: Tensor) -> float:
    """Mean number of active latents of activations [n, D]."""
    return len(sae.encode(x)[0]) / len(x)
