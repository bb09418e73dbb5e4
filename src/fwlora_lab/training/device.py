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
    """Bytes; without limit where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf


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
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
