"""The names of tomesd 0.1.3's `tomesd.utils`, for code that imports them."""

from __future__ import annotations

import torch

from .hosts.family import is_named

__all__ = ["init_generator", "isinstance_str"]


def isinstance_str(x: object, cls_name: str) -> bool:
    """Whether a class of this name is among the ancestors of `x`: a class is known without importing it."""
    return is_named(x, (cls_name,))


def init_generator(device: torch.device | str, fallback: torch.Generator | None = None) -> torch.Generator:
    """A generator that goes on from where the default one of a device is, without moving that.

    Args:
        device: for others than the CPU and CUDA, whose state cannot be had, `fallback` is returned, or else
            one of the CPU.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.Generator(device).set_state(torch.cuda.get_rng_state(device))
    if device.type != "cpu" and fallback is not None:
        return fallback
    return torch.Generator("cpu").set_state(torch.get_rng_state())
