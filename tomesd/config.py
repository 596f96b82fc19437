"""Every option of apply_patch, checked once."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

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
    merge_stage: bool = False
    reuse: int = 0
    auto: bool = False
    prop_attn: bool = False
    keys_only: bool = False

    def __post_init__(self) -> None:
        self._become("ratio", float, Real, "a number")
        for name in ("sx", "sy", "seed", "reuse"):
            self._become(name, int, Integral, "an integer")
        if self.max_downsample is not None:
            self._become("max_downsample", int, Integral, "an integer or None")
        for name in (
            "use_rand",
            "merge_attn",
            "merge_crossattn",
            "merge_mlp",
            "merge_stage",
            "auto",
            "prop_attn",
            "keys_only",
        ):
            self._become(name, bool, bool, "a bool")
        self._become("matching", str, str, "a string")
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio must be in [0, 1), the share of tokens to merge, got {self.ratio}")
        for name in ("sx", "sy"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.ratio > self.max_ratio and self.matches:
            raise ValueError(
                f"ratio {self.ratio} is above {self.max_ratio:g}, the most that one dst in each "
                f"{self.sx} x {self.sy} cell allows (1 - 1 / (sx * sy)): lower it or raise sx or sy"
            )
        if self.max_downsample not in (None, *DOWNSAMPLES):
            raise ValueError(
                f"max_downsample must be None (the finest level with attention) or one of "
                f"{', '.join(map(str, DOWNSAMPLES))}, got {self.max_downsample}"
            )
        if not self.parts:
            raise ValueError(
                "nothing to merge: merge_attn, merge_crossattn, merge_mlp and merge_stage are all False"
            )
        if self.keys_only and (self.merge_stage or not self.merge_attn):
            raise ValueError(
                "keys_only=True is about keys and values of self-attention: it needs merge_attn=True, and a "
                "whole stage (merge_stage=True) merges more than that"
            )
        if self.keys_only and self.prop_attn:
            raise ValueError(
                "prop_attn=True weighs keys that have merged, with keys_only=True none do: use one"
            )
        if self.reuse < 0:
            raise ValueError(f"reuse must be at least 0, the number of steps a plan lasts, got {self.reuse}")
        if self.matching not in MATCHINGS:
            raise ValueError(f"matching must be one of {', '.join(MATCHINGS)}, got {self.matching!r}")

    @property
    def max_ratio(self) -> float:
        """The largest ratio that leaves one dst in each cell."""
        return 1 - 1 / (self.sx * self.sy)

    @property
    def matches(self) -> bool:
        """Whether any part merges tokens by their likeness."""
        return not (self.keys_only and self.parts == ("attn1",))

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts of a block that see merged tokens."""
        wanted = {"attn1": self.merge_attn, "attn2": self.merge_crossattn, "ff": self.merge_mlp}
        return tuple(name for name, merge in wanted.items() if merge or self.merge_stage)

    def _become(self, name: str, kind: type, accepted: type, words: str) -> None:
        """Checks an option's type and makes it plain Python, which torch.compile can take as a constant."""
        value: Any = getattr(self, name)
        # A bool is an integer to Python, but ratio=True is a slip.
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise TypeError(f"{name} must be {words}, got {reprlib.repr(value)} ({type(value).__name__})")
        object.__setattr__(self, name, kind(value))
