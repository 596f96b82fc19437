"""Merge: similar tokens merge before a part of a block and are given back after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..hosts.family import Part, Site, submodule
from ..hosts.hooks import Args, Argument, Kwargs, Patch
from ..hosts.image import BlockHooks, Image, Plan
from ..maths.grid import Grid, cell_offsets
from ..maths.matching import Windows, match_exact, match_windowed
from ..maths.token_map import TokenMap
from . import options
from .attention import AttentionOfMerged
from .cost import Work, work_of
from .method import Method

PARTS = ("attn", "cross", "mlp")
MATCHINGS = ("windowed", "exact")
UNMERGES = ("copy",)


@dataclass(frozen=True, repr=False)
class Merge(Method):
    """Merges similar tokens before attention and gives them back after it: tomesd's own method.

        tomesd.apply_patch(pipe, tomesd.Merge(0.5, prop_attn=True))

    Args:
        ratio: share of the tokens that merge away, in `[0, 1]`. At most `1 - 1 / (sx * sy)` of them can; a
            higher ratio is cut to that with a UserWarning.
        parts: which parts of a block see merged tokens: `"attn"` (self-attention), `"cross"`
            (cross-attention), `"mlp"` (the feed-forward layers).
        sx: width in tokens of the cells that keep one token (dst) each to merge into.
        sy: height of these cells.
        seed: of the hash of (seed, timestep, cell) that picks the dst of each cell; None for always the top
            left one. No random generator is read or moved.
        matching: `"windowed"` compares tokens within windows of 16 x 16, `"exact"` over the whole image.
        prop_attn: proportional attention (Bolya et al., 2023): each key of self-attention counts as often as
            tokens have merged into it. Nearer to the plain picture, but no longer what tomesd 0.1.3 draws.
        unmerge: what a merged token gives back: `"copy"`, its group's result.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an option out of range.

    Source: Bolya and Hoffman, Token Merging for Fast Stable Diffusion, 2023.
    """

    ratio: float = 0.5
    parts: tuple[Literal["attn", "cross", "mlp"], ...] = ("attn",)
    sx: int = 2
    sy: int = 2
    seed: int | None = 0
    matching: Literal["windowed", "exact"] = "windowed"
    prop_attn: bool = False
    unmerge: Literal["copy"] = "copy"

    def __post_init__(self) -> None:
        self._set(
            parts=_parts(self.parts),
            **checked_matching(self.ratio, self.sx, self.sy, self.seed, self.matching),
            prop_attn=options.boolean("prop_attn", self.prop_attn),
            unmerge=options.one_of("unmerge", self.unmerge, UNMERGES),
        )
        if self.prop_attn and "attn" not in self.parts:
            raise ValueError(
                f"prop_attn=True weighs keys of self-attention, of which parts={self.parts} merge none: add "
                '"attn" to them'
            )

    def why_skipped(self, site: Site) -> str | None:
        if submodule(site.module, site.block.input) is None or site.part("attn") is None:
            return f"has no {site.block.input} and {site.block.attn.path} to plan at"
        if all(site.part(name) is None for name in self.parts):
            return f"has no {' or '.join(self.parts)}"
        return None

    def check(self, network: str, sites: Sequence[Site], container: Sequence[Site]) -> None:
        if self.prop_attn:
            need_bias(network, sites)

    def attach(self, blocks: Mapping[Site, BlockHooks], patch: Patch, plan: Plan) -> None:
        for site, block in blocks.items():
            block.keep_input(site)
            for name, part in site.block.parts.items():
                module = site.part(name)
                if module is None:
                    continue
                if name == "attn":
                    patch.before(module, Planned(block, plan).enter)
                if name in self.parts:
                    around = MergedPart(block, module, name, part, name == "attn" and self.prop_attn)
                    patch.before(module, around.enter)
                    patch.after(module, around.leave)

    def plan(self, x: Tensor, image: Image) -> TokenMap:
        return match(x, image, self.ratio, self.sx, self.sy, self.seed, self.matching)

    def left(self, h: int, w: int) -> int:
        return h * w - Grid(h, w, self.sy, self.sx).r(self.ratio)

    def work(self, sites: Sequence[Site]) -> Work:
        return work_of(sites, self.parts, merges=len(self.parts))


def match(
    x: Tensor, image: Image, ratio: float, sx: int, sy: int, seed: int | None, matching: str
) -> TokenMap:
    """Which of the tokens `x` `[B, h * w, C]` of an image merge, by `Merge`'s options."""
    grid = Grid(image.h, image.w, sy, sx)
    r = grid.r(ratio)
    if r == 0:
        return TokenMap.identity(x.shape[1], x.device)
    dst = image.once(("dst", sx, sy, seed), lambda: _dst(grid, image, seed))
    if matching == "windowed":
        windows = image.always(("windows", sx, sy), lambda: Windows.of(grid, device=image.device))
        return match_windowed(x, windows, dst, r)
    partition = image.once(("partition", sx, sy, seed), lambda: grid.partition(dst))
    return match_exact(x, partition, r)


def _dst(grid: Grid, image: Image, seed: int | None) -> Tensor:
    """The dst of each cell, by a hash of (seed, timestep, cell)."""
    if seed is None:
        return grid.dst(torch.zeros(1, 1, dtype=torch.int64, device=image.device))
    return grid.dst(cell_offsets(grid.cells, grid.sy * grid.sx, seed, image.timestep, image.device))


def checked_matching(
    ratio: object, sx: object, sy: object, seed: object, matching: object
) -> dict[str, float | int | str | None]:
    """The options of `match`, checked."""
    width, height = options.integer("sx", sx, least=1), options.integer("sy", sy, least=1)
    return {
        "ratio": options.capped_share("ratio", ratio, width, height),
        "sx": width,
        "sy": height,
        "seed": options.integer_or_none("seed", seed),
        "matching": options.one_of("matching", matching, MATCHINGS),
    }


def _parts(parts: object) -> tuple[str, ...]:
    if isinstance(parts, str) or not isinstance(parts, Sequence):
        raise options.wrong_type("parts", "a tuple of names", parts)
    for part in parts:
        options.one_of("each of parts", part, PARTS)
    if not parts:
        raise ValueError(f"nothing to merge: parts is empty, it may hold {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part in parts)


def need_bias(network: str, sites: Sequence[Site]) -> None:
    """Raises a ValueError if a self-attention takes nothing to weigh its keys by."""
    if any(site.block.attn.bias is None for site in sites):
        raise ValueError(
            f"self-attention of {network} takes no bias, which prop_attn=True needs: patch without it"
        )


class Planned:
    """Plans at self-attention, by the block's input, what all parts of the block merge."""

    def __init__(self, block: BlockHooks, plan: Plan) -> None:
        self.block = block
        self.plan = plan

    def enter(self, attn: nn.Module, args: Args, kwargs: Kwargs) -> None:
        own = self.block.own.get()
        x, own.x = own.x, None
        own.map = self.block.make_plan(self.plan, x, own.call)


class MergedPart:
    """Merges what goes into one part of a block, and unmerges what comes out."""

    def __init__(self, block: BlockHooks, module: nn.Module, kind: str, part: Part, prop_attn: bool) -> None:
        self.block = block
        self.name = f"{block.name}.{part.path}"
        self.output = part.output
        self.tokens = Argument(module, part.tokens, 0)
        self.attention: AttentionOfMerged | None = None
        if kind != "mlp":
            method = f'Merge with "{kind}" in its parts'
            self.attention = AttentionOfMerged(block, module, kind, part, method, prop_attn)

    @property
    def map(self) -> TokenMap:
        token_map = self.block.own.get().map
        if token_map is None:
            raise RuntimeError(
                f"tomesd: {self.name} was called without its block: call the whole network, or remove_patch "
                "first"
            )
        return token_map

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        token_map = self.map
        if self.attention is not None:
            self.attention.check(module, kwargs)
        if token_map.is_identity:
            return args, kwargs
        x = self.tokens.get(args, kwargs)
        if not token_map.fits(x):
            raise ValueError(
                f"tomesd: {self.name} was given {list(x.shape[:2])} of the block's [B, {token_map.tokens}] "
                "tokens. Chunked feed-forward and merging it exclude each other: use one of them"
            )
        if self.attention is not None:
            args, kwargs = self.attention.merge_bias(token_map, x, args, kwargs)
        return self.tokens.put(args, kwargs, token_map.merge(x))

    def leave(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        token_map = self.map
        if token_map.is_identity:
            return output  # perhaps of a chunk of the tokens
        if self.output is None:
            return token_map.unmerge(output)
        tokens = token_map.unmerge(output[self.output])
        return (*output[: self.output], tokens, *output[self.output + 1 :])
