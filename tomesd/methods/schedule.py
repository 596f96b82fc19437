"""How many tokens each layer merges."""

from __future__ import annotations

from numbers import Integral, Real
from typing import TypeAlias

R: TypeAlias = int | tuple[int, float] | list[int]


def parse_r(layers: int, r: R) -> list[int]:
    """The number of tokens to remove in each of `layers` layers.

    Args:
        layers: how many layers there are.
        r: one number for all of them; `(r, inflection)` with an inflection from -1 to 1, which runs linearly
            from `r * (1 - inflection)` in the first layer to `r * (1 + inflection)` in the last, so
            `(r, -1.0)` from 2r to 0; or a list of one number for each layer, in which missing ones are 0.

    Raises:
        TypeError: r is none of these.
        ValueError: a negative number, an inflection out of range, or more numbers than layers.

    Source: Bolya et al., Token Merging: Your ViT But Faster, 2023.
    """
    numbers = r if isinstance(r, tuple | list) else (r,)
    if any(isinstance(number, bool) for number in numbers):
        raise TypeError(f"r must be an integer, (integer, inflection) or a list of integers, got {r!r}")
    if isinstance(r, Integral):
        each = [int(r)] * layers
    elif isinstance(r, tuple) and len(r) == 2 and isinstance(r[0], Integral) and isinstance(r[1], Real):
        mean, inflection = int(r[0]), float(r[1])
        if not -1 <= inflection <= 1:
            raise ValueError(f"the inflection of r must be from -1 to 1, got {inflection} in {r}")
        first = int(mean * (1 - inflection))
        step = 2 * (mean - first) / max(1, layers - 1)
        each = [int(first + step * layer) for layer in range(layers)]
    elif isinstance(r, list) and all(isinstance(n, Integral) for n in r):
        if len(r) > layers:
            raise ValueError(f"r has {len(r)} numbers for {layers} layers")
        each = [int(n) for n in r] + [0] * (layers - len(r))
    else:
        raise TypeError(f"r must be an integer, (integer, inflection) or a list of integers, got {r!r}")
    if min(each) < 0:
        raise ValueError(f"r must not be negative, got {r}")
    return each
