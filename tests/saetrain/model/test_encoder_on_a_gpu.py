"""Encoding on a pretend GPU: the entries of the CPU, and a known number of times at which the host waits."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pretend_device import PretendDevice, tell
from torch import Tensor

from saetrain import SAE, Run, SAEConfig, encode
from saetrain.model import make_encoder

F, K, D = 48, 4, 12
VARIANTS = {
    "topk": SAEConfig("topk", F, K),
    "batchtopk": SAEConfig("batchtopk", F, K),
    "relu centered": SAEConfig("relu", F, normalize="center"),
    "jumprelu": SAEConfig("jumprelu", F, K),
    "gated": SAEConfig("gated", F, K),
}
MAY_WAIT = 3
"""For the rows on their way to the GPU, the active entries of a block, and whether all of their values are above 0."""
NOT_ALL_ABOVE_0 = 3


def make(random_sae: Callable[..., SAE], case: str) -> SAE:
    name, _, more = case.partition(", ")
    sae = random_sae(VARIANTS[name], d_model=D)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        if name in ("batchtopk", "jumprelu"):
            sae.threshold.fill_(1.5)
        if name == "gated":
            sae.b_enc.sub_(0.8)
            sae.b_mag.normal_(0.0, 0.3, generator=generator)
        if more == "norms":
            sae.add_optional(["norms"])
            sae.norms.uniform_(0.5, 2.0, generator=generator)  # type: ignore[union-attr]
        if more == "a LayerNorm over the latents":
            sae.add_optional(["latent_gain", "latent_shift"])
            sae.latent_gain.uniform_(0.5, 2.0, generator=generator)  # type: ignore[union-attr]
            sae.latent_shift.normal_(0.0, 0.3, generator=generator)  # type: ignore[union-attr]
    return sae.requires_grad_(False)


def rows(n: int = 600) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", ["cuda", "mps"])
@pytest.mark.parametrize("case", [*VARIANTS, "topk, norms", "relu centered, a LayerNorm over the latents"])
def test_codes_on_a_device_are_those_of_the_cpu(random_sae: Callable[..., SAE], case: str, kind: str) -> None:
    expected = make(random_sae, case).encode(rows())
    decoded = make(random_sae, case).decode(*expected, 600)
    with PretendDevice(kind) as gpu:
        sae = make(random_sae, case).to(kind)
        encoder = make_encoder(sae)
        encoder(rows(10))  # a LayerNorm over the latents computes its weights on first use
        with gpu.watch() as waits:
            found = encoder(rows())
        with gpu.watch() as waits_to_decode:
            back = sae.decode(*found, 600)
        assert all(part.device.type == kind for part in (*found, back))
        on_host = [part.cpu() for part in found]
        torch.testing.assert_close(back.cpu(), decoded, rtol=1e-5, atol=1e-5)
    assert torch.equal(on_host[0], expected[0])
    assert torch.equal(on_host[1], expected[1])
    torch.testing.assert_close(on_host[2], expected[2], rtol=1e-5, atol=1e-6)
    assert len(waits) <= MAY_WAIT + (NOT_ALL_ABOVE_0 if case == "gated" else 0), tell(waits)
    assert not waits_to_decode, tell(waits_to_decode)


def test_a_store_is_encoded_on_a_gpu_as_on_the_cpu(tmp_path: Path, planted_run: Run, planted_store: Path) -> None:
    expected = encode(planted_run, planted_store, tmp_path / "cpu.codes", device="cpu")
    with PretendDevice():
        found = encode(planted_run, planted_store, tmp_path / "gpu.codes", device="cuda")
    for number in range(expected.n_shards):
        ours, theirs = found.read_shard(number), expected.read_shard(number)
        assert np.array_equal(ours.indptr, theirs.indptr)
        assert np.array_equal(ours.latent, theirs.latent)
        np.testing.assert_allclose(ours.value, theirs.value, rtol=2e-3)  # float16
