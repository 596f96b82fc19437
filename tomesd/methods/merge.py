"""Merge: similar tokens merge before a part of a block and are given back after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ..hosts.blocks import BlockHooks
from ..hosts.family import Site, submodule
from ..hosts.hooks import Args, Kwargs, Patch
from ..hosts.image import Image
from ..maths.grid import Grid
from ..maths.linear import unmerge_linear
from ..maths.matching import Windows, match_exact, match_windowed
from ..maths.token_map import TokenMap
from . import options
from .attention import PartHooks
from .cost import Work, work_of
from .method import Method

PARTS = ("attn", "cross", "mlp")
MATCHINGS = ("windowed", "exact")
UNMERGES = ("linear", "copy")


class Matched(Method, known=False):
    """A method that merges tokens by their likeness: what `Merge` and `MergeStage` share."""

    sx: int
    sy: int
    seed: int | None
    matching: Literal["windowed", "exact"]
    prop_attn: bool | None

    def __post_init__(self) -> None:
        sx, sy = options.integer("sx", self.sx, least=1), options.integer("sy", self.sy, least=1)
        self._set(
            ratio=options.capped_share(self.ratio, sx, sy),
            sx=sx,
            sy=sy,
            seed=options.integer_or_none("seed", self.seed),
            matching=options.one_of("matching", self.matching, MATCHINGS),
            prop_attn=options.boolean_or_none("prop_attn", self.prop_attn),
        )

    def check(self, network: str, sites: Sequence[Site], container: Sequence[Site]) -> None:
        if self.prop_attn and any(site.block.attn.bias is None for site in sites):
            raise ValueError(
                f"self-attention of {network} takes no bias, which prop_attn=True needs: patch without it"
            )

    def left(self, h: int, w: int) -> int:
        return h * w - Grid(h, w, self.sy, self.sx).r(self.ratio)

    def plan(self, x: Tensor, image: Image) -> TokenMap:
        grid = Grid(image.h, image.w, self.sy, self.sx)
        return match(x, image, grid, grid.r(self.ratio), self.seed, self.matching)


def match(
    x: Tensor, image: Image, grid: Grid, r: int, seed: int | None, matching: str = "windowed"
) -> TokenMap:
    """Which `r` of the tokens `x` `[B, h * w, C]` merge, into one that is drawn in each cell."""
    if r == 0:
        return TokenMap.identity(x.shape[1], x.device)
    stride = grid.sx, grid.sy

    draws = image.always(("draws", *stride, seed), lambda: grid.draws(seed, image.device))
    dst = image.once(("dst", *stride, seed), lambda: draws.dst(image.shift))
    if matching == "windowed":
        windows = image.always(("windows", *stride), lambda: Windows.of(grid, device=image.device))
        compared = image.once(("compared", *stride, seed), lambda: windows.compared(dst))
        return match_windowed(x, windows, dst, r, compared)
    return match_exact(x, image.once(("partition", *stride, seed), lambda: grid.partition(dst)), r)


@dataclass(frozen=True, repr=False)
class Merge(Matched):
    """Merges similar tokens before attention and gives them back after it: tomesd's own method.

        tomesd.apply_patch(pipe, tomesd.Merge(0.5))

    What tomesd 0.1.3 draws is `Merge(0.5, matching="exact", prop_attn=False, unmerge="copy")`, but for its
    random numbers.

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
            tokens have merged into it. None: wherever attention takes a bias of keys and is known to do
            nothing but attend.
        unmerge: what a merged token is given back: `"copy"`, its group's result, or `"linear"`, to which a
            linear part of what tells it from its group is added (`maths/linear.py`).

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
    prop_attn: bool | None = None
    unmerge: Literal["linear", "copy"] = "linear"

    def __post_init__(self) -> None:
        if isinstance(self.parts, str) or not isinstance(self.parts, Sequence):
            raise options.wrong_type("parts", "a tuple of names", self.parts)
        for part in self.parts:
            options.one_of("each of parts", part, PARTS)
        if not self.parts:
            raise ValueError(f"nothing to merge: parts is empty, it may hold {', '.join(PARTS)}")
        self._set(
            parts=tuple(part for part in PARTS if part in self.parts),
            unmerge=options.one_of("unmerge", self.unmerge, UNMERGES),
        )
        super().__post_init__()
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

    def attach(self, blocks: Mapping[Site, BlockHooks], patch: Patch) -> None:
        for site, block in blocks.items():
            block.plan_by_input(site)
            for kind, part in site.block.parts.items():
                module = site.part(kind)
                if module is not None and kind in self.parts:
                    method = f'Merge with "{kind}" in its parts'
                    hooks = MergedPart(block, module, part, kind, method, self.prop_attn)
                    hooks.linear = self.unmerge == "linear"
                    patch.before(module, hooks.enter)
                    block.inside.setdefault(part.path, hooks.enter)
                    patch.after(module, hooks.leave, first=True)  # hooks of others are given all tokens

    def work(self, sites: Sequence[Site]) -> Work:
        return work_of(sites, self.parts, merges=len(self.parts))


class MergedPart(PartHooks):
    """Merges what goes into one part of a block, and unmerges what comes out."""

    linear = False

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        own = self.block.own.get()
        own.given = None
        self.refuse(module, kwargs)
        x = self.tokens.get(args, kwargs)
        token_map = self.block.map_of(x, self.name)
        if token_map is None or token_map.is_identity:
            return args, kwargs
        args, kwargs = self.merge_bias(module, token_map, args, kwargs)
        merged = token_map.merge(x)
        own.given = x, merged
        if self.kind == "attn" and self.keys is not None and not self.has_own_keys(args, kwargs):
            handed = self.keys.get(args, kwargs) is not None or self.given_values(args, kwargs) is not None
            if handed:
                args, kwargs = self.put_keys(args, kwargs, x, merged, token_map.merge)
        return self.tokens.put(args, kwargs, merged)

    def leave(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        own = self.block.own.get()
        given, own.given = own.given, None
        token_map = own.map
        if given is None or token_map is None:
            return output
        x, merged = given
        tokens = self.tokens_of(output)
        tokens = unmerge_linear(token_map, x, merged, tokens) if self.linear else token_map.unmerge(tokens)
        return self.put_tokens(output, tokens)
