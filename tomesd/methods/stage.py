"""MergeStage: all blocks of a transformer run on tokens that merge once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..hosts.blocks import BlockHooks
from ..hosts.family import Site, submodule
from ..hosts.hooks import Args, Kwargs, Patch, has_hooks_of_others
from ..hosts.image import Call
from ..maths.token_map import TokenMap
from .attention import PartHooks, refuse_caches
from .cost import Work, work_of
from .merge import PARTS, Matched


@dataclass(frozen=True, repr=False)
class MergeStage(Matched):
    """Merges once for each transformer (`Transformer2DModel`) and runs all its blocks on merged tokens.

    The fastest method. Of merged tokens `m` the blocks make `f(m)`; a token `x` becomes
    `x + unmerge(f(m) - m)`, so what tells it from the rest of its group stays.

        tomesd.apply_patch(pipe, tomesd.MergeStage(0.5), max_downsample=4)

    Its options are those of `Merge` of the same names.

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
    prop_attn: bool | None = None

    def why_skipped(self, site: Site) -> str | None:
        return None

    def check(self, network: str, sites: Sequence[Site], container: Sequence[Site]) -> None:
        if len(sites) != len(container):
            names = [site.name for site in container if site not in sites]
            raise ValueError(
                f"MergeStage runs all blocks of a transformer on the same merged tokens, but in {network} "
                f"{', '.join(names)} of one would be left out: take all of its blocks, or Merge"
            )
        super().check(network, sites, container)

    def groups(self, sites: Sequence[Site]) -> list[Sequence[Site]]:
        return [sites]

    def attach(self, blocks: Mapping[Site, BlockHooks], patch: Patch) -> None:
        sites = list(blocks)
        cached = [part.path for part in sites[0].block.parts.values()]
        stage = Stage(blocks[sites[0]], blocks[sites[-1]], cached)
        patch.before(sites[0].module, stage.enter)
        for site, block in blocks.items():
            for kind, part in site.block.parts.items():
                module = site.part(kind)
                if module is not None:
                    inside = StagedPart(block, module, part, kind, "MergeStage", self.prop_attn)
                    patch.before(module, inside.enter)
        patch.after(sites[-1].module, stage.leave, first=True)

    def work(self, sites: Sequence[Site]) -> Work:
        return work_of(sites, PARTS)


class Kept(NamedTuple):
    """What a stage keeps from its first block to its last: the tokens as they were, and merged."""

    x: Tensor
    map: TokenMap
    merged: Tensor


class Stage:
    """Merges before the first block of a transformer; after the last each token gains what its group has."""

    def __init__(self, first: BlockHooks, last: BlockHooks, parts: Sequence[str]) -> None:
        self.first = first
        self.last = last
        self.parts = parts  # of its blocks: none may be cached

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        call, x = self.first.call_of(args, kwargs), self.first.tokens.get(args, kwargs)
        token_map = self.first.make_plan(x, call)
        if call is None:
            return args, kwargs
        call.kept = None
        if token_map is None or token_map.is_identity:
            return args, kwargs
        for part in (module, *(submodule(module, path) for path in self.parts)):
            if part is not None:
                refuse_caches(part, self.first.name, "MergeStage")
        merged = token_map.merge(x)
        call.kept = Kept(x, token_map, merged)
        # A copy, as some hosts' blocks add to their input in place.
        return self.first.tokens.put(args, kwargs, merged.clone())

    def leave(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Tensor) -> Tensor:
        call = self.last.call_of(args, kwargs)
        kept = kept_by(self.last, call)
        if call is not None and not torch.is_grad_enabled():
            call.kept = None  # checkpointing alone may need it again
        if kept is None:
            return output
        return kept.x + kept.map.unmerge(output - kept.merged)


class StagedPart(PartHooks):
    """A part inside of a stage: what belongs to all tokens is merged as they are, or refused."""

    def is_watched(self, module: nn.Module) -> bool:
        return has_hooks_of_others(module.modules())

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        self.refuse(module, kwargs)
        kept = kept_by(self.block, self.block.own.get().call) if self.kind == "attn" else None
        if kept is None:
            return args, kwargs
        x = self.tokens.get(args, kwargs)
        if not kept.map.fits(x, kept.map.groups):
            self.block.patch.warn(
                f"{self.name} was called with {list(x.shape[:2])} tokens, not with the {kept.map.groups} of "
                "each image that MergeStage left: such calls do as they are asked, which goes wrong if that "
                "is about places"
            )
            return args, kwargs
        return self.merge_bias(module, kept.map, args, kwargs)


def kept_by(block: BlockHooks, call: Call | None) -> Kept | None:
    """What the stage that a block is part of has kept; None where nothing has merged."""
    if call is None and not block.patch.is_owned:
        return None  # a copy of a part
    if call is None:
        raise RuntimeError(
            f"tomesd: {block.name}, a part of a stage, was called without the rest of it: call the whole "
            "network, or remove_patch first"
        )
    kept: Kept | None = call.kept
    return kept
