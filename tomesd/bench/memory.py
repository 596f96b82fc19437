"""How much memory a call takes, and how much there is."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import torch

PROC = Path("/proc/self")


def available(device: str) -> int | None:
    """Bytes that can still be had on a device; None where that is not known."""
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if torch.device(device).type != "cpu":
        return None
    return _bytes(Path("/proc/meminfo"), "MemAvailable")


def peak(call: Callable[[], object], device: str) -> float | None:
    """MiB that a call needs at most, beyond what stood before it; None where that cannot be told."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if torch.device(device).type != "cpu":
        return None
    _give_back()
    try:
        (PROC / "clear_refs").write_text("5")  # the high-water mark falls to what is held now
    except OSError:
        return None
    held = _bytes(PROC / "status", "VmHWM")
    call()
    reached = _bytes(PROC / "status", "VmHWM")
    return None if held is None or reached is None else (reached - held) / 2**20


def _bytes(file: Path, name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s*(\d+) kB", file.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _give_back() -> None:
    # What the allocator keeps for later counts as held, and would be missing from what a call adds.
    with contextlib.suppress(OSError, AttributeError, TypeError):  # where there is no glibc
        ctypes.CDLL(None).malloc_trim(0)
