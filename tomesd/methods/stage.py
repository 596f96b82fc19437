"""MergeStage: all blocks of a transformer run on tokens that merge once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..hosts.family import Part, Site
from ..hosts.hooks import Args, Kwargs, Patch
from ..hosts.image import BlockHooks, Call, Image, Plan
from ..maths.grid import Grid
from ..maths.token_map import TokenMap
from . import options
from .attention import AttentionOfMerged
from .cost import Work, work_of
from .merge import PARTS, checked_matching, match, need_bias
from .method import Method


@dataclass(frozen=True, repr=False)
class MergeStage(Method):
    """Merges once for each transformer (`Transformer2DModel`) and runs all its blocks on merged tokens.

    The fastest method. Of merged tokens `m` the blocks make `f(m)`; a token `x` becomes
    `x + unmerge(f(m) - m)`, so what tells it from the rest of its group stays.

        tomesd.apply_patch(pipe, tomesd.MergeStage(0.5), max_downsample=4)

    Args:
        ratio, sx, sy, seed, matching, prop_attn: as for `Merge`.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an option out of range.

    Source: an extension of Bolya and Hoffman, Token Merging for Fast Stable Diffusion, 2023.
    """

    ratio: float = 0.5
    sx: int = 2
    sy: int = 2
    seed: int | None = 0
    matching: Literal["windowed", "exact"] = "windowed"
    prop_attn: bool = False

    def __post_init__(self) -> None:
        self._set(
            **checked_matching(self.ratio, self.sx, self.sy, self.seed, self.matching),
            prop_attn=options.boolean("prop_attn", self.prop_attn),
        )

    def why_skipped(self, site: Site) -> str | None:
        return None

    def check(self, network: str, sites: Sequence[Site], container: Sequence[Site]) -> None:
        if len(sites) != len(container):
            names = [site.name for site in container if site not in sites]
            raise ValueError(
                f"MergeStage runs all blocks of a transformer on the same merged tokens, but in {network} "
                f"{', '.join(names)} of one would be left out: take all of its blocks, or Merge"
            )
        if self.prop_attn:
            need_bias(network, sites)

    def groups(self, sites: Sequence[Site]) -> list[Sequence[Site]]:
        return [sites]

    def attach(self, blocks: Mapping[Site, BlockHooks], patch: Patch, plan: Plan) -> None:
        sites = list(blocks)
        first, last = sites[0], sites[-1]
        patch.before(first.module, StageStart(blocks[first], plan).enter)
        for site, block in blocks.items():
            for name in ("attn", "cross"):
                module, part = site.part(name), site.block.parts.get(name)
                if module is not None and part is not None:
                    inside = StagedAttention(block, module, name, part, name == "attn" and self.prop_attn)
                    patch.before(module, inside.enter)
        patch.after(last.module, StageEnd(blocks[last]).leave)

    def plan(self, x: Tensor, image: Image) -> TokenMap:
        return match(x, image, self.ratio, self.sx, self.sy, self.seed, self.matching)

    def left(self, h: int, w: int) -> int:
        return h * w - Grid(h, w, self.sy, self.sx).r(self.ratio)

    def work(self, sites: Sequence[Site]) -> Work:
        return work_of(sites, PARTS)


@dataclass(frozen=True, eq=False)
class Kept:
    """What a stage keeps from its first block to its last: the tokens as they were, and merged."""

    x: Tensor
    map: TokenMap
    merged: Tensor


class StageStart:
    """Merges the tokens that the first block of a transformer is given."""

    def __init__(self, block: BlockHooks, plan: Plan) -> None:
        self.block = block
        self.plan = plan

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        call = self.block.call_of(args, kwargs)
        x = self.block.tokens.get(args, kwargs)
        token_map = self.block.make_plan(self.plan, x, call)
        assert call is not None  # or there would have been no plan
        kept = call.kept = Kept(x, token_map, token_map.merge(x))
        return self.block.tokens.put(args, kwargs, kept.merged)


class StageEnd:
    """Gives every token what its group has gained in all blocks, after the last one."""

    def __init__(self, block: BlockHooks) -> None:
        self.block = block

    def leave(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Tensor) -> Tensor:
        call = self.block.call_of(args, kwargs)
        kept = kept_by(self.block, call)
        if call is not None and not torch.is_grad_enabled():
            call.kept = None  # checkpointing alone may need it again
        if kept.map.is_identity:
            return output
        return kept.x + kept.map.unmerge(output - kept.merged)


class StagedAttention(AttentionOfMerged):
    """An attention inside of a stage: what belongs to all tokens is merged as they are, or refused."""

    def __init__(self, block: BlockHooks, module: nn.Module, kind: str, part: Part, prop_attn: bool) -> None:
        super().__init__(block, module, kind, part, "MergeStage", prop_attn)
        self.block = block

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        self.check(module, kwargs)
        given = None if self.bias is None else self.bias.get(args, kwargs)
        if self.kind != "attn" or (given is None and not self.prop_attn):
            return args, kwargs
        token_map = kept_by(self.block, self.block.own.get().call).map
        return self.merge_bias(token_map, self.tokens.get(args, kwargs), args, kwargs)


def kept_by(block: BlockHooks, call: Call | None) -> Kept:
    """What the stage that a block is part of has kept."""
    if call is None or not isinstance(call.kept, Kept):
        raise RuntimeError(
            f"tomesd: {block.name}, a part of a stage, was called without the rest of it: call the whole "
            "network, or remove_patch first"
        )
    return call.kept
