"""Checks of options: what is returned is plain Python, which torch.compile takes as a constant."""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from ..hosts.hooks import level_of_user


def shown(value: object) -> str:
    """A value as errors show it: short, in one line."""
    try:
        return " ".join(reprlib.repr(value).split())
    except ValueError:  # Python prints no integers of thousands of digits
        return "one that is too long to show"


def wrong_type(name: str, words: str, value: object) -> TypeError:
    """The error for an option of the wrong type."""
    return TypeError(f"{name} must be {words}, got {shown(value)} ({type(value).__name__})")


def number(name: str, value: Any, words: str = "a number") -> float:
    # A bool is an integer to Python, but ratio=True is a slip.
    if not isinstance(value, Real) or isinstance(value, bool):
        raise wrong_type(name, words, value)
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is too large a number: {shown(value)}") from None


def integer(name: str, value: Any, least: int | None = None, words: str = "an integer") -> int:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise wrong_type(name, words, value)
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {shown(int(value))}")
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
        raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {shown(value)}")
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
            stacklevel=level_of_user(),
        )
    return min(ratio, most)
