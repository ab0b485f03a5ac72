"""The sparse step of a code against dense autograd, finite differences and itself."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from saetrain.model.active_latents import BLOCK_ROWS, Code, select_above, select_batch_topk, select_topk
from saetrain.model.sparse import decode, preactivations

D = 12
Select = Callable[..., Code]


def random_parameters(n_latents: int, d_model: int = D, *, shift: float = -0.5, seed: int = 0) -> list[Tensor]:
    """encoder, b_enc, decoder, b_dec."""
    generator = torch.Generator().manual_seed(seed)
    encoder, decoder = (torch.randn(n_latents, d_model, generator=generator) for _ in range(2))
    b_enc, b_dec = torch.randn(n_latents, generator=generator), torch.randn(d_model, generator=generator)
    return [encoder, b_enc + shift, decoder, 0.3 * b_dec]


def random_rows(n_rows: int, d_model: int = D, seed: int = 1) -> Tensor:
    return torch.randn(n_rows, d_model, generator=torch.Generator().manual_seed(seed))


def dense(code: Code, n_latents: int) -> Tensor:
    """[B, F] with the positive values of a code."""
    zeros = torch.zeros(len(code.starts) - 1, n_latents)
    return zeros.index_put((code.rows, code.latents), code.values.relu())


def select(x: Tensor, parameters: list[Tensor], k: int | None, threshold: float = 0.0) -> Code:
    encoder, b_enc, _, b_dec = parameters
    if k is None:
        return select_above(x - b_dec, encoder, b_enc, threshold)
    return select_topk(x - b_dec, encoder, b_enc, k)


def run_sparse(x: Tensor, leaves: list[Tensor], code: Code) -> tuple[Tensor, Tensor]:
    encoder, b_enc, decoder, b_dec = leaves
    values = preactivations(x, b_dec, encoder, b_enc, code).relu()
    return decode(values, decoder, code) + b_dec, values


def run_dense(x: Tensor, leaves: list[Tensor], code: Code) -> tuple[Tensor, Tensor]:
    """Plain autograd on dense tensors, with the selection of the code."""
    encoder, b_enc, decoder, b_dec = leaves
    z = (x - b_dec) @ encoder.T + b_enc
    kept = torch.zeros_like(z).index_put((code.rows, code.latents), torch.ones_like(code.values))
    values = z.relu() * kept
    return values @ decoder + b_dec, values[code.rows, code.latents]


def run_step(
    step: Callable[..., tuple[Tensor, Tensor]], x: Tensor, parameters: list[Tensor], code: Code
) -> tuple[Tensor, list[Tensor]]:
    """The decoding, and the gradients of a fixed random weighting of the output plus a penalty on the values."""
    leaves = [parameter.clone().requires_grad_() for parameter in parameters]
    out, values = step(x, leaves, code)
    torch.autograd.backward((out * random_rows(*out.shape, seed=2)).sum() + 0.3 * values.sum())
    grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert len(grads) == 4
    return out.detach(), grads


@pytest.mark.parametrize(
    ("n_rows", "n_latents", "k"),
    [
        (1, 8, 1),
        (100, 40, 5),
        (255, 33, 1),
        (256, 64, 64),
        (257, 30, None),
        (700, 300, 7),
        (2 * BLOCK_ROWS, 1, 1),
        (300, 256, 2),
        (300, 640, 5),  # bounded by the maxima of groups first
    ],
)
@pytest.mark.parametrize("shift", [-0.5, -6.0], ids=["usual", "few positive"])
def test_values_and_all_gradients_equal_dense_autograd(
    n_rows: int, n_latents: int, k: int | None, shift: float
) -> None:
    x, parameters = random_rows(n_rows), random_parameters(n_latents, shift=shift)
    code = select(x, parameters, k)
    got, expected = (run_step(step, x, parameters, code) for step in (run_sparse, run_dense))
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    for sparse, plain in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(sparse, plain, rtol=1e-4, atol=2e-4)


def test_gradients_are_added_to_what_is_there() -> None:
    x, parameters = random_rows(40), random_parameters(20)
    code = select(x, parameters, 3)
    _, once = run_step(run_sparse, x, parameters, code)
    leaves = [parameter.clone().requires_grad_() for parameter in parameters]
    for _ in range(2):
        out, values = run_sparse(x, leaves, code)
        torch.autograd.backward((out * random_rows(*out.shape, seed=2)).sum() + 0.3 * values.sum())
    for leaf, grad in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * grad, rtol=1e-4, atol=1e-4)


def test_a_frozen_decoder_takes_no_gradient() -> None:
    x, (encoder, b_enc, decoder, b_dec) = random_rows(40), random_parameters(20)
    code = select_topk(x, encoder, b_enc, 3)
    decoder.requires_grad_()
    values = preactivations(x, b_dec, encoder.requires_grad_(), b_enc.requires_grad_(), code)
    torch.autograd.backward(decode(values, decoder, code, trained=False).sum())
    assert decoder.grad is None
    assert encoder.grad is not None


def test_rows_with_fewer_than_k_positive_pre_activations_stay_short() -> None:
    """The case above means something only if it contains short rows and an empty one."""
    x, parameters = random_rows(700), random_parameters(300, shift=-6.0)
    encoder, b_enc, _, b_dec = parameters
    n_positive = ((x - b_dec) @ encoder.T + b_enc > 0).sum(1)
    assert 0 in n_positive
    assert 7 in n_positive.clamp(max=7)
    assert torch.equal(select(x, parameters, 7).starts.diff(), n_positive.clamp(max=7))


@pytest.mark.parametrize("which", range(4), ids=["encoder", "b_enc", "decoder", "b_dec"])
def test_gradients_equal_finite_differences(which: int) -> None:
    """For a fixed selection, the step is linear in encoder, b_enc or decoder, and quadratic in b_dec alone."""
    x, parameters = random_rows(5), random_parameters(9)
    code = select(x, parameters, 2)
    _, grads = run_step(run_sparse, x, parameters, code)
    direction = torch.randn(parameters[which].shape, generator=torch.Generator().manual_seed(3))
    weight, size, ends = random_rows(5, seed=2), 1e-2, []
    for sign in (1, -1):
        moved = list(parameters)
        moved[which] = parameters[which] + sign * size * direction
        again = select(x, moved, 2)
        assert torch.equal(dense(again, 9) > 0, dense(code, 9) > 0)
        out, values = run_sparse(x, moved, again)
        ends.append(float((out * weight).sum() + 0.3 * values.sum()))
    assert (ends[0] - ends[1]) / (2 * size) == pytest.approx(float((grads[which] * direction).sum()), rel=2e-3)


def test_a_latent_that_is_not_active_takes_no_gradient() -> None:
    x, parameters = random_rows(300), random_parameters(200)
    code = select(x, parameters, 1)
    _, grads = run_step(run_sparse, x, parameters, code)
    silent = ~(dense(code, 200) > 0).any(0)
    assert silent.any()
    assert not silent.all()
    for grad in grads[:3]:
        assert not grad[silent].any()
        assert grad[~silent].any()


def test_repeated_it_gives_the_same_bits() -> None:
    x, parameters = random_rows(700), random_parameters(300)
    runs = [run_step(run_sparse, x, parameters, select(x, parameters, 7)) for _ in range(2)]
    for a, b in zip(runs[0][1], runs[1][1], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(runs[0][0], runs[1][0])


def test_decoding_is_the_weighted_sum_of_dictionary_rows() -> None:
    decoder = torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]])
    code = Code(torch.tensor([0, 2, 2, 3]), torch.tensor([0, 1, 2]), torch.tensor([3.0, 4.0, 1.0]))
    assert decode(code.values, decoder, code).tolist() == [[3.0, 8.0], [0.0, 0.0], [5.0, 5.0]]


def test_entries_by_prefix_add_up_to_the_nested_decodings() -> None:
    x, parameters = random_rows(300), random_parameters(40)
    code, prefixes = select(x, parameters, 5), (1, 8, 20, 40)
    nested, order = code.by_prefix(prefixes)
    parts = decode(code.values.relu()[order], parameters[2], nested).view(4, 300, D).cumsum(0)
    values = dense(code, 40)
    for n, part in zip(prefixes, parts, strict=True):
        torch.testing.assert_close(part, values[:, :n] @ parameters[2][:n], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("n_latents", [256, 250], ids=["by groups", "plainly"])
@pytest.mark.parametrize("shift", [0, -9])
def test_top_k_are_the_k_largest_however_they_are_found(n_latents: int, bfloat16: bool, shift: float) -> None:
    x, (encoder, b_enc, _, _) = random_rows(600), random_parameters(n_latents, shift=shift)
    code = select_topk(x, encoder, b_enc, 6, bfloat16=bfloat16)
    z = x @ encoder.T + b_enc
    if bfloat16:
        z = torch.addmm(b_enc.bfloat16(), x.bfloat16(), encoder.bfloat16().T).float()
    top = z.topk(6).values.relu()
    got = dense(code, n_latents)
    torch.testing.assert_close(got.topk(6).values, top, rtol=1e-5, atol=1e-5)  # equal ones may be others
    assert (code.starts.diff() <= 6).all()
    assert (code.values > 0).all()
    key = code.rows * n_latents + code.latents
    assert torch.equal(key, key.sort().values)


@pytest.mark.parametrize("n_rows", [1, 3, 257, 259])
def test_fewer_rows_than_threads_are_selected_too(n_rows: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        x, (encoder, b_enc, _, _) = random_rows(n_rows), random_parameters(256, shift=0)
        assert torch.equal(select_topk(x, encoder, b_enc, 6).starts.diff(), torch.full((n_rows,), 6))
        code = select_above(x, encoder, b_enc, 0.0)
        assert torch.equal(code.starts.diff(), (x @ encoder.T + b_enc > 0).sum(1))
    finally:
        torch.set_num_threads(before)


def test_equal_values_are_cut_to_k() -> None:
    code = select_topk(torch.ones(10, D), torch.ones(256, D), torch.zeros(256), 5)
    assert torch.equal(code.starts.diff(), torch.full((10,), 5))


def test_bfloat16_selects_nearly_the_same_latents() -> None:
    x, (encoder, b_enc, _, _) = random_rows(500, 64), random_parameters(256, 64, shift=0)
    exact, rounded = (select_topk(x, encoder, b_enc, 8, bfloat16=rounded) for rounded in (False, True))
    shared = ((dense(exact, 256) > 0) & (dense(rounded, 256) > 0)).sum()
    assert shared / (500 * 8) > 0.97
    assert rounded.values.dtype == torch.float32
    assert not torch.equal(exact.values, rounded.values)
    assert float((exact.values.sum() - rounded.values.sum()).abs() / exact.values.sum()) < 0.01


@pytest.mark.parametrize("threshold", [0.0, 1.5, 100.0], ids=["all positive", "some", "none"])
@pytest.mark.parametrize("n_rows", [1, 256, 700])
def test_entries_above_a_threshold_are_those_of_the_dense_product(n_rows: int, threshold: float) -> None:
    x, (encoder, b_enc, _, _) = random_rows(n_rows), random_parameters(60)
    z = x @ encoder.T + b_enc
    torch.testing.assert_close(dense(select_above(x, encoder, b_enc, threshold), 60), torch.where(z > threshold, z, 0))
    each = torch.full((60,), threshold) + torch.arange(60) / 60
    code = select_above(x, encoder, b_enc, each)
    torch.testing.assert_close(dense(code, 60), torch.where(z > each, z, 0))


def test_what_is_too_dense_is_given_up_after_the_first_block() -> None:
    x, (encoder, b_enc, _, _) = random_rows(700), random_parameters(60, shift=0)
    code = select_above(x, encoder, b_enc, 0.0, max_share=0.3)
    assert len(code.starts) == BLOCK_ROWS + 1
    assert len(code.values) / (BLOCK_ROWS * 60) > 0.3
    assert len(select_above(x, encoder, b_enc, 0.0, max_share=0.7).starts) == 701


@pytest.mark.parametrize("guess", [0.0, 0.5, 2.0, 50.0], ids=["none", "low", "near", "too high"])
@pytest.mark.parametrize(("n_rows", "k"), [(1, 3), (300, 4), (700, 11)])
def test_batch_topk_keeps_the_largest_of_the_batch_whatever_the_guess(n_rows: int, k: int, guess: float) -> None:
    x, (encoder, b_enc, _, _) = random_rows(n_rows), random_parameters(60, shift=0)
    z = (x @ encoder.T + b_enc).relu()
    kept = torch.zeros_like(z).flatten()
    largest = z.flatten().topk(k * n_rows)
    kept[largest.indices] = largest.values
    code, smallest = select_batch_topk(x, encoder, b_enc, k, guess)
    torch.testing.assert_close(dense(code, 60), kept.view_as(z))
    assert smallest == pytest.approx(float(largest.values[-1]), rel=1e-5)
    assert (code.starts.diff() >= 0).all()


def test_batch_topk_keeps_exactly_k_a_row_where_values_are_equal() -> None:
    x = torch.ones(10, D)
    code, smallest = select_batch_topk(x, torch.ones(20, D), torch.zeros(20), 3, 0.0)
    assert len(code.values) == 30
    assert smallest == D


def test_batch_topk_with_too_few_positive_entries_keeps_these() -> None:
    x, (encoder, b_enc, _, _) = random_rows(50), random_parameters(20, shift=-8)
    z = (x @ encoder.T + b_enc).relu()
    for guess in (0.0, 3.0):
        code, _ = select_batch_topk(x, encoder, b_enc, 15, guess)
        torch.testing.assert_close(dense(code, 20), z)
