"""Every way to compute that the benchmarks compare: a table of how to patch a network with each.

A way patches a network in place, a copy that is its own, so that nothing needs to be removed between runs.
Rivals are added in scripts/bench/rivals.py of a checkout.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..hosts.blocks import BlockHooks
from ..hosts.family import Site
from ..hosts.hooks import Patch
from ..hosts.image import Call, Image
from ..hosts.unets import BASIC, FAMILIES
from ..methods.merge import Matched, Merge
from ..methods.merge_keys import MergeKeys
from ..methods.method import Method
from ..methods.sample_keys import SampleKeys
from ..methods.stage import MergeStage
from ..patch import apply_patch
from .models import Block, Setting

# The method for a ratio.
Make = Callable[[float], Method]


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
        self.index = torch.empty(1, 0)  # the same for all samples

    def fits(self, x: Tensor, length: int | None = None) -> bool:
        return x.shape[1] == (self.tokens if length is None else length)

    def merge(self, x: Tensor, mode: str = "mean") -> Tensor:
        return x[:, : self.groups]

    def unmerge(self, y: Tensor) -> Tensor:
        times, rest = divmod(self.tokens, self.groups)
        return torch.cat([y] * times + [y[:, :rest]], dim=1)


class Ideal(Matched, known=False):
    """What a method that matches tokens could save at best."""

    def plan(self, x: Tensor, image: Image) -> Any:
        return Sliced(x.shape[1], image.h * image.w - self.left(image.h, image.w))


class IdealMerge(Ideal, Merge, known=False):
    """What Merge could save at best."""


class IdealStage(Ideal, MergeStage, known=False):
    """What MergeStage could save at best."""


def patch_block(block: Block, method: Method, h: int, w: int, batch: int) -> None:
    """Makes one self-attention on images of `h` x `w` tokens compute by a method, as in a network."""
    site = Site("block", block, BASIC, block)
    device, tables = next(block.parameters()).device, {}  # type: ignore[var-annotated]
    patch, no_carrier = Patch(), next(row for row in FAMILIES if row.carrier is None)
    call = partial(Call, batch=batch)
    container: Any = SimpleNamespace(unpassed=lambda: call(Image(h, w, device=device, tables=tables)))
    hooks = BlockHooks(patch, container, site, no_carrier)
    hooks.plan = method.plan
    method.attach({site: hooks}, patch)


def uncut(make: Make, ratio: float) -> Method:
    """The method for exactly this ratio.

    Raises:
        ValueError: it would be cut to the most that its cells allow.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        try:
            return make(ratio)
        except UserWarning as warning:
            raise ValueError(str(warning)) from None


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
    make: Make,
    ideal: str | None = None,
    *,
    levels: Callable[[Setting], int] = finest,
    block: bool = False,
    auto: bool = False,
) -> Way:
    """A way of this package: a method, and the levels and `auto` that apply_patch is given with it."""

    def patch(network: nn.Module, setting: Setting) -> None:
        method = uncut(make, setting.ratio)
        if isinstance(network, Block):
            patch_block(network, method, *setting.finest, setting.batch)
        else:
            apply_patch(network, method, levels(setting), auto=auto)

    return Way(explains, colour, patch, block, ideal)


IDEAL_STAGE = partial(IdealStage, prop_attn=False)

# In the order in which they run: errors are distances from plain's output, so it is the first. Ideals have
# the colour of what they limit.
WAYS: Ways = {
    "plain": Way("fused attention on all tokens", "0.55", lambda network, setting: None, block=True),
    "ideal": own(
        "tokens cut by slicing, given back by repetition",
        "C0",
        partial(IdealMerge, prop_attn=False, unmerge="copy"),
        "ideal",
        block=True,
    ),
    "exact": own(
        'matching="exact", in the whole image', "C9", partial(Merge, matching="exact"), "ideal", block=True
    ),
    "windowed": own("the default: Merge, matched in windows", "C0", Merge, "ideal", block=True),
    "copy": own('unmerge="copy"', "magenta", partial(Merge, unmerge="copy"), "ideal", block=True),
    "0.1.3": own(
        'prop_attn=False, unmerge="copy": as tomesd 0.1.3, in windows',
        "tan",
        partial(Merge, prop_attn=False, unmerge="copy"),
        "ideal",
        block=True,
    ),
    "keys": own("SampleKeys: all queries, and a sample of the keys", "k", SampleKeys, block=True),
    "keys-alone": own(
        "SampleKeys(probes=0, replacement=True): nothing but a sample",
        "indigo",
        partial(SampleKeys, probes=0, replacement=True),
        block=True,
    ),
    "merge-keys": own("MergeKeys: all queries, and merged keys", "C2", MergeKeys, block=True),
    "all-levels": own("max_downsample=8: may cost more than it saves", "navy", Merge, levels=up_to(8)),
    "auto": own("the same with auto=True: only where it pays", "C8", Merge, levels=up_to(8), auto=True),
    "ideal-stage": own("as ideal, for all blocks of a transformer", "C1", IDEAL_STAGE, "ideal-stage"),
    "stage": own("merged once for all blocks of a transformer", "C1", MergeStage, "ideal-stage"),
    "stage-0.1.3": own(
        "the same with prop_attn=False", "gold", partial(MergeStage, prop_attn=False), "ideal-stage"
    ),
    "ideal-stage-4": own(
        "as ideal-stage, with max_downsample=4", "C3", IDEAL_STAGE, "ideal-stage-4", levels=up_to(4)
    ),
    "stage-4": own(
        "stage with max_downsample=4, for SDXL", "C3", MergeStage, "ideal-stage-4", levels=up_to(4)
    ),
    "4k": own("keys at the two finest levels, as generate-4k", "darkgreen", SampleKeys, levels=two_finest),
    "ideal-4k-stage": own(
        "as ideal-stage, at the two finest levels",
        "saddlebrown",
        IDEAL_STAGE,
        "ideal-4k-stage",
        levels=two_finest,
    ),
    "4k-stage": own(
        "stage at the two finest levels", "saddlebrown", MergeStage, "ideal-4k-stage", levels=two_finest
    ),
}


def at(level: str, ways: Ways) -> list[str]:
    """Names of the ways that can be computed at a level, `"block"` or `"unet"`."""
    return [name for name, way in ways.items() if level == "unet" or way.block]
