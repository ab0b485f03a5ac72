"""The processes that train one SAE together (torchrun): sums and gathers over all of them.

In a run of one process these functions do nothing.
"""

import atexit
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist

from actcache import IncompleteError, SettingsError
from actcache.models import own_gpu
from actcache.workers import find_worker

LEAVE_S = 10
"""Seconds that a process waits for the others before it leaves the group."""
_lost = False
"""Whether this process has noticed that a neighbor ended."""


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def all_sum(value: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place."""
    if world_size() > 1:
        with _together():
            dist.all_reduce(value)
    return value


def copy_first(tensors: Iterable[Tensor]) -> None:
    """Copy the first process's values to every other process, in place."""
    if world_size() > 1:
        with _together():
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)


def all_gather(value: Tensor) -> list[Tensor]:
    """Gather one tensor [N] from every process, in the order of ranks; N may differ between them."""
    if world_size() == 1:
        return [value]
    sizes = [torch.zeros(1, dtype=torch.int64, device=value.device) for _ in range(world_size())]
    with _together():
        dist.all_gather(sizes, torch.tensor([len(value)], device=value.device))
        padded = value.new_zeros(max(int(size) for size in sizes))
        padded[: len(value)] = value
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded)
    return [part[: int(size)] for part, size in zip(gathered, sizes, strict=True)]


@contextmanager
def _together() -> Iterator[None]:
    """Turn the error of a neighbor that has ended into one line."""
    global _lost
    try:
        yield
    except RuntimeError as error:  # DistError is one
        _lost = True
        reason = " ".join(str(error).split())[:160].rstrip(".")
        raise IncompleteError(
            f"Another process of this training has ended, or cannot be reached ({reason}). Run the same command again: "
            "it resumes from the last checkpoint."
        ) from error


def join_processes(device: torch.device) -> torch.device:
    """Connect to the other processes that the launcher started. Returns the device of this process.

    Raises:
        SettingsError: the launcher's variables contradict each other, or MASTER_ADDR and MASTER_PORT are missing.
    """
    worker = find_worker()
    if worker.alone:
        return device
    if not {"MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        raise SettingsError(
            f"This is one of {worker.world_size} processes, which meet at MASTER_ADDR and MASTER_PORT, but these are "
            "not both set. Start `train` with torchrun, or set both. A run of one process needs neither."
        )
    if device.type == "cuda":
        device = own_gpu(worker, torch.cuda.device_count())
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        with _together():
            dist.init_process_group(backend, rank=worker.rank, world_size=worker.world_size)
        atexit.register(_leave_processes)
    return device


def _leave_processes() -> None:
    """Leave the group before the process exits, and together: gloo's threads abort a process that exits while they run
    (1 start in 12), or, less often, one whose neighbor has left before it (3 in 49). Where a neighbor has ended, nobody
    can leave together, so the process ends at once, as failed, before gloo's threads are torn down."""
    if _lost:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    if dist.is_initialized():
        if dist.get_backend() == "gloo":
            with suppress(RuntimeError):  # a neighbor that failed does not come
                dist.monitored_barrier(timeout=timedelta(seconds=LEAVE_S))
        dist.destroy_process_group()


def wait_for_all() -> None:
    if world_size() > 1:
        with _together():
            dist.barrier()


def any_of_all(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process."""
    return bool(flag) if world_size() == 1 else bool(all_sum(torch.tensor(int(flag), device=device)) > 0)
