"""Compiled kernels compute what torch and numpy compute: on empty rows, ties, NaN, a latent that is active everywhere,
and arrays that are not contiguous; and the same bits with any number of threads."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from saetrain import SAE, SAEConfig
from saetrain.model import active_latents, sparse
from saetrain.model.active_latents import Code, select_above, select_topk
from saetrain.model.sparse import preactivations, reconstruct
from saetrain.training import optimizer as update
from saetrain.training.optimizer import Adam, apply_update

pytest.importorskip("numba")
selection: ModuleType = pytest.importorskip("saetrain.model.kernels.selection")

SPECIAL = [0.0, -0.0, 1.0, 2.0, -1.0, float("inf"), float("-inf"), float("nan"), 1e-45, 3e38]


@contextmanager
def without_kernels() -> Iterator[None]:
    with (
        patch.object(active_latents, "find_kernels", lambda name: None),
        patch.object(sparse, "find_kernels", lambda name: None),
        patch.object(update, "find_kernels", lambda name: None),
    ):
        yield


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@st.composite
def blocks(draw: st.DrawFn) -> NDArray[np.float32]:
    """Pre-activations [b, F]: many equal ones, and every special number."""
    shape = draw(st.integers(1, 5)), draw(st.sampled_from([1, 7, 32, 33, 96, 200, 1000]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    numbers = rng.normal(size=shape) if draw(st.booleans()) else rng.integers(-2, 3, shape)
    for special in draw(st.lists(st.sampled_from(SPECIAL), max_size=3)):
        numbers = np.where(rng.random(shape) < draw(st.sampled_from([0.01, 0.5])), special, numbers)
    return numbers.astype(np.float32)


def bits_of(numbers: NDArray[np.float32], half: bool) -> NDArray[np.integer]:
    tensor = torch.from_numpy(numbers)
    return tensor.bfloat16().view(torch.int16).numpy() if half else tensor.view(torch.int32).numpy()


@given(blocks(), st.integers(1, 40), st.booleans(), st.booleans())
def test_the_k_largest_are_those_of_a_stable_sort(
    numbers: NDArray[np.float32], k: int, half: bool, strided: bool
) -> None:
    bits = bits_of(numbers, half)
    if strided:
        bits = np.repeat(bits, 2, axis=1)[:, ::2]
    k = min(k, bits.shape[1])
    latents, values = np.full((len(bits), k), -1), np.zeros((len(bits), k), bits.dtype)
    counts = np.empty(len(bits), np.int64)
    selection.select_largest(bits, k, latents, values, counts)
    for row, line in enumerate(bits):
        wanted = np.argsort(-line.astype(np.int64), kind="stable")[:k]
        wanted = np.sort(wanted[line[wanted] > 0])
        assert latents[row, : counts[row]].tolist() == wanted.tolist()
        assert values[row, : counts[row]].tolist() == line[wanted].tolist()


@given(blocks(), st.sampled_from(["one", "row", "latent"]), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1))
def test_what_is_above_a_floor_is_what_a_comparison_finds(
    numbers: NDArray[np.float32], kind: str, half: bool, strided: bool, seed: int
) -> None:
    bits = bits_of(numbers, half)
    shape = {"one": (1, 1), "row": (len(bits), 1), "latent": (1, bits.shape[1])}[kind]
    floor = bits_of(np.random.default_rng(seed).choice([0, 0.5, 1, 2], shape).astype(np.float32), half)
    if strided:
        bits = np.repeat(bits, 2, axis=1)[:, ::2]
    counts = np.empty(len(bits), np.int64)
    latents, values = selection.select_above(bits, floor, counts)
    rows, wanted = np.nonzero(bits > floor)
    assert latents.tolist() == wanted.tolist()
    assert values.tolist() == bits[rows, wanted].tolist()
    assert counts.tolist() == np.bincount(rows, minlength=len(bits)).tolist()


def test_many_entries_are_kept_when_the_room_for_them_grows() -> None:
    bits = bits_of(np.random.default_rng(0).normal(size=(300, 1000)).astype(np.float32), half=False)
    counts = np.empty(300, np.int64)
    latents, _ = selection.select_above(bits, np.zeros((1, 1), np.int32), counts)
    assert latents.tolist() == np.nonzero(bits > 0)[1].tolist()


@pytest.mark.parametrize("half", [False, True])
def test_selections_are_those_without_kernels(half: bool) -> None:
    n_latents, generator = 256, torch.Generator().manual_seed(0)
    x, encoder = torch.randn(700, 16, generator=generator), torch.randn(n_latents, 16, generator=generator)
    encoder[::7], b_enc = encoder[1::7][: len(encoder[::7])], torch.zeros(n_latents)  # equal pre-activations
    thresholds = torch.rand(n_latents, generator=generator) * 4
    makers = [
        lambda: select_topk(x, encoder, b_enc, 6, bfloat16=half),
        lambda: select_above(x, encoder, b_enc, 2.0, bfloat16=half),
        lambda: select_above(x, encoder, b_enc, thresholds, bfloat16=half),
        lambda: select_above(x, encoder, b_enc, thresholds - 1, bfloat16=half),  # some are negative
    ]
    for make in makers:
        found = make()
        with without_kernels():
            wanted = make()
        for one, other in zip(vars(found).values(), vars(wanted).values(), strict=True):
            assert torch.equal(one, other)


@st.composite
def codes(draw: st.DrawFn) -> tuple[Code, int]:
    """A code of some rows, of which some are empty, and its number of latents; one latent may be active everywhere."""
    n_rows, n_latents = draw(st.integers(1, 9)), draw(st.integers(4, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    active = rng.random((n_rows, n_latents)) < draw(st.sampled_from([0.0, 0.2, 0.9]))
    active[:, 2] |= draw(st.booleans())
    active[0] &= draw(st.booleans())
    rows, latents = map(np.ascontiguousarray, np.nonzero(active))
    values = rng.normal(size=len(rows)).astype(np.float32)
    if draw(st.booleans()):
        values[:1] = np.nan
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n_rows))])
    return Code(*map(torch.from_numpy, (starts, latents, values))), n_latents


def tensors(shape: tuple[int, int], generator: torch.Generator, strided: bool) -> Tensor:
    wide = torch.randn(shape[0], shape[1] * (2 if strided else 1), generator=generator)
    return wide[:, ::2] if strided else wide


def gradients_of(
    code: Code, n_latents: int, width: int, strided: bool, prefixes: tuple[int, ...], trained: bool, by_row: bool
) -> list[Tensor]:
    """Error, residual and all gradients of one step's sums over entries."""
    generator = torch.Generator().manual_seed(3)
    n_rows = len(code.starts) - 1
    x = tensors((n_rows, width), generator, strided)
    encoder, decoder = (tensors((n_latents, width), generator, strided).requires_grad_() for _ in range(2))
    b_enc, b_dec = (torch.randn(n, generator=generator).requires_grad_() for n in (n_latents, width))
    weight = torch.rand(n_rows, generator=generator) if by_row else torch.tensor(0.3)
    values = preactivations(x, b_dec, encoder, b_enc, code) * 1.5
    error, residual = reconstruct(values, decoder, b_dec, x, weight, code, prefixes=prefixes, trained=trained)
    torch.autograd.backward(2 * error + values.sum())
    grads = [parameter.grad for parameter in (encoder, decoder, b_enc, b_dec)]
    return [error.detach(), residual, *(torch.zeros(()) if grad is None else grad for grad in grads)]


@given(codes(), st.sampled_from([1, 8, 37]), st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_errors_and_gradients_are_those_of_torch(
    code_and_size: tuple[Code, int], width: int, strided: bool, nested: bool, trained: bool, by_row: bool
) -> None:
    code, n_latents = code_and_size
    arguments = n_latents, width, strided, (1, 3, n_latents) if nested else (), trained, by_row
    found = gradients_of(replace(code), *arguments)
    with without_kernels():
        wanted = gradients_of(replace(code), *arguments)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, equal_nan=True)


@given(codes(), st.booleans())
def test_the_number_of_threads_changes_no_bit(code_and_size: tuple[Code, int], nested: bool) -> None:
    code, n_latents = code_and_size
    arguments = n_latents, 37, False, (1, 3, n_latents) if nested else (), True, True
    made = []
    for n in (1, 2, 5):
        with threads(n):
            made.append(gradients_of(replace(code), *arguments))
    for other in made[1:]:
        for one, two in zip(made[0], other, strict=True):
            assert np.array_equal(one.numpy(), two.numpy(), equal_nan=True)


@pytest.mark.parametrize("clip", [0.0, 1e-3, 1e3])
@pytest.mark.parametrize("variant", ["topk", "jumprelu", "gated"])
def test_updates_are_those_of_torchs_adam(variant: str, clip: float) -> None:
    def trained() -> tuple[SAE, Adam]:
        sae = SAE(SAEConfig(variant, 50, 3, target_l0=3.0 if variant != "topk" else None).resolve(19), 19)
        optimizer, generator = Adam(sae), torch.Generator().manual_seed(1)
        for step in range(6):
            for parameter in sae.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator) * (step % 3)
                parameter.grad[::4] = 0
            apply_update(sae, optimizer, learning_rate=1e-2 / (step + 1), clip_norm=clip)
            assert not any(parameter.grad.any() for parameter in sae.parameters())
        return sae, optimizer

    found, state = trained()
    with without_kernels():
        wanted, wanted_state = trained()
    for (name, one), other in zip(found.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)
        for key, value in wanted_state.state[other].items():
            torch.testing.assert_close(state.state[one][key], value, rtol=1e-4, atol=1e-9, msg=f"{name} {key}")
    torch.testing.assert_close(found.decoder.norm(dim=1), torch.ones(50))


@given(
    variant=st.sampled_from(["topk", "jumprelu", "gated"]), n_latents=st.integers(3, 50), d_model=st.integers(1, 19),
    clip=st.sampled_from([0.0, 1e-3, 1e3]), size=st.sampled_from([1e-6, 1.0, 1e6]),
    special=st.sampled_from([0.0, float("nan")]), strided=st.booleans(), n_threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
@example(variant="gated", n_latents=50, d_model=19, clip=1e3, size=1.0, special=0.0, strided=True, n_threads=2, seed=1)
def test_updates_by_drawn_gradients_are_those_of_torchs_adam(
    variant: str, n_latents: int, d_model: int, clip: float, size: float, special: float, strided: bool,
    n_threads: int, seed: int,
) -> None:  # fmt: skip
    """Gradients that are 0 everywhere, or in some rows; that are NaN; and, for the kernels alone, that are views
    of other memory: torch's fused Adam reads those in a wrong order.
    """

    def trained(strided: bool = False) -> tuple[SAE, Adam]:
        target = None if variant == "topk" else 2.0
        sae = SAE(SAEConfig(variant, n_latents, 2, target_l0=target).resolve(d_model), d_model)
        optimizer, generator = Adam(sae), torch.Generator().manual_seed(seed)
        for step in range(4):
            for parameter in sae.parameters():
                grad = torch.randn(*parameter.shape, 2, generator=generator) * size * (step % 3)
                parameter.grad = grad[..., 0] if strided else grad[..., 0].contiguous()
                parameter.grad[::4] = special if step == 2 else 0
            apply_update(sae, optimizer, learning_rate=1e-2 / (step + 1), clip_norm=clip)
            assert not any(parameter.grad.any() for parameter in sae.parameters())
        return sae, optimizer

    with threads(n_threads):
        found, state = trained(strided and update.find_kernels("saetrain.training.update_kernels") is not None)
    with without_kernels():
        wanted, wanted_state = trained()
    for (name, one), other in zip(found.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, equal_nan=True, msg=name)
        for key, value in wanted_state.state[other].items():  # of the decoder's, most may have canceled
            near = 1e-5 * float(value.nan_to_num().abs().max())
            torch.testing.assert_close(state.state[one][key], value, rtol=1e-4, atol=near, equal_nan=True)
    if special == 0:
        torch.testing.assert_close(found.decoder.norm(dim=1), torch.ones(n_latents))
