"""Where a model runs: the device, the precision, and whether the processor multiplies bfloat16."""

import torch

from actcache.errors import SettingsError
from actcache.machine import available_bytes
from actcache.workers import find_worker

PRECISIONS = ("auto", "float32", "bfloat16")


def choose_device(device: str) -> torch.device:
    """`auto` is CUDA if available (each of several workers on a host takes its own GPU), else the CPU."""
    if device == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        worker = find_worker()
        return torch.device("cuda" if worker.alone else f"cuda:{worker.local_rank % torch.cuda.device_count()}")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error
    return chosen


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


def has_cpu_bfloat16() -> bool:
    """Whether the CPU has AVX-512 bf16 or AMX. Others emulate bfloat16, which is slower than float32."""
    return any(
        getattr(torch.cpu, probe, lambda: False)() for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
