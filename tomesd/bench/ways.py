"""Every way to compute that the benchmark compares: a table of how to patch a network with each.

A way patches a network in place, a copy that is its own, so that nothing needs to be removed between runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..config import MergeConfig
from ..hooks import Args, Kwargs
from ..layout import Layout
from ..partition import Grid
from ..patch import apply_patch, patch_of
from ..token_map import TokenMap
from . import peers
from .models import Block, Setting, Site, finest, inputs

Patch = Callable[[nn.Module, Setting], object]

# Side of HyperTile's tiles, in tokens.
TILE = 32


@dataclass(frozen=True)
class Way:
    """One way to compute.

    Args:
        explains: what it does, in a line.
        block: patches a `Block`; None where it is no way to compute one self-attention.
        unet: patches a UNet.
        ideal: the way that saves what this one could save at best.
        needs: bytes of memory that it is known to need in a setting.
    """

    explains: str
    block: Patch | None
    unet: Patch | None
    ideal: str | None = None
    needs: Callable[[Setting], int] = lambda setting: 0

    def patch(self, level: str) -> Patch | None:
        """How to patch at a level, if it can be computed there."""
        return self.block if level == "block" else self.unet


class Sliced:
    """What a TokenMap would do if finding out what to merge, and merging, were free."""

    is_identity = False

    def __init__(self, tokens: int, r: int) -> None:
        self.tokens, self.groups = tokens, tokens - r

    def fits(self, x: Tensor) -> bool:
        return x.shape[1] == self.tokens

    def merge(self, x: Tensor, mode: str = "mean") -> Tensor:
        return x[:, : self.groups]

    def unmerge(self, y: Tensor) -> Tensor:
        times, rest = divmod(self.tokens, self.groups)
        return torch.cat([y] * times + [y[:, :rest]], dim=1)


class Pair(NamedTuple):
    """The two functions that tomesd 0.1.3 has for a map."""

    merge: Callable[[Tensor], Tensor]
    unmerge: Callable[[Tensor], Tensor]


def slice_block(block: nn.Module, setting: Setting) -> None:
    assert isinstance(block, Block)
    MergeConfig(setting.ratio)  # refuses what would be cut to the most that merges
    grid = Grid(*setting.finest)
    block.plan = lambda x: Sliced(x.shape[1], grid.r(setting.ratio))


def slice_unet(unet: nn.Module, setting: Setting, **options: Any) -> None:
    apply_patch(unet, setting.ratio, **options)
    patch: Any = patch_of(unet)
    patch.plan = lambda x, layout: Sliced(x.shape[1], layout.grid.r(setting.ratio))


def plan(setting: Setting, x: Tensor, **options: Any) -> TokenMap:
    """All that planning the merge of one self-attention takes; in a network, blocks share some of it."""
    config = MergeConfig(setting.ratio, **options)
    return Layout.of(x.mT.unflatten(2, setting.finest), config, 0).plan(x, config)


def merge_block(block: nn.Module, setting: Setting, **options: Any) -> None:
    assert isinstance(block, Block)
    block.plan = partial(plan, setting, **options)


def merge_unet(unet: nn.Module, setting: Setting, **options: Any) -> None:
    apply_patch(unet, setting.ratio, **{"max_downsample": setting.max_downsample, **options})


def on_two_levels(patch: Callable[..., None], unet: nn.Module, setting: Setting, **options: Any) -> None:
    """Patches at the two finest levels that have attention."""
    patch(unet, setting, max_downsample=2 * setting.downsample, **options)


def reuse_block(block: nn.Module, setting: Setting) -> None:
    assert isinstance(block, Block)
    (x,), _ = inputs(setting)
    made = plan(setting, x)
    block.plan = lambda x: made


def old_block(block: nn.Module, setting: Setting) -> None:
    assert isinstance(block, Block)
    MergeConfig(setting.ratio)  # as above
    match = peers.load("tomesd", alias="tomesd_0_1_3").merge.bipartite_soft_matching_random2d
    generator = torch.Generator(setting.device).manual_seed(0)
    h, w = setting.finest
    r = int(setting.ratio * h * w)
    block.plan = lambda x: Pair(*match(x, w, h, 2, 2, r, generator=generator))


def old_unet(unet: nn.Module, setting: Setting) -> None:
    MergeConfig(setting.ratio)  # as above
    old = peers.load("tomesd", alias="tomesd_0_1_3")
    old.apply_patch(unet, setting.ratio, max_downsample=setting.max_downsample)


def old_needs(setting: Setting) -> int:
    return similarities(setting.batch, setting.tokens, setting.torch_dtype)


def similarities(batch: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes for those of three quarters of the tokens to the others, at once, and some more."""
    return int(1.3 * batch * (3 * tokens // 4) * (tokens // 4) * dtype.itemsize)


class ToDo:
    """Keys and values of a self-attention from every second token of every second row.

    Source: Smith et al., ToDo: Token Downsampling for Efficient Generation of High-Resolution Images, 2024.
    """

    def __init__(self, site: Site) -> None:
        self.h, self.w = site.h, site.w

    def enter(self, attention: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        x: Tensor = args[0]
        image = x.view(x.shape[0], self.h, self.w, -1)
        return args, {**kwargs, "encoder_hidden_states": image[:, ::2, ::2].flatten(1, 2)}


class HyperTile:
    """Self-attention within tiles of an image, their sides as near to `side` as divide it.

    Raises:
        ValueError: the whole image is one tile.

    Source: tfernd, HyperTile, 2023, without its random choice among sizes.
    """

    def __init__(self, site: Site, side: int = TILE) -> None:
        self.h, self.w = tile(site.h, side), tile(site.w, side)
        self.rows, self.columns = site.h // self.h, site.w // self.w
        if self.rows * self.columns == 1:
            raise ValueError(f"an image of {site.h} x {site.w} tokens is a single tile")

    def enter(self, attention: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        return (self.cut(args[0]), *args[1:]), kwargs

    def leave(self, attention: nn.Module, args: Args, output: Tensor) -> Tensor:
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
    """Downsamples keys and values at the finest level; the handles take it off again."""
    sites = finest(network, setting)
    return [site.attention.register_forward_pre_hook(ToDo(site).enter, with_kwargs=True) for site in sites]


def apply_hypertile(network: nn.Module, setting: Setting, side: int = TILE) -> list[RemovableHandle]:
    """Cuts attention into tiles at the finest level; the handles take it off again."""
    handles = []
    for site in finest(network, setting):
        tiles = HyperTile(site, side)
        handles.append(site.attention.register_forward_pre_hook(tiles.enter, with_kwargs=True))
        handles.append(site.attention.register_forward_hook(tiles.leave))
    return handles


def leave_plain(network: nn.Module, setting: Setting) -> None:
    pass


def keys_block(block: nn.Module, setting: Setting) -> None:
    def enter(attention: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        x: Tensor = args[0]
        return args, {**kwargs, "encoder_hidden_states": plan(setting, x, keys_only=True).merge(x, "drop")}

    block.get_submodule("attn1").register_forward_pre_hook(enter, with_kwargs=True)


STAGE: dict[str, Any] = {"merge_stage": True}
STAGE_4: dict[str, Any] = {"merge_stage": True, "max_downsample": 4}

# In the order in which they run: errors are told from plain's output, so it is the first.
WAYS = {
    "plain": Way("fused attention on all tokens", leave_plain, leave_plain),
    "ideal": Way(
        "tokens cut by slicing and given back by repetition: no matching, no merging",
        slice_block,
        slice_unet,
        "ideal",
    ),
    "tomesd-0.1.3": Way("the last release before this package", old_block, old_unet, "ideal", old_needs),
    "exact": Way(
        'tomesd with matching="exact", over the whole image',
        partial(merge_block, matching="exact"),
        partial(merge_unet, matching="exact"),
        "ideal",
    ),
    "windowed": Way(
        "tomesd as it comes: matching in windows, each block plans for itself",
        merge_block,
        merge_unet,
        "ideal",
    ),
    "reuse": Way(
        "tomesd with reuse=1: one plan for all blocks of a size; one attention is given it",
        reuse_block,
        partial(merge_unet, reuse=1),
        "ideal",
    ),
    "prop-attn": Way(
        "tomesd with prop_attn=True: keys weighed by how many tokens merged into them",
        None,
        partial(merge_unet, prop_attn=True),
        "ideal",
    ),
    "keys": Way(
        "tomesd with keys_only=True: all queries, and a sample of the keys",
        keys_block,
        partial(merge_unet, keys_only=True),
    ),
    "all-levels": Way(
        "tomesd with max_downsample=8: at small levels merging may cost more than it saves",
        None,
        partial(merge_unet, max_downsample=8),
    ),
    "auto": Way(
        "the same with auto=True: blocks are left alone where merging does not pay",
        None,
        partial(merge_unet, max_downsample=8, auto=True),
    ),
    "ideal-stage": Way(
        "as ideal, but each transformer runs all of its blocks on the tokens that are left",
        None,
        partial(slice_unet, **STAGE),
        "ideal-stage",
    ),
    "stage": Way(
        "tomesd with merge_stage=True: merged once for all blocks of a transformer",
        None,
        partial(merge_unet, **STAGE),
        "ideal-stage",
    ),
    "stage-prop-attn": Way(
        "the same with prop_attn=True",
        None,
        partial(merge_unet, **STAGE, prop_attn=True),
        "ideal-stage",
    ),
    "ideal-stage-4": Way(
        "as ideal-stage, down to max_downsample=4", None, partial(slice_unet, **STAGE_4), "ideal-stage-4"
    ),
    "stage-4": Way(
        "tomesd with merge_stage=True and max_downsample=4, as for SDXL",
        None,
        partial(merge_unet, **STAGE_4),
        "ideal-stage-4",
    ),
    "4k": Way(
        "tomesd with keys_only=True at the two finest levels, as in examples/generate_4k.py",
        None,
        partial(on_two_levels, merge_unet, keys_only=True),
    ),
    "ideal-4k-stage": Way(
        "as ideal-stage, at the two finest levels",
        None,
        partial(on_two_levels, slice_unet, **STAGE),
        "ideal-4k-stage",
    ),
    "4k-stage": Way(
        "at the two finest levels with merge_stage=True, as in examples/generate_4k.py --merge-stage",
        None,
        partial(on_two_levels, merge_unet, **STAGE),
        "ideal-4k-stage",
    ),
    "todo": Way(
        "ToDo: keys and values from every second token of every second row, finest level",
        apply_todo,
        apply_todo,
    ),
    "hypertile": Way(
        f"HyperTile: attention within tiles of about {TILE} x {TILE} tokens, finest level",
        apply_hypertile,
        apply_hypertile,
    ),
}


def at(level: str) -> list[str]:
    """Names of the ways that can be computed at a level."""
    return [name for name, way in WAYS.items() if way.patch(level) is not None]
