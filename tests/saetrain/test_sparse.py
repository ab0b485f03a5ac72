"""The sparse step of a top-k code against dense autograd, finite differences and itself."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from saetrain.sparse import (
    BLOCK_ROWS,
    Code,
    Ragged,
    autoencode,
    decode,
    ragged_dense,
    select_above,
    select_batch_topk,
    select_topk,
    topk_autoencode,
    topk_dense,
)

Step = Callable[..., tuple[Tensor, Code]]
D = 12


def random_parameters(n_latents: int, d_model: int = D, *, shift: float = -0.5, seed: int = 0) -> list[Tensor]:
    """encoder, bias, decoder."""
    generator = torch.Generator().manual_seed(seed)
    encoder, decoder = (torch.randn(n_latents, d_model, generator=generator) for _ in range(2))
    return [encoder, torch.randn(n_latents, generator=generator) + shift, decoder]


def random_rows(n_rows: int, d_model: int = D, seed: int = 1) -> Tensor:
    return torch.randn(n_rows, d_model, generator=torch.Generator().manual_seed(seed))


def dense(code: Code, n_latents: int) -> Tensor:
    return torch.zeros(len(code.latents), n_latents).scatter(1, code.latents, code.values)


def run_step(step: Step, x: Tensor, parameters: list[Tensor], k: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(decoding, dense code, gradients of encoder, bias and decoder) under a fixed random weighting of the output."""
    leaves = [parameter.clone().requires_grad_() for parameter in parameters]
    out, code = step(x, *leaves, k)
    torch.autograd.backward((out * random_rows(*out.shape, seed=2)).sum())
    grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert len(grads) == 3
    return out.detach(), dense(code, len(parameters[0])), grads


@pytest.mark.parametrize(
    ("n_rows", "n_latents", "k"),
    [(1, 8, 1), (100, 40, 5), (255, 33, 1), (256, 64, 64), (257, 30, 3), (700, 300, 7), (2 * BLOCK_ROWS, 1, 1)],
)
@pytest.mark.parametrize("shift", [-0.5, -6.0], ids=["usual", "few positive"])
def test_values_and_all_gradients_equal_dense_autograd(n_rows: int, n_latents: int, k: int, shift: float) -> None:
    x, parameters = random_rows(n_rows), random_parameters(n_latents, shift=shift)
    sparse_out, sparse_code, sparse_grads = run_step(topk_autoencode, x, parameters, k)
    dense_out, dense_code, dense_grads = run_step(topk_dense, x, parameters, k)
    torch.testing.assert_close(sparse_out, dense_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sparse_code, dense_code, rtol=1e-5, atol=1e-5)
    for got, expected in zip(sparse_grads, dense_grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_rows_with_fewer_than_k_positive_pre_activations_leave_zeros() -> None:
    """What the case above must contain to say anything: short rows, and an empty one."""
    x, (encoder, bias, _) = random_rows(700), random_parameters(300, shift=-6.0)
    n_positive = (x @ encoder.T + bias > 0).sum(1)
    assert 0 in n_positive
    assert 7 in n_positive.clamp(max=7)
    code = select_topk(x, encoder, bias, 7)
    assert torch.equal((code.values > 0).sum(1), n_positive.clamp(max=7))
    assert (code.values >= 0).all()


@pytest.mark.parametrize("which", range(3), ids=["encoder", "bias", "decoder"])
def test_gradients_equal_finite_differences(which: int) -> None:
    """The step is linear in each parameter alone, so a central difference is exact while the selection stays."""
    x, parameters = random_rows(5), random_parameters(9)
    _, _, grads = run_step(topk_autoencode, x, parameters, 2)
    direction = torch.randn(parameters[which].shape, generator=torch.Generator().manual_seed(3))
    weight, size, ends, selected = random_rows(5, seed=2), 1e-2, [], []
    for sign in (1, -1):
        moved = list(parameters)
        moved[which] = parameters[which] + sign * size * direction
        out, code = topk_autoencode(x, *moved, 2)
        ends.append(float((out * weight).sum()))
        selected.append(dense(code, 9) > 0)
    assert torch.equal(*selected)
    assert (ends[0] - ends[1]) / (2 * size) == pytest.approx(float((grads[which] * direction).sum()), rel=2e-3)


def test_a_latent_that_is_not_active_takes_no_gradient() -> None:
    _, code, grads = run_step(topk_autoencode, random_rows(300), random_parameters(200), 1)
    silent = ~(code > 0).any(0)
    assert silent.any()
    assert not silent.all()
    for grad in grads:
        assert not grad[silent].any()
        assert grad[~silent].any()


def test_repeated_it_gives_the_same_bits() -> None:
    runs = [run_step(topk_autoencode, random_rows(700), random_parameters(300), 7) for _ in range(2)]
    for a, b in zip(runs[0][2], runs[1][2], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(runs[0][0], runs[1][0])


def test_decoding_is_the_weighted_sum_of_dictionary_rows() -> None:
    decoder = torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]])
    code = Code(torch.tensor([[0, 1], [2, 0]]), torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
    assert decode(code, decoder).tolist() == [[3.0, 8.0], [5.0, 5.0]]


def test_bfloat16_selects_nearly_the_same_latents() -> None:
    x, (encoder, bias, _) = random_rows(500, 64), random_parameters(256, 64, shift=0)
    exact = select_topk(x, encoder, bias, 8)
    rounded = select_topk(x, encoder, bias, 8, bfloat16=True)
    shared = ((dense(exact, 256) > 0) & (dense(rounded, 256) > 0)).sum()
    assert shared / (500 * 8) > 0.97
    assert rounded.values.dtype == torch.float32
    assert not torch.equal(exact.values, rounded.values)
    assert float((exact.values.sum() - rounded.values.sum()).abs() / exact.values.sum()) < 0.01


def test_bfloat16_gradients_point_the_same_way() -> None:
    x, parameters = random_rows(500, 64), random_parameters(256, 64)

    def rounded(*arguments: object) -> tuple[Tensor, Code]:
        return topk_autoencode(*arguments, bfloat16=True)  # type: ignore[arg-type]

    exact = run_step(topk_autoencode, x, parameters, 8)
    close = run_step(rounded, x, parameters, 8)
    for a, b in zip([exact[0], *exact[2]], [close[0], *close[2]], strict=True):
        assert float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)) > 0.98


# ---------------------------------------------------------------------------------------------------------------------
# Any number of active latents a row


def unroll(code: Ragged, n_latents: int) -> Tensor:
    return torch.zeros(len(code.starts) - 1, n_latents).index_put((code.rows(), code.latents), code.values)


@pytest.mark.parametrize("threshold", [0.0, 1.5, 100.0], ids=["all positive", "some", "none"])
@pytest.mark.parametrize("n_rows", [1, 256, 700])
def test_entries_above_a_threshold_are_those_of_the_dense_product(n_rows: int, threshold: float) -> None:
    x, (encoder, bias, _) = random_rows(n_rows), random_parameters(60)
    z = x @ encoder.T + bias
    code = select_above(x, encoder, bias, threshold)
    torch.testing.assert_close(unroll(code, 60), torch.where(z > threshold, z, 0.0))


@pytest.mark.parametrize("guess", [0.0, 0.5, 2.0, 50.0], ids=["none", "low", "near", "too high"])
@pytest.mark.parametrize(("n_rows", "k"), [(1, 3), (300, 4), (700, 11)])
def test_batch_topk_keeps_the_largest_of_the_batch_whatever_the_guess(n_rows: int, k: int, guess: float) -> None:
    x, (encoder, bias, _) = random_rows(n_rows), random_parameters(60, shift=0)
    z = (x @ encoder.T + bias).relu()
    kept = torch.zeros_like(z).flatten()
    largest = z.flatten().topk(k * n_rows)
    kept[largest.indices] = largest.values
    code, smallest = select_batch_topk(x, encoder, bias, k, guess)
    torch.testing.assert_close(unroll(code, 60), kept.view_as(z))
    assert smallest == pytest.approx(float(largest.values[-1]), rel=1e-5)
    assert (code.starts.diff() >= 0).all()


def test_batch_topk_with_too_few_positive_entries_keeps_these() -> None:
    x, (encoder, bias, _) = random_rows(50), random_parameters(20, shift=-8)
    z = (x @ encoder.T + bias).relu()
    for guess in (0.0, 3.0):
        code, _ = select_batch_topk(x, encoder, bias, 15, guess)
        torch.testing.assert_close(unroll(code, 20), z)


@pytest.mark.parametrize("threshold", [0.0, 1.5, 100.0])
def test_ragged_values_and_gradients_equal_dense_autograd(threshold: float) -> None:
    """Also through the values, as an L1 penalty goes."""
    x, parameters = random_rows(300), random_parameters(40)
    results = []
    for step in (autoencode, ragged_dense):
        leaves = [parameter.clone().requires_grad_() for parameter in parameters]
        code = select_above(x, parameters[0], parameters[1], threshold)
        out, values = step(x, *leaves, code)
        torch.autograd.backward((out * random_rows(*out.shape, seed=2)).sum() + 0.3 * values.sum())
        results.append([out.detach(), values.detach(), *(leaf.grad for leaf in leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
