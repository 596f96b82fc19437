"""Constants on a device, made once: positions 0, 1, 2, ..., and other small tables."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from .devices import is_traced

# Captured graphs go on reading what has been handed out, so that tables only grow in number.
_positions: dict[torch.device, list[Tensor]] = {}
_tables: dict[Hashable, Tensor] = {}


def up_to(n: int, device: torch.device) -> Tensor:
    """`torch.arange(n)`, to be read alone."""
    if torch.compiler.is_compiling() or is_traced():
        return torch.arange(n, device=device)
    tables = _positions.setdefault(device, [])
    if not tables or len(tables[-1]) < n:
        with torch.inference_mode(False):  # or training could not use it afterwards
            made = torch.arange(max(n, 2 * len(tables[-1]) if tables else 1 << 14), device=device)
        if type(made) is not Tensor:  # of FakeTensorMode, say
            return made[:n]
        tables.append(made)
    return tables[-1][:n]


def kept(key: Hashable, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """A small table, to be read alone, which `make` makes at the first call of this key and device."""
    if torch.compiler.is_compiling() or is_traced():
        return make()
    if (key, device) not in _tables:
        with torch.inference_mode(False):  # as above
            made = make()
        if type(made) is not Tensor:
            return made
        _tables[key, device] = made
    return _tables[key, device]
