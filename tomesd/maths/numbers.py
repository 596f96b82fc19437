"""Positions 0, 1, 2, ... on a device: one table for all that count."""

from __future__ import annotations

import torch
from torch import Tensor

from .devices import is_traced

# Captured graphs go on reading what has been handed out, so that tables only grow in number.
_tables: dict[torch.device, list[Tensor]] = {}


def up_to(n: int, device: torch.device) -> Tensor:
    """`torch.arange(n)`, to be read alone."""
    if torch.compiler.is_compiling() or is_traced():
        return torch.arange(n, device=device)
    tables = _tables.setdefault(device, [])
    if not tables or len(tables[-1]) < n:
        with torch.inference_mode(False):  # or training could not use it afterwards
            made = torch.arange(max(n, 2 * len(tables[-1]) if tables else 1 << 14), device=device)
        if type(made) is not Tensor:  # of FakeTensorMode, say
            return made[:n]
        tables.append(made)
    return tables[-1][:n]
