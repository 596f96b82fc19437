"""What tomesd is compared with: its last release, ToDo and HyperTile, as ways of the benchmarks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import peers
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tomesd.commands.models import Block, Setting
from tomesd.commands.ways import WAYS, Way, Ways, uncut
from tomesd.hosts.unets import find_networks
from tomesd.methods.merge import Merge

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

# Side of HyperTile's tiles, in tokens.
TILE = 32


@dataclass(frozen=True)
class Attention:
    """A self-attention and the image of its tokens: `h` x `w`."""

    module: nn.Module
    h: int
    w: int


def finest(network: nn.Module, setting: Setting) -> list[Attention]:
    """The self-attentions of a network at the levels of the setting."""
    if isinstance(network, Block):
        return [Attention(network.attn1, *setting.finest)]
    (found,) = find_networks(network)
    return [
        Attention(site.module.get_submodule("attn1"), *setting.image(site.downsample))
        for site in found.sites
        if site.downsample <= setting.max_downsample
    ]


class Pair(NamedTuple):
    """The two functions that tomesd 0.1.3 has for a map."""

    merge: Callable[[Tensor], Tensor]
    unmerge: Callable[[Tensor], Tensor]


def old_release() -> Any:
    """tomesd 0.1.3."""
    return peers.load("tomesd", alias="tomesd_0_1_3")


def patch_old(network: nn.Module, setting: Setting) -> None:
    uncut(Merge, setting.ratio)  # refuses what it would cut to the most that merges
    old = old_release()
    if not isinstance(network, Block):
        old.apply_patch(network, setting.ratio, max_downsample=setting.max_downsample)
        return
    match = old.merge.bipartite_soft_matching_random2d
    generator = torch.Generator(setting.device).manual_seed(0)
    h, w = setting.finest
    r = int(setting.ratio * h * w)
    network.plan = lambda x: Pair(*match(x, w, h, 2, 2, r, generator=generator))


def similarities(batch: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of all similarities of tomesd 0.1.3 at once (3/4 x 1/4 of the tokens), plus 30 %."""
    return int(1.3 * batch * (3 * tokens // 4) * (tokens // 4) * dtype.itemsize)


def needs_of_old(setting: Setting) -> int:
    return similarities(setting.batch, setting.tokens, setting.torch_dtype)


class ToDo:
    """Keys and values of a self-attention from every second token of every second row.

    Source: Smith et al., ToDo: Token Downsampling for Efficient Generation of High-Resolution Images, 2024.
    """

    def __init__(self, attention: Attention) -> None:
        self.h, self.w = attention.h, attention.w

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        x: Tensor = args[0]
        image = x.view(x.shape[0], self.h, self.w, -1)
        return args, {**kwargs, "encoder_hidden_states": image[:, ::2, ::2].flatten(1, 2)}


class HyperTile:
    """Self-attention within tiles of an image, their sides as near to `side` as divide it.

    Raises:
        ValueError: the whole image is one tile.

    Source: tfernd, HyperTile, 2023, without its random choice among sizes.
    """

    def __init__(self, attention: Attention, side: int = TILE) -> None:
        h, w = attention.h, attention.w
        self.h, self.w = tile(h, side), tile(w, side)
        self.rows, self.columns = h // self.h, w // self.w
        if self.rows * self.columns == 1:
            raise ValueError(f"an image of {h} x {w} tokens is a single tile")

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        return (self.cut(args[0]), *args[1:]), kwargs

    def leave(self, module: nn.Module, args: Args, output: Tensor) -> Tensor:
        return self.join(output)

    def cut(self, x: Tensor) -> Tensor:
        """`[B, h * w, C]` -> `[B * tiles, tokens of a tile, C]`."""
        tiles = x.reshape(x.shape[0], self.rows, self.h, self.columns, self.w, -1).transpose(2, 3)
        return tiles.reshape(-1, self.h * self.w, x.shape[2])

    def join(self, y: Tensor) -> Tensor:
        """The inverse of `cut`."""
        tiles = y.view(-1, self.rows, self.columns, self.h, self.w, y.shape[2]).transpose(2, 3)
        return tiles.flatten(1, 4)


def tile(length: int, side: int) -> int:
    """The divisor of a length that is nearest to `side`, as a factor."""
    divisors = [part for part in range(1, length + 1) if length % part == 0]
    return min(divisors, key=lambda part: abs(math.log(part / side)))


def apply_todo(network: nn.Module, setting: Setting) -> list[RemovableHandle]:
    """Downsamples keys and values; the handles take it off again."""
    return [
        attention.module.register_forward_pre_hook(ToDo(attention).enter, with_kwargs=True)
        for attention in finest(network, setting)
    ]


def apply_hypertile(network: nn.Module, setting: Setting, side: int = TILE) -> list[RemovableHandle]:
    """Cuts attention into tiles; the handles take it off again."""
    handles = []
    for attention in finest(network, setting):
        tiles = HyperTile(attention, side)
        handles.append(attention.module.register_forward_pre_hook(tiles.enter, with_kwargs=True))
        handles.append(attention.module.register_forward_hook(tiles.leave))
    return handles


RIVALS: Ways = {
    "tomesd-0.1.3": Way(
        "the last release before this package", "C5", patch_old, block=True, ideal="ideal", needs=needs_of_old
    ),
    "todo": Way(
        "ToDo: keys from every second token and row, finest level",
        "C4",
        apply_todo,
        block=True,
        has_ratio=False,
    ),
    "hypertile": Way(
        f"HyperTile: within about {TILE} x {TILE} tokens, finest level",
        "C6",
        apply_hypertile,
        block=True,
        has_ratio=False,
    ),
}
ALL: Ways = {**WAYS, **RIVALS}
