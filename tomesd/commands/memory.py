"""How much memory a call takes, how much there is, and what becomes of what is freed."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import torch

PROC = Path("/proc/self")
WITHOUT_GLIBC = OSError, AttributeError, TypeError
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed() -> None:
    """Makes this process keep the memory that it frees, as PyTorch does on a GPU.

    The allocator of Linux hands large pieces back at once, and each step of a network gets them again page
    by page.
    """
    with contextlib.suppress(*WITHOUT_GLIBC):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def available(device: str | torch.device) -> int | None:
    """Bytes that can still be had on a device; None where that is not known."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _read(Path("/proc/meminfo"), "MemAvailable") if device.type == "cpu" else None


class Peak:
    """Watches the memory of a device inside a `with` block: of the GPU's allocator, or of this process.

    Garbage that waits to be collected counts as in use: `gc.collect()` before it makes figures comparable.

    Attributes:
        before: bytes in use at the beginning; None where that is not known.
        reached: bytes in use at most; None likewise, and until the end.
    """

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self.before: int | None = None
        self.reached: int | None = None

    @property
    def added(self) -> float | None:
        """MiB needed at most beyond those in use at the beginning."""
        if self.before is None or self.reached is None:
            return None
        return (self.reached - self.before) / 2**20

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        elif self.device.type == "cpu":
            # What the allocator keeps for later would be missing from what is added.
            with contextlib.suppress(*WITHOUT_GLIBC):
                ctypes.CDLL(None).malloc_trim(0)
            with contextlib.suppress(OSError):
                (PROC / "clear_refs").write_text("5")  # the high-water mark falls to what is held now
                self.before = _read(PROC / "status", "VmHWM")
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.reached = torch.cuda.max_memory_allocated(self.device)
        elif self.before is not None:
            self.reached = _read(PROC / "status", "VmHWM")


def peak(call: Callable[[], object], device: str | torch.device) -> float | None:
    """MiB that a call needs at most, beyond those in use before it; None where that is not known."""
    with Peak(device) as watched:
        call()
    return watched.added


def kind(device: str | torch.device) -> str:
    """What `Peak` measures on a device."""
    return "GPU memory" if torch.device(device).type == "cuda" else "process memory"


def _read(file: Path, name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s*(\d+) kB", file.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
