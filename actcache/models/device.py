"""Where a model runs: the device, the precision, and whether the processor multiplies bfloat16."""

import torch

from actcache.errors import SettingsError
from actcache.machine import available_bytes
from actcache.workers import Worker, find_worker

PRECISIONS = ("auto", "float32", "bfloat16")


def choose_device(device: str) -> torch.device:
    """`auto` is `cuda` if there is a GPU, else the CPU. Of `cuda`, each of several workers on a host takes its own."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error
    if chosen == torch.device("cuda"):
        return own_gpu(find_worker(), torch.cuda.device_count())
    return chosen


def own_gpu(worker: Worker, n_visible: int) -> torch.device:
    """The GPU of one of several workers on a host. SLURM may show each of them a single GPU, which is number 0."""
    return torch.device("cuda" if worker.alone else f"cuda:{worker.local_rank % n_visible}")


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()


def choose_precision(precision: str, device: torch.device) -> str:
    """`auto` is bfloat16 for the branches if the hardware multiplies bfloat16, else float32."""
    if precision not in PRECISIONS:
        raise SettingsError(f"--precision must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if device.type == "cpu" and has_cpu_bfloat16() else "float32"


def precise_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums over many numbers: float64, or float32 on a device that has no float64 (MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


def has_cpu_bfloat16() -> bool:
    """Whether the CPU has AVX-512 bf16 or AMX. Others emulate bfloat16, which is slower than float32."""
    return any(
        getattr(torch.cpu, probe, lambda: False)() for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
