"""What a device can do, asked once for each, and its clock; who traces, compiles or exports what runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch.torch_version import TorchVersion

# Before, torch.compile does not know guard_scalar, and few versions need it.
HAS_CONSTANTS = TorchVersion(torch.__version__) >= TorchVersion("2.8")
Result = TypeVar("Result")


def is_traced() -> bool:
    """Whether TorchScript traces what runs."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call] # pyright: ignore


def is_exported() -> bool:
    """Whether torch.export makes a program of what runs."""
    return bool(getattr(torch.compiler, "is_exporting", bool)())  # not in torch 2.4


def constant(number: Any) -> Any:
    """A number, for each value of which torch.compile is to make a program.

    Once a number has changed it takes it for a symbol, and shapes that follow from that compile for minutes.
    """
    if HAS_CONSTANTS and torch.compiler.is_compiling() and isinstance(number, int | float):
        from torch.fx.experimental.symbolic_shapes import guard_scalar  # takes long to import

        return guard_scalar(number)
    return number


@contextmanager
def untraced() -> Iterator[None]:
    """What TorchScript takes for constants."""
    tracing: Any = torch._C
    state = tracing._get_tracing_state()
    tracing._set_tracing_state(None)
    try:
        yield
    finally:
        tracing._set_tracing_state(state)


def synchronize(device: str | torch.device) -> None:
    """Waits until a device has done all that it was told to do."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    else:
        getattr(torch, device.type).synchronize()


def timed(call: Callable[[], Result], device: str | torch.device) -> tuple[Result, float]:
    """The result of a call, and its seconds on a device."""
    synchronize(device)
    begin = time.perf_counter()
    result = call()
    synchronize(device)
    return result, time.perf_counter() - begin


def has_bags(device: torch.device) -> bool:
    """Whether it sums bags of rows: MPS does from torch 2.10 on, what is exported to ONNX does not."""
    to_onnx = is_traced() or (is_exported() and torch.onnx.is_in_onnx_export())
    return not to_onnx and _can(_sum_bags, device)


def has_cholesky(device: torch.device) -> bool:
    """Whether it solves by Cholesky's factors."""
    return _can(_solve, device)


def _can(operation: Callable[[torch.device], object], device: torch.device) -> bool:
    if torch.compiler.is_compiling():  # where nothing can be tried
        return device.type in ("cpu", "cuda")
    return _tried(operation, device.type)


@cache
def _tried(operation: Callable[[torch.device], object], kind: str) -> bool:
    try:
        operation(torch.device(kind))
    except (NotImplementedError, RuntimeError):
        return False
    return True


def _sum_bags(device: torch.device) -> object:
    rows, order = torch.zeros(2, dtype=torch.int64, device=device).sort(stable=True)
    ends = torch.searchsorted(rows, torch.arange(2, device=device))
    return F.embedding_bag(order, torch.ones(2, 1, device=device), offsets=ends[:-1], mode="mean")


def _solve(device: torch.device) -> object:
    one = torch.ones(1, 1, 1, device=device)
    return torch.cholesky_solve(one, torch.linalg.cholesky_ex(one).L)
