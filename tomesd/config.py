"""Every option of apply_patch, checked once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Literal

DOWNSAMPLES = (1, 2, 4, 8)
MATCHINGS = ("exact", "windowed")


@dataclass(frozen=True)
class MergeConfig:
    """What to merge, how much and how. `apply_patch` explains each option.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an option outside of its range.
    """

    ratio: float = 0.5
    max_downsample: int | None = None
    sx: int = 2
    sy: int = 2
    use_rand: bool = True
    merge_attn: bool = True
    merge_crossattn: bool = False
    merge_mlp: bool = False
    seed: int = 0
    matching: Literal["exact", "windowed"] = "windowed"

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_type(field.name, getattr(self, field.name))
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio must be in [0, 1), the share of tokens to merge, got {self.ratio}")
        for name in ("sx", "sy"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.ratio > self.max_ratio:
            raise ValueError(
                f"ratio {self.ratio} is above {self.max_ratio:g}, the most that one dst in each "
                f"{self.sx} x {self.sy} cell allows (1 - 1 / (sx * sy)): lower it or raise sx or sy"
            )
        if self.max_downsample not in (None, *DOWNSAMPLES):
            raise ValueError(
                f"max_downsample must be None (the finest level with attention) or one of "
                f"{', '.join(map(str, DOWNSAMPLES))}, got {self.max_downsample}"
            )
        if not (self.merge_attn or self.merge_crossattn or self.merge_mlp):
            raise ValueError("nothing to merge: merge_attn, merge_crossattn and merge_mlp are all False")
        if self.matching not in MATCHINGS:
            raise ValueError(f"matching must be one of {', '.join(MATCHINGS)}, got {self.matching!r}")

    @property
    def max_ratio(self) -> float:
        """The largest ratio that leaves one dst in each cell."""
        return 1 - 1 / (self.sx * self.sy)


def _check_type(name: str, value: object) -> None:
    wanted: tuple[type, ...]
    if name in ("use_rand", "merge_attn", "merge_crossattn", "merge_mlp"):
        wanted, kind, right = (bool,), "a bool", isinstance(value, bool)
    elif name == "matching":
        wanted, kind, right = (str,), "a string", isinstance(value, str)
    else:
        wanted, kind = ((Real,), "a number") if name == "ratio" else ((Integral,), "an integer")
        right = isinstance(value, wanted) and not isinstance(value, bool)
        right = right or (name == "max_downsample" and value is None)
    if not right:
        raise TypeError(f"{name} must be {kind}, got {value!r} ({type(value).__name__})")
