"""A pretend GPU: tensors that say `cuda` (or `mps`) and compute on the CPU, so that faults of devices show without one.

    with PretendDevice("cuda") as gpu:
        x = torch.randn(4, 3).to("cuda")    # a copy to the device: gpu.events
        x + torch.ones(3)                   # RuntimeError, as on a GPU: two devices
        x.numpy()                           # TypeError, as on a GPU
        bool((x > 0).any())                 # the host waits for the device: gpu.waits

It refuses operations on tensors of two devices, and those that only a CPU has; and it writes down every time at which
the host waits for the device or copies something. On `mps` there is neither float64 nor CSR.

How it works: inside torch such a tensor is on the device `meta`, which is not the CPU either and which autograd knows
on every machine. Two layers turn this into a GPU. A TorchFunctionMode translates names of devices on the way in, and
the tensor's own `__torch_function__` what it says of itself on the way out. A TorchDispatchMode receives each kernel
call below autograd, with the devices of its arguments, checks it, and calls it on the real tensors.

Which kernels wait: those that read a number on the host, such as the size of their result. Sources, all of torch:
`nonzero` and masks, cuda/Nonzero.cu and IndexKernel.cpp; `bincount` twice, cuda/SummaryOps.cu; `repeat_interleave`
without output_size, native/Repeat.h; a blocking copy in either direction, cuda/Copy.cu; a Python number that is put at
places [n], which is copied to the device first, TensorAdvancedIndexing.cpp.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[2]
PRODUCT = tuple(str(ROOT / folder) for folder in ("actcache", "saetrain", "analysis"))
INSIDE = torch.device("meta")
"""What torch itself takes a pretend tensor for."""
WAITS = {"_local_scalar_dense": 1, "equal": 1, "nonzero": 1, "masked_select": 1, "_unique2": 1, "bincount": 2}
WAITS |= {"unique_dim": 1, "unique_consecutive": 1}
"""How often the host waits for a kernel."""
SCALARS_OF_THE_HOST = {"masked_fill", "masked_fill_", "fill_", "index_put", "index_put_", "_index_put_impl_"}
"""Kernels that take a number of the host in a tensor [] beside the pointwise ones."""
PRODUCTS = {"matmul", "rmatmul", "mm", "bmm", "addmm", "baddbmm", "linear", "conv2d", "scaled_dot_product_attention"}
PRECISE = {"exp", "log", "pow", "sum", "cumsum", "prod", "norm", "softmax", "layer_norm", "cosine_similarity"}
"""What autocast computes in bfloat16 and in float32, of what a caller names; the rest stays as it comes."""
aten = torch.ops.aten


class Event(NamedTuple):
    """Something that costs the host time.

    Attributes:
        kind: `waits`; or `to host` and `to device`, copies for which it waits too; or `to device, in passing`.
        what: the operation.
        place: the function of the package that asked for it.
    """

    kind: str
    what: str
    place: str


class PretendTensor(torch.Tensor):
    """A tensor of the pretend device. `held` is what it computes with."""

    held: Tensor
    owner: "PretendDevice"

    @staticmethod
    def __new__(cls, held: Tensor, owner: "PretendDevice") -> "PretendTensor":
        owner.check_supported(held)
        strided = held.layout == torch.strided
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride() if strided else None,
            storage_offset=held.storage_offset() if strided else None, dtype=held.dtype, device=INSIDE,
        )  # fmt: skip
        made.held, made.owner = held, owner
        return made

    def __tensor_flatten__(self) -> tuple[list[str], "PretendDevice"]:  # so that Module.to exchanges parameters
        return ["held"], self.owner

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], owner: "PretendDevice", *sizes: Any) -> "PretendTensor":
        return PretendTensor(parts["held"], owner)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        owner = next(t.owner for t in _tensors((args, kwargs)) if isinstance(t, PretendTensor))
        if (answer := owner.answers.get(func)) is not None and isinstance(args[0], PretendTensor):
            return answer(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        owner = next(t.owner for t in _tensors((args, kwargs)) if isinstance(t, PretendTensor))
        return owner.call(func, args, kwargs or {})


def _tensors(tree: Any) -> list[Tensor]:
    """The tensors among the arguments of a call. torch's own way takes ten times as long."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return []
    return [tensor for part in tree for tensor in _tensors(part)]


def _map(function: Callable[[Any], Any], tree: Any) -> Any:
    """The arguments or results of a call, with the function applied to each tensor."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: _map(function, part) for key, part in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_map(function, part) for part in tree)
    return tree


def _real(tensor: Tensor) -> Tensor:
    return tensor.held if isinstance(tensor, PretendTensor) else tensor


class _Names(TorchFunctionMode):
    """Translates names of devices in calls of torch."""

    def __init__(self, owner: "PretendDevice") -> None:
        super().__init__()
        self.owner = owner

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ == "__get__":  # an attribute
            return func(*args)
        owner, kwargs = self.owner, dict(kwargs or {})
        if kwargs.get("pin_memory"):  # page-locked memory is the host's
            kwargs.pop("pin_memory")
        if func in (torch.tensor, torch.as_tensor) and owner.is_mine(kwargs.get("device")):
            data = args[0] if args else kwargs.pop("data")
            if not isinstance(data, PretendTensor):
                return func(data, *args[1:], **{**kwargs, "device": "cpu"}).to(INSIDE)
        if func is torch.Tensor.cuda:
            func, args = torch.Tensor.to, (args[0], "cuda")
        if owner.is_mine(kwargs.get("device")):
            kwargs["device"] = INSIDE
        is_to = func is torch.Tensor.to
        args = tuple(INSIDE if (is_to or isinstance(a, torch.device)) and owner.is_mine(a) else a for a in args)
        if torch.is_autocast_enabled(owner.kind) and kwargs.get("out") is None:
            args = _cast(func, args)
        if func is torch.Tensor.__setitem__ and isinstance(args[0], PretendTensor):
            owner.note_assignment(*args)
        return func(*args, **kwargs)


def _cast(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a call under autocast: products in bfloat16, sums and roots in float32 (cuda's lists)."""
    name = getattr(func, "__name__", "").strip("_")
    dtype = torch.bfloat16 if name in PRODUCTS else torch.float32 if name in PRECISE else None
    if dtype is None:
        return args
    return tuple(a.to(dtype) if isinstance(a, PretendTensor) and a.is_floating_point() else a for a in args)


class _Calls(TorchDispatchMode):
    """Receives every kernel call, so that tensors made from nothing are the device's too."""

    def __init__(self, owner: "PretendDevice") -> None:
        super().__init__()
        self.owner = owner

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.owner.call(func, args, kwargs or {})


class PretendDevice:
    """A context in which torch has a GPU of one kind.

    Attributes:
        events: what has cost the host time, in order.
        kernels: how often each kernel was called.
    """

    def __init__(self, kind: str = "cuda") -> None:
        self.kind, self.name = kind, torch.device(kind, 0)
        self.events: list[Event] = []
        self.kernels: Counter[str] = Counter()
        self.answers = self._answers()
        self._stack = ExitStack()

    def __enter__(self) -> "PretendDevice":
        # else optimizers ask its driver whether a graph is recorded
        self._stack.enter_context(mock.patch.object(torch.accelerator, "current_accelerator", return_value=None))
        for name, answer in self._facts().items():
            module, _, attribute = name.rpartition(".")
            self._stack.enter_context(mock.patch.object(torch.get_device_module(module), attribute, answer))
        self._stack.enter_context(_Calls(self))
        self._stack.enter_context(_Names(self))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _facts(self) -> dict[str, Callable[..., Any]]:
        """What torch says of its devices."""
        if self.kind == "mps":
            return {"mps.is_available": lambda: True, "mps.device_count": lambda: 1}
        return {
            "cuda.is_available": lambda: True, "cuda.device_count": lambda: 1, "cuda.current_device": lambda: 0,
            "cuda.is_bf16_supported": lambda *args, **kwargs: True, "cuda.mem_get_info": lambda *args: (1 << 33,) * 2,
            "cuda.is_current_stream_capturing": lambda: False,
            "cuda.synchronize": lambda *args: self.note("waits", "synchronize"),
        }  # fmt: skip

    # What a tensor says of itself

    def _answers(self) -> dict[Any, Callable[..., Any]]:
        of, kind = torch.Tensor, self.kind

        def refuse(error: type[Exception], message: str) -> Callable[..., Any]:
            def fail(*args: Any, **kwargs: Any) -> Any:
                raise error(message)

            return fail

        no_numpy = refuse(
            TypeError, f"can't convert {self.name} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to "
            "host memory first.",
        )  # fmt: skip
        no_address = refuse(RuntimeError, f"The host cannot read the memory of {self.name}.")
        return {
            of.device.__get__: lambda x: self.name,
            of.is_cuda.__get__: lambda x: kind == "cuda",
            of.is_mps.__get__: lambda x: kind == "mps",
            of.is_meta.__get__: lambda x: False,
            of.layout.__get__: lambda x: x.held.layout,
            of.get_device: lambda x: 0,
            of.numpy: no_numpy, of.__array__: no_numpy, of.data_ptr: no_address, of.__dlpack__: no_address,
            of.tolist: lambda x: self._read(x, "tolist").tolist(),
            of.new_tensor: lambda x, data, **kwargs: torch.tensor(data, **{"dtype": x.dtype, **kwargs}).to(INSIDE),
            of.__repr__: lambda x, **kwargs: f"{self.name}: {x.held!r}",
        }  # fmt: skip

    def _read(self, x: PretendTensor, what: str) -> Tensor:
        self.note("to host", what)
        return x.held

    def is_mine(self, device: Any) -> bool:
        """Whether a name of a device means this one."""
        if isinstance(device, str) and device.partition(":")[0] != self.kind:
            return False
        return isinstance(device, str | torch.device) and torch.device(device).type == self.kind

    def check_supported(self, held: Tensor) -> None:
        """Raise for what an MPS device cannot hold."""
        if self.kind != "mps":
            return
        if held.dtype in (torch.float64, torch.complex128):
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. Please use "
                "float32 instead."
            )
        if held.layout != torch.strided:
            raise NotImplementedError(f"{held.layout} is not supported on MPS.")

    # What happened

    def note(self, kind: str, what: str, times: int = 1) -> None:
        if not times:
            return
        frame: Any = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(PRODUCT):
            frame = frame.f_back
        place = "" if frame is None else f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_qualname}"
        self.events += [Event(kind, what, place)] * times

    def note_assignment(self, x: Tensor, index: Any, value: Any) -> None:
        """Write down the copy that x[places] = number costs; a mask takes the number without one."""
        places = [i for i in (index if isinstance(index, tuple) else (index,)) if isinstance(i, Tensor)]
        if places and not isinstance(value, Tensor) and not all(i.dtype == torch.bool for i in places):
            self.note("to device", "index_put_ of a number")

    @property
    def waits(self) -> list[Event]:
        """The events at which the host waits for the device."""
        return [event for event in self.events if event.kind != "to device, in passing"]

    @contextmanager
    def watch(self) -> Iterator[list[Event]]:
        """Collect the waits of a block in a list that is full at its end."""
        found: list[Event] = []
        first = len(self.waits)
        yield found
        found += self.waits[first:]

    # The calls of kernels

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One kernel call, with real tensors where it is not this device's."""
        tensors = _tensors((args, kwargs))
        mine = [t for t in tensors if isinstance(t, PretendTensor)]
        target = kwargs.get("device")
        if not mine and target != INSIDE:
            return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        self.kernels[name] += 1
        if func is aten._fused_sdp_choice.default:
            return 0  # plain products, which every device has
        if func is aten._to_copy.default:
            return self._copy(func, args, kwargs)
        if func is aten.copy_.default:
            if len(mine) == 1:
                self._note_copy(to_device=args[0] is mine[0], passing=len(args) > 2 and args[2])
        else:
            self._check(func, name, tensors)
            self._count(func, name, args, kwargs)
        if target == INSIDE:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        out = func(*_map(_real, args), **_map(_real, kwargs))
        if name == "_fused_adam_" and self.kind == "mps" and kwargs.get("grad_scale") is not None:
            raise NotImplementedError("Fused Adam ignores grad_scale on MPS.")  # mps/operations/FusedAdamKernelImpl.mm
        wrappers = {id(t.held): t for t in mine}  # what a call in place, or into `out`, gives back
        real = {id(t) for t in tensors if not isinstance(t, PretendTensor)}
        return _map(lambda t: wrappers.get(id(t), t if id(t) in real else PretendTensor(t, self)), out)

    def _copy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        source, target = args[0], kwargs.get("device")
        was_mine = isinstance(source, PretendTensor)
        is_mine = was_mine if target is None else target == INSIDE
        if was_mine != is_mine:
            self._note_copy(to_device=is_mine, passing=kwargs.get("non_blocking", False))
        if is_mine and was_mine and kwargs.get("dtype"):
            self.check_supported(torch.empty(0, dtype=kwargs["dtype"]))
        made: Tensor = func(_real(source), **{k: v for k, v in kwargs.items() if k != "device"})
        return PretendTensor(made, self) if is_mine else made

    def _note_copy(self, *, to_device: bool, passing: bool) -> None:
        kind = "to device, in passing" if to_device and passing else "to device" if to_device else "to host"
        self.note(kind, "copy")

    def _check(self, func: Any, name: str, tensors: list[Tensor]) -> None:
        """Raise what a GPU raises for a kernel that it lacks, and for arguments on two devices."""
        kind = self.kind.upper()
        if func.namespace in ("mkldnn", "onednn") or "mkldnn" in name or "_cpu" in name:
            raise NotImplementedError(f"Could not run '{func}' with arguments from the '{kind}' backend.")
        if self.kind == "mps" and name in ("sampled_addmm", "sparse_sampled_addmm"):
            raise NotImplementedError(f"Could not run '{func}' with arguments from the '{kind}' backend.")
        if self.kind == "mps" and name in ("index_add", "index_add_") and tensors[-1].dtype == torch.int64:
            raise RuntimeError("index_add(): Expected non int64 dtype for source on MPS.")  # of older versions
        takes_scalars = torch.Tag.pointwise in func.tags or name in SCALARS_OF_THE_HOST
        others = [t for t in tensors if not isinstance(t, PretendTensor)]
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):  # places may come from the host
            others = [t for t in others if t.dtype not in (torch.int64, torch.int32, torch.bool, torch.uint8)]
        if name == "_fused_adam_" or any(t.ndim or not takes_scalars for t in others):
            if not others:
                return
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {self.name} and cpu! "
                f"(in {func})"
            )

    def _count(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Write down how often the host waits in a kernel."""
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.note("waits", name)
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
            indices = [i for i in args[1] if i is not None]
            masks = [i for i in indices if i.dtype in (torch.bool, torch.uint8)]
            filled = name.startswith(("index_put", "_index_put")) and not args[2].ndim and len(indices) == 1
            if not filled:
                self.note("waits", f"{name} by a mask", len(masks))
            self.note("to device", f"places of {name}", sum(not isinstance(i, PretendTensor) for i in indices))
        else:
            self.note("waits", name, WAITS.get(name, 0))


def tell(events: list[Event]) -> dict[str, int]:
    """How often each function waited for what: `objective.add_gradients: _local_scalar_dense` -> 2."""
    return dict(sorted(Counter(f"{event.place}: {event.what}" for event in events).items()))
