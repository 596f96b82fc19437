"""Who may leave (src) and who receives (dst), and the stateless randomness behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .devices import is_traced

MASK = 0xFFFFFFFF
SHIFTS = 1 << 12  # by which a table of random numbers is moved from step to step
RANGE = 1 << 31  # of random numbers, so that a pair of one and a position fits int64
Bits = TypeVar("Bits", int, Tensor)


@dataclass(frozen=True, eq=False)
class Partition:
    """Positions of the tokens that may leave and of those that may receive them.

    Tokens in neither list are protected: they never merge. The leading dimension is 1 where all samples
    share the partition, else B.
    """

    src: Tensor  # int64 [1 or B, S]
    dst: Tensor  # int64 [1 or B, D]


def alternate(n: int, protected: int = 0, device: torch.device | None = None) -> Partition:
    """Even positions leave, odd ones receive; the first `protected` tokens do neither (ToMe for ViTs)."""
    positions = torch.arange(n, device=device)[None]
    odd = protected % 2
    return Partition(src=positions[:, protected + odd :: 2], dst=positions[:, protected + 1 - odd :: 2])


def every_kth(n: int, k: int, device: torch.device | None = None) -> Partition:
    """The last of every `k` tokens receives, all others leave."""
    positions = torch.arange(n, device=device)
    cells = n // k
    whole = positions[: cells * k].view(cells, k)
    src = torch.cat([whole[:, :-1].flatten(), positions[cells * k :]])
    return Partition(src[None], whole[None, :, -1])


def random_src(priority: Tensor, r: int, protected: int = 0) -> Partition:
    """The `r` tokens of lowest `priority` `[B, N]` leave, the others receive; protected ones do neither."""
    order = priority[:, protected:].argsort(dim=1, stable=True) + protected
    return Partition(src=order[:, :r], dst=order[:, r:])


@dataclass(frozen=True)
class Grid:
    """An image of `h` x `w` tokens cut into cells of `sy` x `sx`, one dst in each.

    Rows and columns that fill no whole cell are src only. A stride larger than the image is cut to it.
    """

    h: int
    w: int
    sy: int = 2
    sx: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "sy", min(self.sy, self.h))
        object.__setattr__(self, "sx", min(self.sx, self.w))

    @property
    def rows(self) -> int:
        """Number of cells in y."""
        return self.h // self.sy

    @property
    def columns(self) -> int:
        """Number of cells in x."""
        return self.w // self.sx

    @property
    def cells(self) -> int:
        """Number of cells, so of dst tokens."""
        return self.rows * self.columns

    @property
    def max_r(self) -> int:
        """Number of src tokens: the most that can leave."""
        return self.h * self.w - self.cells

    def r(self, ratio: float) -> int:
        """How many tokens leave when a share `ratio` of them is to: never more than there are src."""
        return min(int(ratio * self.h * self.w), self.max_r)

    def dst(self, offset: Tensor) -> Tensor:
        """Position of each cell's dst, given its `offset` in `[0, sy * sx)` within the cell: `[b, cells]`."""
        y = torch.arange(self.rows, device=offset.device)[:, None] * self.sy
        x = torch.arange(self.columns, device=offset.device)[None, :] * self.sx
        return (y * self.w + x).flatten() + self._apart(offset)

    def _apart(self, offset: Tensor) -> Tensor:
        """How far from the top left token of a cell its token of this `offset` is."""
        # Inductor does not see how small a remainder is, and fails on its own bounds of what follows.
        offset = offset.clamp(0, self.sy * self.sx - 1)
        return offset // self.sx * self.w + offset % self.sx

    def draws(self, seed: int | None, device: torch.device | None = None) -> Draws:
        """What the dst of any step are drawn from: with a seed of None, always the top left ones."""
        corners = self.dst(torch.zeros(1, 1, dtype=torch.int64, device=device))
        if seed is None:
            return Draws(corners)
        drawn = cell_offsets(self.cells + SHIFTS, self.sy * self.sx, seed, 0, device)[0]
        return Draws(corners, self._apart(drawn))

    def partition(self, dst: Tensor) -> Partition:
        """One dst in each cell, at its position `[b, cells]`; all other tokens are src."""
        taken = torch.zeros(dst.shape[0], self.h * self.w, dtype=torch.uint8, device=dst.device)
        src = taken.scatter(1, dst, 1).argsort(dim=1, stable=True)[:, : self.max_r]
        return Partition(src, dst)


@dataclass(frozen=True, eq=False)
class Draws:
    """A table of random numbers, of which each step takes another part: drawing costs next to nothing."""

    corners: Tensor  # position of the top left token of each cell, int64 [1, cells]
    table: Tensor | None = None  # how far from it a dst is, int64 [cells + SHIFTS]

    def dst(self, shift: Tensor) -> Tensor:
        """Position of the dst of each cell in steps of a `shift` `[b]`, int64 `[b, cells]`."""
        if self.table is None:
            return self.corners
        return self.table.unfold(0, self.corners.shape[1], 1).index_select(0, shift) + self.corners


def shift_of(timestep: Tensor | float, device: torch.device | None = None) -> Tensor:
    """A pseudo-random number in `[0, SHIFTS)` for a timestep, or for each of a tensor of b: int64 `[b]`."""
    if not isinstance(timestep, Tensor):
        timestep = torch.full((1,), timestep, dtype=torch.float32, device=device)
    bits = _bits(timestep.detach().to(device, torch.float32).reshape(-1))
    # Multiplicative hashing, by an odd number near 2^32 / 1.618; the high bits of the product are mixed best.
    return ((bits & MASK) * 0x9E3779B1 & MASK) >> 20


def number_of(timestep: Tensor) -> int | None:
    """Which of a scheduler's timesteps this is: those of a loop over them are views into their tensor.

    A slice of one may be of a batch's timesteps as well, which some hosts take apart: that is none.
    """
    one = timestep.dim() == 0 or (timestep.numel() > 1 and not any(timestep.stride()))
    try:
        table = timestep.untyped_storage().nbytes() > timestep.element_size()
    except NotImplementedError:  # of torch.func
        return None
    return int(timestep.storage_offset()) if one and table else None


def cell_offsets(
    cells: int, options: int, seed: int, timestep: Tensor | float = 0, device: torch.device | None = None
) -> Tensor:
    """A pseudo-random number in `[0, options)` for each cell, int64 `[b, cells]`.

    It depends on (seed, timestep, cell) alone: the same call gives the same numbers on any device and
    batch size, and no random generator is read or moved.

    Args:
        timestep: a number, or a tensor of one or b of them (a row of the result each).
    """
    if not isinstance(timestep, Tensor):
        timestep = torch.full((1,), timestep, dtype=torch.float32, device=device)
    cell = torch.arange(cells, device=device)[None]
    bits = _bits(timestep.detach().to(cell.device, torch.float32).reshape(-1, 1))
    key = _mix(_mix(seed & MASK) ^ ((seed >> 32) & MASK))
    return _mix(_mix(_mix(bits & MASK) ^ key) ^ cell) % options


def _bits(x: Tensor) -> Tensor:
    """The bits of float32 numbers, int64."""
    if not is_traced():
        return x.view(torch.int32).to(torch.int64)
    # TorchScript has no such view. The same by arithmetic, for all but the smallest numbers.
    fraction, exponent = torch.frexp(x)
    mantissa = ((fraction.abs() * 2 - 1) * (1 << 23)).to(torch.int64)
    bits = (x < 0) * (1 << 31) + (exponent.to(torch.int64) + 126) * (1 << 23) + mantissa
    return bits.where(x != 0, 0)


def _mix(x: Bits) -> Bits:
    """Scatters the bits of 32-bit values, held in a Python int or an int64 tensor."""
    # The multiplier is under 2^27, so that products of 32-bit values never overflow int64.
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & MASK
    return x ^ (x >> 16)
