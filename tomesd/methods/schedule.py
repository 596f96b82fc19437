"""How many tokens each layer merges."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, TypeAlias

from .options import integer

R: TypeAlias = int | float | tuple[int | float, float] | list[int] | list[float]
FORMS = "an integer, a share below 1, one of them with an inflection (r, inflection), or a list of one kind"


def parse_r(layers: int, r: R) -> list[int | float]:
    """The number of tokens to remove in each of `layers` layers, or the share.

        parse_r(4, 8)  # [8, 8, 8, 8]
        parse_r(4, (8, -1.0))  # [16, 10, 5, 0]
        parse_r(4, 0.1)  # [0.1, 0.1, 0.1, 0.1]: a tenth of the patches that are left at each layer

    Args:
        layers: how many layers there are.
        r: one number for all of them; `(r, inflection)` with an inflection from -1 to 1, which runs linearly
            from `r * (1 - inflection)` in the first layer to `r * (1 + inflection)` in the last, so
            `(r, -1.0)` from 2r to 0; or a list of one number for each layer, in which missing ones are 0.
            Integers are tokens. Floats from 0 to below 1 are shares of the tokens that may merge and have
            not yet: whatever the size of the image, each layer then leaves `1 - r` of them.

    Raises:
        TypeError: r is none of these, or `layers` no integer.
        ValueError: a negative number, an inflection out of range, or more numbers than layers.

    Source: Bolya et al., Token Merging: Your ViT But Faster, 2023.
    """
    layers = integer("layers", layers, least=0)
    numbers = r if isinstance(r, tuple | list) else (r,)
    if any(isinstance(number, bool) for number in numbers):
        raise TypeError(f"r must be {FORMS}, got {r!r}")
    each: list[int | float]
    if isinstance(r, tuple) and len(r) == 2 and _kind(r[0]) and isinstance(r[1], Real):
        mean, inflection = r[0], float(r[1])
        if not -1 <= inflection <= 1:
            raise ValueError(f"the inflection of r must be from -1 to 1, got {inflection} in {r}")
        kind = int if isinstance(mean, Integral) else float
        first = kind(mean * (1 - inflection))
        step = 2 * (mean - first) / max(1, layers - 1)
        each = [kind(first + step * layer) for layer in range(layers)]
        if kind is float and mean >= 0:  # no layer merges more than half, nor less than nothing by rounding
            each = [min(max(share, 0.0), 0.5) for share in each]
    elif isinstance(r, list) and all(map(_kind, r)) and len({_kind(n) for n in r if n}) <= 1:
        if len(r) > layers:
            raise ValueError(f"r has {len(r)} numbers for {layers} layers")
        plain = float if any(n and _kind(n) == "share" for n in r) else int  # 0 is either
        each = [plain(n) for n in [*r, *[0] * (layers - len(r))]]
    elif _kind(r):
        each = [_plain(r)] * layers
    else:
        raise TypeError(f"r must be {FORMS}, got {r!r}")
    if each and min(each) < 0:
        raise ValueError(f"r must not be negative, got {r}")
    return each


def _kind(number: Any) -> str:
    """Whether a number is one of tokens or a share of them; else nothing."""
    if isinstance(number, Integral):
        return "tokens"
    return "share" if isinstance(number, Real) and -math.inf < float(number) < 1 else ""


def _plain(number: Any) -> int | float:
    return int(number) if isinstance(number, Integral) else float(number)
