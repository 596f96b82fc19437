"""Where the tokens of an image receive, what plan they share, and how long that lasts."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .config import MergeConfig
from .matching import Windows, match_exact, match_windowed
from .partition import Grid, cell_offsets, thin_out
from .token_map import TokenMap


@dataclass(eq=False)
class Layout:
    """An image of some size: who receives there (`[1 or B, cells]`), and the plans that blocks share.

    `keys` is the plan of `keys_only`, which does not depend on the tokens; `map` that of `reuse`.
    """

    grid: Grid
    dst: Tensor
    windows: Windows | None
    keys: TokenMap | None = None
    map: TokenMap | None = None

    @classmethod
    def of(cls, image: Tensor, config: MergeConfig, timestep: Tensor | float) -> Layout:
        """The layout of an image `[B, C, h, w]`, one dst in each cell by (seed, timestep, cell)."""
        device = image.device
        grid = Grid(image.shape[-2], image.shape[-1], config.sy, config.sx)
        if config.use_rand:
            if isinstance(timestep, Tensor) and timestep.numel() > 1:
                # One timestep per sample; a video network gives all frames of a sample the same.
                each, rest = divmod(image.shape[0], timestep.numel())
                timestep = timestep.flatten()[:1] if rest else timestep.flatten().repeat_interleave(each)
            offset = cell_offsets(grid.cells, grid.sy * grid.sx, config.seed, timestep, device)
        else:
            offset = torch.zeros(1, 1, dtype=torch.int64, device=device)
        windowed = config.matches and config.matching == "windowed"
        windows = Windows.of(grid, device=device) if windowed else None
        keys = thinned(grid, config, timestep if config.use_rand else 0, device) if config.keys_only else None
        return cls(grid, grid.dst(offset), windows, keys)

    def fits(self, image: Tensor) -> bool:
        """Whether it was made for an image `[B, C, h, w]` like this one."""
        same = (self.grid.h, self.grid.w) == tuple(image.shape[-2:]) and self.dst.device == image.device
        return same and self.dst.shape[0] in (1, image.shape[0])

    def plan(self, x: Tensor, config: MergeConfig) -> TokenMap:
        """Which of the tokens `x` `[B, h * w, C]` of the image merge."""
        if self.keys is not None and not config.matches:
            return self.keys
        r = self.grid.r(config.ratio)
        if r == 0:
            return TokenMap.identity(x.shape[1], x.device)
        if self.map is not None and self.map.fits(x):
            return self.map
        if self.windows is not None:
            token_map = match_windowed(x, self.windows, self.dst, r)
        else:
            token_map = match_exact(x, self.grid.partition(self.dst), r)
        if config.reuse:
            self.map = token_map
        return token_map


def keys_left(grid: Grid, ratio: float) -> int:
    """How many keys have as many products with all queries as tokens would have after merging this share."""
    n = grid.h * grid.w
    return max(1, round((n - int(ratio * n)) ** 2 / n))


def thinned(grid: Grid, config: MergeConfig, timestep: Tensor | float, device: torch.device) -> TokenMap:
    """The keys that `keys_only` leaves: a random sample, one of each cell that is as large as that allows."""
    n, left = grid.h * grid.w, keys_left(grid, config.ratio)
    if left == n:
        return TokenMap.identity(n, device)
    while grid.cells > left:
        grid = Grid(grid.h, grid.w, 2 * grid.sy, 2 * grid.sx)
    return TokenMap.from_pairs(n, *thin_out(grid, n - left, config.seed, timestep, device))


class Memory:
    """The layouts of a denoising loop, kept for as many steps as a plan lasts.

    Schedulers of diffusers hand out the timesteps of a loop as views of one tensor: its storage tells one
    loop from another, and the offset in it is the number of the step. So nothing is read from the device.
    Guidance halves that are called apart are told apart by their text. A plan is kept only from one step to
    the next; where a step comes twice with one text, several images are drawn at once, and each call plans.
    """

    def __init__(self) -> None:
        self.loop: torch.UntypedStorage | None = None
        self.halves: list[Half] = []

    def recall(self, timestep: object, text: object, steps: int) -> dict[int, Layout]:
        """The layouts of the calls before this one in a run of `steps` steps; empty in the first."""
        if not isinstance(timestep, Tensor):
            return {}
        try:
            loop, step = timestep.untyped_storage(), int(timestep.storage_offset())
        except NotImplementedError:  # inside of torch.func
            return {}
        if loop.nbytes() <= timestep.element_size():
            return {}  # a lone number does not tell which loop it belongs to
        if self.loop is None or self.loop.data_ptr() != loop.data_ptr():
            self.halves = []
        # The storage is kept alive, or the timesteps of another loop could come to stand at its address.
        self.loop = loop
        self.halves = [half for half in self.halves if half.text is None or half.text() is not None]
        half = next((half for half in self.halves if (half.text and half.text()) is text), None)
        if half is None:
            # The text itself would keep alive what it was computed from.
            half = Half(weakref.ref(text) if isinstance(text, Tensor) else None, step - 1)
            self.halves.append(half)
        half.several |= step == half.step
        if half.several or step != half.step + 1 or step % steps == 0:
            half.layouts = {}
        half.step = step
        return half.layouts

    def __reduce__(self) -> tuple[type[Memory], tuple[()]]:
        return Memory, ()  # copies start a loop of their own


@dataclass(eq=False)
class Half:
    """The calls of a denoising loop with one text."""

    text: Callable[[], Tensor | None] | None
    step: int
    several: bool = False
    layouts: dict[int, Layout] = field(default_factory=dict)
