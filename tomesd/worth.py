"""Does merging pay? Seconds of what runs on merged tokens, with and without, measured once for each shape.

Nothing of the host is called for this: stand-ins of the same layer shapes are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from .config import MergeConfig
from .layout import keys_left
from .matching import Windows, match_exact, match_windowed
from .partition import Grid, cell_offsets

# CLIP's context length, which cross-attention is taken to have.
TEXT_TOKENS = 77
# With more tokens than this self-attention outweighs windowed matching by far, and measuring would take long.
ALWAYS = 8192
ROUNDS = 7
# Seconds after which no further round begins.
PATIENCE = 0.3


# Rows of a matrix: a number of them, or tokens of the image: all of them, those that merging leaves, or those
# that are left as keys of all others.
Rows = int | Literal["all", "merged", "keys"]


@dataclass(frozen=True)
class Work:
    """What runs on the tokens of an image: shapes of the layers, and nothing of their values.

    Args:
        linears: rows, channels in and channels out of each linear layer.
        attentions: queries, keys, heads and channels of each head of each attention.
        merges: how often tokens are merged and given back.
    """

    linears: tuple[tuple[Rows, int, int], ...]
    attentions: tuple[tuple[Rows, Rows, int, int], ...]
    merges: int

    @classmethod
    def of(cls, blocks: list[nn.Module], parts: tuple[str, ...], config: MergeConfig) -> Work:
        """What the `parts` (of `attn1`, `attn2`, `ff`) of some transformer blocks are."""
        linears: list[tuple[Rows, int, int]] = []
        attentions: list[tuple[Rows, Rows, int, int]] = []
        for block in blocks:
            for name in parts:
                part: Any = getattr(block, name, None)
                if part is None:
                    continue
                if name == "ff":
                    linears += _linears(part, "merged")
                    continue
                queries, keys = _rows(block, name, config)
                before = len(linears)
                for layer, rows in (("to_q", queries), ("to_out", queries), ("to_k", keys), ("to_v", keys)):
                    linears += _linears(getattr(part, layer, None), rows)
                heads = getattr(part, "heads", None)
                if heads and len(linears) > before:
                    attentions.append((queries, keys, heads, linears[before][2] // heads))
        return cls(
            tuple(linears), tuple(attentions), 1 if config.merge_stage else len(parts) - config.keys_only
        )

    def flops(self, left: Left) -> float:
        """Floating point operations for an image of which so many tokens are left."""
        total = 0.0
        for rows, a, b in self.linears:
            total += 2 * left.count(rows) * a * b
        for queries, keys, heads, channels in self.attentions:
            total += 4 * left.count(queries) * left.count(keys) * heads * channels
        return total


class Left(NamedTuple):
    """Tokens of an image: all, those that merging leaves, and those that stay as keys of all."""

    all: int
    merged: int
    keys: int

    @classmethod
    def of(cls, grid: Grid, ratio: float) -> Left:
        n = grid.h * grid.w
        return cls(n, n - grid.r(ratio), keys_left(grid, ratio))

    def count(self, rows: Rows) -> int:
        count: int = getattr(self, rows) if isinstance(rows, str) else rows
        return count


def _rows(block: nn.Module, name: str, config: MergeConfig) -> tuple[Rows, Rows]:
    """Queries and keys of an attention."""
    cross = is_cross_attention(block, name)
    if name == "attn1" and config.keys_only:
        return "all", TEXT_TOKENS if cross else "keys"
    return "merged", TEXT_TOKENS if cross else "merged"


def is_cross_attention(block: nn.Module, name: str) -> bool:
    # CompVis' attention does not say what it is, its block does.
    otherwise = name == "attn2" or getattr(block, "disable_self_attn", False)
    return bool(getattr(getattr(block, name), "is_cross_attention", otherwise))


@dataclass(frozen=True)
class Trial:
    """Seconds of some work without and with merging, the planning included."""

    plain: float
    merged: float

    @property
    def pays(self) -> bool:
        return self.merged < self.plain

    def __str__(self) -> str:
        return f"measured {self.merged * 1000:.3g} ms with merging, {self.plain * 1000:.3g} ms without"


def pays(
    work: Work, config: MergeConfig, h: int, w: int, batch: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether merging makes this work on an image of `h * w` tokens faster."""
    large = h * w > ALWAYS and config.ratio >= 0.25 and question(config, h, w)[2] != "exact"
    if not work.linears or (large and any(isinstance(keys, str) for _, keys, *_ in work.attentions)):
        return True
    return trial(work, *question(config, h, w), batch, dtype, device).pays


def question(config: MergeConfig, h: int, w: int) -> tuple[Grid, float, str]:
    """What of the options the time depends on."""
    return Grid(h, w, config.sy, config.sx), config.ratio, config.matching if config.matches else "none"


@cache
def trial(
    work: Work,
    grid: Grid,
    ratio: float,
    matching: str,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Trial:
    """Measures some work on an image, in turns, and keeps the minima: a process measures each shape once."""
    # What counts, traces or fakes the host's operations has nothing to do with these.
    with _disable_current_modes(), torch.no_grad():
        ways = _ways(work, grid, ratio, matching, batch, dtype, device)
        for way in ways:
            way()
        taken: list[tuple[float, ...]] = []
        while len(taken) < ROUNDS and sum(map(sum, taken)) < PATIENCE:
            taken.append(tuple(_seconds(way, device) for way in ways))
    plain, merged = (min(seconds) for seconds in zip(*taken, strict=True))
    return Trial(plain, merged)


def _ways(
    work: Work, grid: Grid, ratio: float, matching: str, batch: int, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Two callables that do the work of one image without and with merging."""
    left = Left.of(grid, ratio)

    def fill(*shape: int) -> Tensor:
        return torch.arange(math.prod(shape), device=device).sin().to(dtype).view(shape)

    x = fill(batch, left.all, work.linears[0][1])
    weights = {(a, b): fill(b, a) for _, a, b in work.linears}

    def layers(left: Left) -> Callable[[], None]:
        def rows(kind: Rows, *shape: int) -> Tensor:
            return fill(batch, *shape[:-1], left.count(kind), shape[-1])

        inputs = {(kind, a): rows(kind, a) for kind, a, _ in work.linears}
        heads = {(kind, h, c): rows(kind, h, c) for *both, h, c in work.attentions for kind in both}

        def run() -> None:
            for kind, a, b in work.linears:
                F.linear(inputs[kind, a], weights[a, b])
            for queries, keys, h, c in work.attentions:
                k = heads[keys, h, c]
                F.scaled_dot_product_attention(heads[queries, h, c], k, k)

        return run

    run_all, run_merged = layers(Left(left.all, left.all, left.all)), layers(left)

    def merged() -> None:
        if matching == "none":
            x[:, : left.keys].clone()  # the sample itself is made once for all blocks
            run_merged()
            return
        dst = grid.dst(cell_offsets(grid.cells, grid.sy * grid.sx, seed=0, device=device))
        if matching == "windowed":
            token_map = match_windowed(x, Windows.of(grid, device=device), dst, grid.r(ratio))
        else:
            token_map = match_exact(x, grid.partition(dst), grid.r(ratio))
        for _ in range(work.merges):
            token_map.unmerge(token_map.merge(x))
        run_merged()

    return run_all, merged


def _seconds(way: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    way()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        getattr(torch, device.type).synchronize()


def _linears(module: nn.Module | None, rows: Rows) -> list[tuple[Rows, int, int]]:
    if module is None:
        return []
    shapes = (parameter.shape for parameter in module.parameters() if parameter.dim() > 1)
    return [(rows, shape[1], shape[0]) for shape in shapes]
