"""The pretend GPU itself: it answers as a GPU, and each kind of fault that it is for is planted here and seen."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pretend_device import Event, PretendDevice, PretendTensor, tell
from torch import Tensor, nn
from torch.nn import functional as F


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def what(events: list[Event]) -> list[tuple[str, str]]:
    return [(event.kind, event.what) for event in events]


def test_a_tensor_says_that_it_is_on_a_gpu() -> None:
    with PretendDevice() as gpu:
        x = numbers(4, 3).to("cuda")
        places = [x, x.cuda(), x * 2, torch.zeros(3, device="cuda"), torch.arange(3, device=x.device), x.new_ones(2)]
        places += [torch.tensor([1.0], device=torch.device("cuda")), torch.empty_like(x), x.new_tensor([2.0]), x[1:].T]
        for place in places:
            assert isinstance(place, PretendTensor)
            assert (place.device, place.is_cuda, place.is_cpu, place.is_mps) == (
                torch.device("cuda:0"),
                True,
                False,
                False,
            )
        assert x.to("cuda:0") is x
        assert numbers(3).to("cpu").device.type == torch.zeros(2).device.type == "cpu"
        back = x.cpu()
    assert type(back) is Tensor
    assert torch.equal(back, numbers(4, 3))
    assert gpu.name == torch.device("cuda:0")
    assert not torch.cuda.is_available()


def test_a_module_moves_there_trains_and_moves_back() -> None:
    """The same weights as on the CPU, bit for bit, since the same kernels run."""
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.GELU(), nn.Linear(5, 1))
        with PretendDevice():
            model.to(device)
            assert {p.device.type for p in (*model.parameters(), *model.buffers())} == {device}
            optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=True)
            for _ in range(3):
                model(numbers(8, 3).to(device)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            model.to("cpu")
        results.append([value.detach().clone() for value in model.state_dict().values()])
        assert all(type(value) is Tensor for value in results[-1])
    assert all(map(torch.equal, *results))


TWO_DEVICES: dict[str, Callable[[Tensor], Any]] = {
    "a sum": lambda x: x + torch.ones(3),
    "a product": lambda x: x @ torch.ones(3, 2),
    "a product with a bias": lambda x: torch.addmm(torch.zeros(2), x, x.new_ones(3, 2)),
    "a layer": lambda x: F.linear(x, torch.ones(2, 3)),
    "a choice": lambda x: torch.where(x > 0, x, torch.zeros(4, 3)),
    "a concatenation": lambda x: torch.cat([x, torch.zeros(1, 3)]),
    "a stack of numbers": lambda x: torch.stack([x.sum(), torch.tensor(0.0)]),
    "added rows": lambda x: x.index_add_(0, torch.zeros(4, dtype=torch.int64), x.clone()),
    "put values": lambda x: x.index_put_((x.new_zeros(1, dtype=torch.int64),), torch.ones(3)),
    "a tensor of the host in front": lambda x: torch.ones(4, 3) * x.sum(),
    "gathered by places of the host": lambda x: x.gather(1, torch.zeros(4, 1, dtype=torch.int64)),
    "a tensor of the host by places": lambda x: torch.ones(4)[x.new_zeros(1, dtype=torch.int64)],
    "written into the host": lambda x: torch.add(x, x, out=torch.empty(4, 3)),
}


@pytest.mark.parametrize("forgotten", TWO_DEVICES)
def test_a_forgotten_move_is_refused(forgotten: str) -> None:
    with PretendDevice():
        x = numbers(4, 3).to("cuda")
        with pytest.raises(RuntimeError, match="at least two devices"):
            TWO_DEVICES[forgotten](x)


def test_what_a_gpu_takes_from_the_host_is_taken() -> None:
    with PretendDevice() as gpu:
        x = numbers(4, 3).to("cuda")
        one = torch.tensor(1.0)
        for y in (x * one, one + x, torch.where(x > 0, x, one), x.masked_fill(x > 0, one), x.clamp_min(one)):
            assert isinstance(y, PretendTensor)
        with gpu.watch() as waits:
            picked = x[torch.tensor([0, 2])]
        assert torch.equal(picked.cpu(), numbers(4, 3)[[0, 2]])
        assert what(waits) == [("to device", "places of index")]


WAITS: dict[str, tuple[Callable[[Tensor], Any], list[tuple[str, str]]]] = {
    "item": (lambda x: x.sum().item(), [("waits", "_local_scalar_dense")]),
    "float": (lambda x: float(x.sum()), [("waits", "_local_scalar_dense")]),
    "int": (lambda x: int(x.argmax()), [("waits", "_local_scalar_dense")]),
    "bool": (lambda x: bool((x > 0).any()), [("waits", "_local_scalar_dense")]),
    "if": (lambda x: 1 if x.isfinite().all() else 0, [("waits", "_local_scalar_dense")]),
    "index of a list": (lambda x: [0, 1, 2][x.argmax() % 3], [("waits", "_local_scalar_dense")]),
    "equal": (lambda x: torch.equal(x, x), [("waits", "equal")]),
    "tolist": (lambda x: x.tolist(), [("to host", "tolist")]),
    "cpu": (lambda x: x.cpu(), [("to host", "copy")]),
    "to the host": (lambda x: x.to("cpu", torch.float64), [("to host", "copy")]),
    "copied into the host": (lambda x: torch.empty(4, 3).copy_(x), [("to host", "copy")]),
    "to the device": (lambda x: torch.ones(3).to(x.device), [("to device", "copy")]),
    "copied into the device": (lambda x: x.copy_(torch.ones(4, 3)), [("to device", "copy")]),
    "made of a list": (lambda x: torch.tensor([1, 2], device=x.device), [("to device", "copy")]),
    "made of a number": (lambda x: torch.as_tensor(0.5, device=x.device), [("to device", "copy")]),
    "new_tensor": (lambda x: x.new_tensor([1.0]), [("to device", "copy")]),
    "nonzero": (lambda x: (x > 0).nonzero(), [("waits", "nonzero")]),
    "a mask": (lambda x: x[x > 0], [("waits", "index by a mask")]),
    "masked_select": (lambda x: x.masked_select(x > 0), [("waits", "masked_select")]),
    "values put by a mask": (
        lambda x: x.index_put_((x > 0,), x.new_zeros(int((numbers(4, 3) > 0).sum()))),
        [("waits", "index_put_ by a mask")],
    ),
    "a number put by a mask": (lambda x: x.__setitem__(x > 0, 0.0), []),
    "a number put at places": (
        lambda x: x.__setitem__(torch.arange(2, device=x.device), 0.0), [("to device", "index_put_ of a number")],
    ),
    "a number put in a slice": (lambda x: x[1:].__setitem__(0, 0.0), []),
    "bincount": (lambda x: torch.bincount((x[0] > 0).long()), [("waits", "bincount")] * 2),
    "repeat": (lambda x: torch.repeat_interleave(x.argmax(1)), [("waits", "repeat_interleave")]),
    "repeat of a known size": (
        lambda x: torch.repeat_interleave(torch.ones(4, dtype=torch.int64, device=x.device), output_size=4), []
    ),
    "synchronize": (lambda x: torch.cuda.synchronize(), [("waits", "synchronize")]),
    "no wait": (lambda x: (x @ x.T).topk(2).values.sort().values.cumsum(0).sum() * 2, []),
    "a copy in passing": (lambda x: torch.ones(3).to(x.device, non_blocking=True), []),
}  # fmt: skip


@pytest.mark.parametrize("case", WAITS)
def test_each_wait_is_written_down(case: str) -> None:
    call, expected = WAITS[case]
    with PretendDevice() as gpu:
        x = numbers(4, 3).to("cuda")
        with gpu.watch() as waits:
            call(x)
    assert what(waits) == expected


ONLY_ON_A_CPU: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "numpy": (lambda x: x.numpy(), TypeError, "to numpy. Use Tensor.cpu"),
    "asarray": (lambda x: np.asarray(x), TypeError, "to numpy. Use Tensor.cpu"),
    "a numpy function": (lambda x: np.abs(x), TypeError, "to numpy. Use Tensor.cpu"),
    "from_dlpack": (lambda x: np.from_dlpack(x), RuntimeError, "memory"),
    "an address": (lambda x: x.data_ptr(), RuntimeError, "cannot read the memory"),
    "mkldnn": (
        lambda x: torch.ops.mkldnn._linear_pointwise(x, x, None, "none", [], ""), NotImplementedError, "'CUDA' backend",
    ),
    "to_mkldnn": (lambda x: x.to_mkldnn(), NotImplementedError, "'CUDA' backend"),
}  # fmt: skip


@pytest.mark.parametrize("case", ONLY_ON_A_CPU)
def test_what_only_a_cpu_does_is_refused(case: str) -> None:
    call, error, message = ONLY_ON_A_CPU[case]
    with PretendDevice():
        x = numbers(4, 3).to("cuda")
        with pytest.raises(error, match=message):
            call(x)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_a_sparse_product_with_gradients_computes_what_the_cpu_computes() -> None:
    def compute(device: str) -> list[Tensor]:
        x, dictionary = numbers(4, 3).to(device), numbers(5, 3).to(device).requires_grad_()
        starts, columns = torch.arange(0, 9, 2, device=device), torch.arange(8, device=device) % 5
        pattern = torch.sparse_csr_tensor(starts, columns, x.new_zeros(8), (4, 5), check_invariants=False)
        values = torch.sparse.sampled_addmm(pattern, x, dictionary.detach().T, beta=0.0).values()
        code = torch.sparse_csr_tensor(starts, columns, values, (4, 5), check_invariants=False)
        loss = (code.to_dense() @ dictionary).square().sum()
        loss.backward()
        assert dictionary.grad is not None
        return [values.cpu(), loss.detach().cpu(), dictionary.grad.cpu()]

    with PretendDevice():
        found = compute("cuda")
    assert all(map(torch.equal, found, compute("cpu")))


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_autocast_is_the_devices(kind: str) -> None:
    with PretendDevice(kind):
        x, weight = numbers(4, 3).to(kind), numbers(5, 3).to(kind)
        with torch.autocast(kind, dtype=torch.bfloat16):
            assert (x @ weight.T).dtype == F.linear(x, weight).dtype == torch.bfloat16
            assert x.square().sum().dtype == torch.float32
        assert (x @ weight.T).dtype == torch.float32


def test_where_the_host_waited_is_told() -> None:
    from saetrain import SAE, SAEConfig

    with PretendDevice() as gpu:
        sae = SAE(SAEConfig("relu", 8).resolve(3), 3).to("cuda")
        x = numbers(4, 3).to("cuda")
        with gpu.watch() as waits:
            sae.encode(x)
    assert tell(waits)["sae.SAE.encode: _local_scalar_dense"] == 1


WRONG_ON_MPS: dict[str, tuple[Callable[[Tensor], Any], type[Exception]]] = {
    "double": (lambda x: x.double(), TypeError),
    "a sum in float64": (lambda x: x.sum(dtype=torch.float64), TypeError),
    "zeros in float64": (lambda x: torch.zeros(3, dtype=torch.float64, device="mps"), TypeError),
    "int64 added": (
        lambda x: torch.zeros(3, dtype=torch.int64, device="mps").index_add_(
            0, torch.arange(3, device="mps"), torch.arange(3, device="mps")
        ),
        RuntimeError,
    ),
    "moved there": (lambda x: torch.zeros(3, dtype=torch.float64).to("mps"), TypeError),
    "csr": (
        lambda x: torch.sparse_csr_tensor(
            torch.arange(5, device=x.device), torch.zeros(4, dtype=torch.int64, device=x.device), x[:, 0], (4, 3),
            check_invariants=False,
        ),
        NotImplementedError,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_ON_MPS)
def test_mps_refuses_what_apples_gpus_lack(case: str) -> None:
    call, error = WRONG_ON_MPS[case]
    with PretendDevice("mps"):
        x = numbers(4, 3).to("mps")
        assert (x.device, x.is_mps, x.is_cuda) == (torch.device("mps:0"), True, False)
        with pytest.raises(error, match=r"MPS"):
            call(x)
        assert x.cpu().double().dtype == torch.float64  # on the host


def test_fused_adam_does_not_clip_on_mps() -> None:
    """Its kernel there ignores grad_scale, so whoever sets it would train without clipping."""
    with PretendDevice("mps"):
        parameter = nn.Parameter(numbers(3).to("mps"))
        optimizer = torch.optim.Adam([parameter], lr=0.1, fused=True)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        vars(optimizer)["grad_scale"] = torch.ones((), device="mps")
        with pytest.raises(NotImplementedError, match="grad_scale"):
            optimizer.step()
