"""Every way to compute that the benchmarks compare: a table of how to patch a network with each.

A way patches a network in place, a copy that is its own, so that nothing needs to be removed between runs.
Rivals are added in scripts/bench/rivals.py of a checkout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..config import MergeConfig
from ..layout import Layout
from ..partition import Grid
from ..patch import apply_patch, patch_of
from ..token_map import TokenMap
from .models import Block, Setting

# What apply_patch is given to merge this share.
Options = Callable[[float], dict[str, Any]]


@dataclass(frozen=True)
class Way:
    """One way to compute.

    Args:
        explains: what it does, in a line.
        colour: of its lines in plots, as matplotlib calls it.
        patch: patches a UNet, or a `Block`.
        block: whether it is a way to compute one self-attention too.
        ideal: the way that saves what this one could save at best.
        has_ratio: whether it depends on the ratio.
        needs: bytes of memory that it is known to need in a setting.
    """

    explains: str
    colour: str
    patch: Callable[[nn.Module, Setting], object]
    block: bool = False
    ideal: str | None = None
    has_ratio: bool = True
    needs: Callable[[Setting], int] = lambda setting: 0


Ways = Mapping[str, Way]


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


def patch_unet(unet: nn.Module, given: dict[str, Any], max_downsample: int, sliced: bool) -> None:
    """Patches with what apply_patch is given; `sliced`: with its ideal instead."""
    apply_patch(unet, max_downsample=max_downsample, **given)
    if sliced:
        patch: Any = patch_of(unet)
        patch.plan = lambda x, layout: Sliced(x.shape[1], layout.grid.r(given["ratio"]))


def patch_block(block: Block, given: dict[str, Any], image: tuple[int, int], sliced: bool) -> None:
    """The same for one self-attention on an image of `h` x `w` tokens."""
    config = MergeConfig(**given)  # also checks what the ideal is given

    def plan(x: Tensor) -> TokenMap:
        return Layout.of(x.mT.unflatten(2, image), config, 0).plan(x, config)

    if config.keys_only:
        block.keys = lambda x: plan(x).merge(x, "drop")
    else:
        r = Grid(*image).r(config.ratio)
        block.plan = (lambda x: Sliced(x.shape[1], r)) if sliced else plan


def finest(setting: Setting) -> int:
    """The levels of the setting."""
    return setting.max_downsample


def two_finest(setting: Setting) -> int:
    """The two finest levels that have attention."""
    return 2 * setting.downsample


def up_to(downsample: int) -> Callable[[Setting], int]:
    """Levels up to this one."""
    return lambda setting: downsample


def own(
    explains: str,
    colour: str,
    options: Options,
    ideal: str | None = None,
    *,
    levels: Callable[[Setting], int] = finest,
    block: bool = False,
    sliced: bool = False,
) -> Way:
    """A way of this package.

    Args:
        options: what apply_patch is given, for a ratio.
        levels: its `max_downsample`.
        sliced: the ideal of that: the same with tokens cut by slicing.
    """

    def patch(network: nn.Module, setting: Setting) -> None:
        given = options(setting.ratio)
        if isinstance(network, Block):
            patch_block(network, given, setting.finest, sliced)
        else:
            patch_unet(network, given, levels(setting), sliced)

    return Way(explains, colour, patch, block, ideal)


def merge(**options: Any) -> Options:
    """What apply_patch is given beside the ratio."""
    return lambda ratio: {"ratio": ratio, **options}


# The limit of a way: the same with tokens cut by slicing.
ideal_of = partial(own, sliced=True)
DEFAULT, KEYS, STAGE = merge(), merge(keys_only=True), merge(merge_stage=True)

# In the order in which they run: errors are distances from plain's output, so it is the first. Ideals have
# the colour of what they limit.
WAYS: Ways = {
    "plain": Way("fused attention on all tokens", "0.55", lambda network, setting: None, block=True),
    "ideal": ideal_of("tokens cut by slicing, given back by repetition", "C0", DEFAULT, "ideal", block=True),
    "exact": own('matching="exact", in the whole image', "C9", merge(matching="exact"), "ideal", block=True),
    "windowed": own("the default: matching in windows", "C0", DEFAULT, "ideal", block=True),
    "prop-attn": own("keys weigh as much as they merged", "C3", merge(prop_attn=True), "ideal"),
    "keys": own("keys_only=True: all queries, and a sample of the keys", "k", KEYS, block=True),
    "all-levels": own("max_downsample=8: may cost more than it saves", "C7", DEFAULT, levels=up_to(8)),
    "auto": own("the same with auto=True: only where it pays", "C8", merge(auto=True), levels=up_to(8)),
    "ideal-stage": ideal_of("as ideal, for all blocks of a transformer", "C1", STAGE, "ideal-stage"),
    "stage": own("merged once for all blocks of a transformer", "C1", STAGE, "ideal-stage"),
    "stage-prop-attn": own(
        "the same with prop_attn=True", "gold", merge(merge_stage=True, prop_attn=True), "ideal-stage"
    ),
    "ideal-stage-4": ideal_of(
        "as ideal-stage, with max_downsample=4", "C3", STAGE, "ideal-stage-4", levels=up_to(4)
    ),
    "stage-4": own("stage with max_downsample=4, for SDXL", "C3", STAGE, "ideal-stage-4", levels=up_to(4)),
    "4k": own("keys at the two finest levels, as generate-4k", "darkgreen", KEYS, levels=two_finest),
    "ideal-4k-stage": ideal_of(
        "as ideal-stage, at the two finest levels", "saddlebrown", STAGE, "ideal-4k-stage", levels=two_finest
    ),
    "4k-stage": own(
        "stage at the two finest levels", "saddlebrown", STAGE, "ideal-4k-stage", levels=two_finest
    ),
}


def at(level: str, ways: Ways) -> list[str]:
    """Names of the ways that can be computed at a level, `"block"` or `"unet"`."""
    return [name for name, way in ways.items() if level == "unet" or way.block]
