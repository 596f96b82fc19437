"""What the tokens of a vision transformer have become, and how that travels with them from block to block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..maths.alternating import Step
from ..maths.token_map import TokenMap

Unmerge: TypeAlias = Literal["copy", "residual"]
# An attribute of the tokens that a block returns: their `State`.
STATE = "_tomesd_state"
# One of the tensor that they are a view of, or of themselves: their shape and strides, and the same.
VIEWED = "_tomesd_viewed"
# Of the merged tokens what `Merged` has, in plain tensors, as hidden states may be saved; and whether nobody
# looks at them before the last block.
State: TypeAlias = tuple[tuple[Tensor, Tensor, Tensor, Tensor | None] | None, bool]


@dataclass(eq=False)
class Merged:
    """What tokens have become."""

    map: TokenMap
    size: Tensor  # how many each one stands for, [B, M]
    apart: Tensor | None = None  # what told each of all tokens from its group when it merged, [B, N, C]

    @classmethod
    def by(cls, before: Merged | None, step: Step, x: Tensor, unmerge: Unmerge) -> Merged:
        """After a step of merging tokens `x`."""
        token_map = step.map if before is None else before.map.compose(step.map)
        if unmerge == "copy":
            return cls(token_map, step.size)
        apart = x - step.map.unmerge(step.tokens)
        if before is not None and before.apart is not None:
            apart = before.apart + before.map.unmerge(apart)
        return cls(token_map, step.size, apart)

    def give_back(self, x: Tensor) -> Tensor:
        """All tokens, from those that are left."""
        x = self.map.unmerge(x)
        return x if self.apart is None else x + self.apart

    def take(self, x: Tensor) -> Tensor:
        """Those that are left, from all tokens."""
        left = self.map.merge(x, "drop")
        return left if self.apart is None else left - self.map.merge(self.apart, "drop")

    @property
    def state(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self.map.index, self.map.keep, self.size, self.apart


def mark(x: Tensor, state: State) -> None:
    """Notes what the tokens that a block returns have become."""
    setattr(x, STATE, state)
    if not torch.compiler.is_compiling():
        setattr(_viewed(x), VIEWED, (x.shape, x.stride(), state))


def found_state(x: Tensor) -> State | None:
    """What the tokens of `x` have become, if a block has returned it, or what it is a plain view of.

    Backward hooks, FSDP and the like put a view in the place of what a module is given and returns.
    """
    if hasattr(x, STATE):  # not getattr with a default, which torch.compile does not guard
        state: State | None = getattr(x, STATE)
        return state
    if torch.compiler.is_compiling():
        return None
    shape, stride, of_view = getattr(_viewed(x), VIEWED, (None, None, None))
    return of_view if (shape, stride) == (x.shape, x.stride()) else None


def _viewed(x: Tensor) -> Tensor:
    return x if x._base is None else x._base


def state_of(x: Tensor, where: str) -> tuple[Merged | None, bool]:
    """What the tokens of `x` have become, and whether nobody looks at them before the last block."""
    state = found_state(x)
    if state is None:
        raise RuntimeError(
            f"tomesd: the tokens at {where} do not come straight from the block before it. Something between "
            "them made a new tensor: a hook, an adapter, a cast, or activation checkpointing with "
            "use_reentrant=True (use_reentrant=False works). Without it, or with model.r = 0, it runs"
        )
    carried, inside = state
    if carried is None:
        return None, inside
    index, keep, size, apart = carried
    if index.device != x.device:
        index, keep, size = (part.to(x.device) for part in (index, keep, size))
        apart = None if apart is None else apart.to(x.device)
    return Merged(TokenMap(index, keep), size, apart), inside
