"""Checks of options: what is returned is plain Python, which torch.compile takes as a constant."""

from __future__ import annotations

import reprlib
import sys
import warnings
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any


def wrong_type(name: str, words: str, value: object) -> TypeError:
    """The error for an option of the wrong type."""
    return TypeError(f"{name} must be {words}, got {reprlib.repr(value)} ({type(value).__name__})")


def number(name: str, value: Any, words: str = "a number") -> float:
    # A bool is an integer to Python, but ratio=True is a slip.
    if not isinstance(value, Real) or isinstance(value, bool):
        raise wrong_type(name, words, value)
    return float(value)


def integer(name: str, value: Any, least: int | None = None, words: str = "an integer") -> int:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise wrong_type(name, words, value)
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def integer_or_none(name: str, value: Any) -> int | None:
    return None if value is None else integer(name, value, words="an integer or None")


def boolean(name: str, value: Any, words: str = "a bool") -> bool:
    if not isinstance(value, bool):
        raise wrong_type(name, words, value)
    return value


def boolean_or_none(name: str, value: Any) -> bool | None:
    return None if value is None else boolean(name, value, "a bool or None")


def one_of(name: str, value: Any, known: Sequence[Any]) -> Any:
    if type(value) is not type(known[0]) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}")
    return value


def share(value: Any, limits: str) -> float:
    """A ratio, within the limits `"[0, 1]"` or `"[0, 1)"`."""
    ratio = number("ratio", value)
    if not 0 <= ratio <= 1 or (limits.endswith(")") and ratio == 1):
        raise ValueError(f"ratio must be in {limits}, the share of tokens to save, got {ratio:g}")
    return ratio


def capped_share(value: Any, sx: int, sy: int) -> float:
    """A ratio, at most what one dst in each cell of `sx` x `sy` tokens allows."""
    ratio, most = share(value, "[0, 1]"), 1 - 1 / (sx * sy)
    if ratio > most:
        warnings.warn(
            f"ratio {ratio:g} is above {most:g}, the most that one dst in each {sx} x {sy} cell allows "
            f"(1 - 1 / (sx * sy)): {most:g} of the tokens merge. Larger sx or sy allow more",
            UserWarning,
            stacklevel=_level_of_caller(),
        )
    return min(ratio, most)


def _level_of_caller() -> int:
    """How far up the stack, from who asks, is the code that called this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("tomesd."):
        level, frame = level + 1, frame.f_back
    return level
