"""Where training runs: device, precision, and memory."""

from __future__ import annotations

import contextlib
import math
import resource
import sys
from pathlib import Path

import torch

from fwlora_lab.config.schema import RunConfig


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies matrices in bf16 by its own instructions; without them bf16 is slower than fp32."""
    has = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def pick_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def free_memory(device: torch.device) -> float:
    """Bytes that this process may still take; without limit where the system does not tell.

    On a CPU the least of what the machine has, what a control group allows (containers, SLURM), and what `ulimit -v`
    allows.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = _kilobytes("/proc/meminfo", "MemAvailable")
    with contextlib.suppress(OSError, ValueError):  # ValueError: the limit is "max"
        group = Path("/sys/fs/cgroup")
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        free = min(free, limit - _kilobytes("/proc/self/status", "VmSize", default=0.0))
    return max(0.0, free)


def _kilobytes(file: str, name: str, default: float = math.inf) -> float:
    """An entry of one of Linux's tables of sizes, in bytes; `default` where there is none."""
    try:
        lines = Path(file).read_text().splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
    except (OSError, StopIteration):
        return default


class TooLittleMemory(Exception):
    """A run does not fit into the memory, alone; the message has figures and the cure."""

    def __init__(self, error: BaseException, needed: float | None, device: torch.device) -> None:
        free = free_memory(device)
        has = f"; {free / 2**20:,.0f} MiB are free now" if math.isfinite(free) else ""
        asked = "" if needed is None else f"one step of this run alone takes about {needed / 2**20:,.0f} MiB, "
        super().__init__(
            f"too little memory: {asked}{self._cause(error)}{has}. Set a smaller training.batch_size with more "
            "training.gradient_accumulation_steps, or a smaller dataset.max_length."
        )

    @staticmethod
    def _cause(error: BaseException) -> str:
        lines = str(error).strip().splitlines()
        return lines[0].rstrip(".") if lines else "the system gave none"


def in_bf16(cfg: RunConfig, device: torch.device) -> bool:
    """Whether the encoder computes in bf16: asked for, and the device has instructions for it."""
    return cfg.training.mixed_precision == "bf16" and (device.type == "cuda" or cpu_has_bf16())


def autocast_for(cfg: RunConfig, device: torch.device) -> contextlib.AbstractContextManager[object]:
    if in_bf16(cfg, device):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def forget_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # Linux counts the resident peak anew from here; elsewhere it is that of the process.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    highest = _kilobytes("/proc/self/status", "VmHWM", default=0.0)
    if highest:
        return int(highest)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
