"""A random sample of the tokens of an image, spread evenly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import RANGE, Grid, cell_offsets
from .token_map import TokenMap


def sample_size(n: int, ratio: float) -> int:
    """Number of keys that makes attention as cheap as merging a share `ratio` of n tokens: (n - r)^2 / n."""
    return max(1, round((n - int(ratio * n)) ** 2 / n))


def sample_tokens(
    h: int,
    w: int,
    left: int,
    seed: int,
    timestep: Tensor | float = 0,
    device: torch.device | None = None,
    number: int | Tensor | None = None,
) -> TokenMap:
    """The map that keeps a random sample of `left` of the tokens of an image, spread evenly.

    The image of `h` x `w` tokens is cut into cells as large as leave each at least one: it keeps as many as
    every other, give or take one, while it has any; which ones is random, by `seed` and `timestep` as for
    `cell_offsets`. With the `number` of the step, a cell keeps its tokens in turns, in a random order. Both
    may be tensors, of b timesteps and of `[b, 1]` numbers: then there are b samples.
    """
    n = h * w
    if left == n:
        return TokenMap.identity(n, device)
    side = 2
    while (grid := Grid(h, w, side, side)).cells > left:
        side *= 2
    return TokenMap.from_pairs(n, *_thin_out(grid, n - left, seed, timestep, device, number))


@dataclass(frozen=True, eq=False)
class Samples:
    """As many samples of the tokens of an image as steps are to choose from."""

    index: Tensor  # as of a `TokenMap`, int64 [P, N]
    keep: Tensor  # int64 [P, left]

    @classmethod
    def of(
        cls, h: int, w: int, left: int, seed: int, turns: bool, device: torch.device | None = None
    ) -> Samples:
        """Those of `sample_tokens` at as many timesteps; with `turns`, of the steps of these numbers."""
        each = torch.arange(how_many(h * w), device=device)
        made = sample_tokens(h, w, left, seed, each, device, each[:, None] if turns else None)
        return cls(made.index, made.keep)

    def __getitem__(self, row: int | Tensor) -> TokenMap:
        """A sample; of a tensor of them, one for each."""
        if isinstance(row, Tensor):
            row = row.reshape(-1)
            return TokenMap(self.index.index_select(0, row), self.keep.index_select(0, row))
        return TokenMap(self.index[row : row + 1], self.keep[row : row + 1])


def how_many(n: int) -> int:
    """How many samples of `n` tokens are kept: as many as 16 MiB hold, from 8 to 64."""
    return min(64, max(8, (1 << 21) // n))


def _thin_out(
    grid: Grid,
    r: int,
    seed: int,
    timestep: Tensor | float,
    device: torch.device | None,
    number: int | Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Which `r` tokens leave, and the first token of each's cell, which stays: src, dst, int64 `[b, r]`.

    Unlike those that receive, these cells share out all rows and columns, so some are larger by one.
    """
    y = torch.arange(grid.h, device=device) * grid.rows // grid.h
    x = torch.arange(grid.w, device=device) * grid.columns // grid.w
    cell = (y[:, None] * grid.columns + x).flatten()
    n = cell.shape[0]
    # Number the tokens of each cell in a random order: all firsts stay, then all seconds, and so on.
    drawn = cell_offsets(n, RANGE, seed, timestep if number is None else 0, device)
    order = (cell * RANGE + drawn).argsort(dim=1, stable=True)
    begin = torch.searchsorted(cell.sort().values, torch.arange(grid.cells + 1, device=device))
    home = cell[order]
    place = torch.arange(n, device=device) - begin[home]
    turn = cell_offsets(grid.cells, RANGE, seed + 1, timestep, device)
    b = turn.shape[0]
    order, home = order.expand(b, -1), home.expand(b, -1)
    if number is not None:
        used = number * ((n - r) // grid.cells)
        order = order.gather(1, begin[home] + (place + used) % (begin[home + 1] - begin[home]))
    leaving = (place * RANGE + turn.gather(1, home)).argsort(dim=1, stable=True)[:, n - r :]
    return order.gather(1, leaving), order.gather(1, begin[home].gather(1, leaving))
