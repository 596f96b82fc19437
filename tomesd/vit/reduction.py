"""Fewer tokens out of a vision tower, for what reads them next, such as a language model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ..maths.grid import RANGE, alternate, cell_offsets, random_src
from ..maths.matching import match_exact
from ..maths.sampling import sample_tokens
from ..maths.token_map import TokenMap, in_full_precision
from ..methods import options

How: TypeAlias = Literal["merge", "sample", "random"]


@dataclass(frozen=True, eq=False)
class Reduced:
    """What `reduce` leaves of N tokens: M of them, in the order of the picture.

    Args:
        tokens: `[B, M, C]`, those before the patches first.
        map: which of the N tokens each one stands for: `map.unmerge(tokens)` gives back `[B, N, C]`.
        positions: mean row and column of the patches that a token stands for, in patches, float32
            `[B, M - prefix, 2]`; without merging those of the patch itself.
    """

    tokens: Tensor
    map: TokenMap
    positions: Tensor

    @property
    def sizes(self) -> Tensor:
        """How many of the N tokens each one stands for, int64 `[B, M]`."""
        return self.map.sizes.expand(self.tokens.shape[0], -1)


def reduce(
    features: Tensor,
    keep: int | float,
    *,
    how: How = "merge",
    grid: tuple[int, int] | None = None,
    prefix: int = 0,
    source: TokenMap | None = None,
    seed: int = 0,
) -> Reduced:
    """Leaves M of the tokens that a vision tower returns, without looking at any text.

        reduced = tome.reduce(features, keep=144)  # [B, 576, C] -> reduced.tokens [B, 144, C]

    For LLaVA in transformers, before the projector, and with so many image tokens in the prompt:

        projector = model.model.multi_modal_projector
        projector.register_forward_pre_hook(lambda module, args: (tome.reduce(args[0], 144).tokens,))

    Args:
        features: `[B, N, C]`, floating point.
        keep: how many patches are left: a number, or a share of them below 1, rounded down.
        how: `"merge"` similar tokens, two at a time, into their mean, until so many are left; or, to compare
            with, `"sample"` them evenly over the picture, or keep `"random"` ones. The others are dropped.
        grid: rows and columns of the patches; by default they are a square.
        prefix: how many tokens before the patches (class, registers) stay as they are, and are not counted.
        source: of a patched tower, `tome.source(model)`: what has merged in it already. Then `features` are
            those that it returns, and merging goes on from there.
        seed: of samples and random tokens.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: `keep` is not from 1 to the number of patches or to what the source has left, a grid of
            another number of patches, or a source of other tokens.
    """
    _check_tokens("features", features, {3: "[B, N, C]"})
    options.one_of("how", how, get_args(How))
    prefix = options.integer("prefix", prefix, least=0)
    patches = features.shape[1] - prefix
    h, w = _grid(grid, patches)
    left = _count(keep, patches)
    if source is not None:
        _check_source(source, features, how, left + prefix)
    token_map = source or TokenMap.identity(features.shape[1], features.device)
    tokens = token_map.merge(features, "drop")
    seed = options.integer("seed", seed)
    if how == "merge":
        while (free := tokens.shape[1] - prefix) > left:
            r = min(free - left, free // 2)
            step = _match(tokens, alternate(tokens.shape[1], prefix, tokens.device), r)
            sizes = token_map.sizes.expand(tokens.shape[0], -1)
            tokens, token_map = step.merge(tokens, "mean", sizes), token_map.compose(step)
    elif tokens.shape[1] - prefix > left:
        token_map = token_map.compose(_choose(tokens, how, left, (h, w), prefix, seed))
        tokens = token_map.merge(features, "drop")
    positions = _positions(token_map, how, (h, w), prefix)
    return Reduced(tokens, token_map, positions.expand(tokens.shape[0], -1, -1))


def keep(
    embeddings: Tensor, rate: float, grid: tuple[int, int] | None = None, *, how: How = "merge", seed: int = 0
) -> Tensor:
    """Which tokens to keep when a share `rate` of them is to go, for servers that ask for a mask.

        mask = tome.keep(embeddings, 0.5)  # bool [N]
        embeddings = embeddings[mask]  # [N - int(0.5 * N), C], in order

    Args:
        embeddings: `[N, C]` of one picture or `[B, N, C]`, floating point.
        rate: the share that goes, from 0 to below 1. Exactly `N - int(rate * N)` stay.
        grid: rows and columns; by default they are a square.
        how: as in `reduce`: one token stays of each group that would merge, or of a sample, or random ones.
        seed: of samples and random tokens.

    Returns:
        A bool tensor `[N]` or `[B, N]`.

    Raises:
        TypeError, ValueError: as in `reduce`.
    """
    if not 0 <= options.number("rate", rate) < 1:
        raise ValueError(f"rate must be from 0 to below 1, the share of tokens that goes, got {rate}")
    _check_tokens("embeddings", embeddings, {2: "[N, C]", 3: "[B, N, C]"})
    single = embeddings.dim() == 2
    features = embeddings[None] if single else embeddings
    b, n, _ = features.shape
    kept = reduce(features, n - int(rate * n), how=how, grid=grid, seed=seed).map.keep.expand(b, -1)
    mask = torch.zeros(b, n, dtype=torch.bool, device=features.device).scatter(1, kept, True)
    return mask[0] if single else mask


def _check_tokens(name: str, x: Any, shapes: dict[int, str]) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() not in shapes:
        given = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating point tensor {' or '.join(shapes.values())}, got {given}")


def _grid(grid: Any, patches: int) -> tuple[int, int]:
    if patches < 1:
        raise ValueError("there are no patches to reduce: the features have no more tokens than the prefix")
    side = math.isqrt(patches)
    try:
        h, w = (side, side) if grid is None else (options.integer("grid", n, least=1) for n in grid)
    except (TypeError, ValueError):
        raise options.wrong_type("grid", "(rows, columns), two integers above 0", grid) from None
    if h * w != patches:
        hint = "pass grid=(rows, columns), and how many tokens come before them as prefix"
        raise ValueError(f"{patches} patches are no {h} x {w}: {hint}")
    return h, w


def _count(keep: Any, patches: int) -> int:
    options.number("keep", keep, "a number of patches or a share of them")
    count = int(keep) if isinstance(keep, Integral) else max(1, int(keep * patches)) if 0 < keep < 1 else 0
    if not 1 <= count <= patches:
        raise ValueError(f"keep must be from 1 to {patches} patches, or a share below 1, got {keep}")
    return count


def _check_source(source: Any, features: Tensor, how: str, left: int) -> None:
    if not isinstance(source, TokenMap):
        raise options.wrong_type("source", "a TokenMap", source)
    if how == "sample":
        raise ValueError("how='sample' is over all patches: it takes no source")
    if not source.fits(features):
        raise ValueError(f"the source is {source}, the features are {list(features.shape)}")
    if source.groups < left:
        raise ValueError(f"the tower has left {source.groups} tokens, fewer than the {left} to keep")


def _match(tokens: Tensor, partition: Any, r: int) -> TokenMap:
    with in_full_precision(tokens):
        return match_exact(tokens.detach().float(), partition, r)


def _choose(tokens: Tensor, how: str, left: int, grid: tuple[int, int], prefix: int, seed: int) -> TokenMap:
    """The map that keeps some tokens as they are."""
    n, device = tokens.shape[1], tokens.device
    if how == "random":
        priority = cell_offsets(n, RANGE, seed, device=device)
        return _match(tokens, random_src(priority, n - prefix - left, prefix), n - prefix - left)
    sampled = sample_tokens(*grid, left, seed, device=device)
    first = torch.arange(prefix, device=device)[None]
    return TokenMap(
        torch.cat([first, sampled.index + prefix], 1), torch.cat([first, sampled.keep + prefix], 1)
    )


def _positions(token_map: TokenMap, how: str, grid: tuple[int, int], prefix: int) -> Tensor:
    place = torch.arange(grid[0] * grid[1], device=token_map.index.device)
    cells = torch.stack([place // grid[1], place % grid[1]], -1).float()
    if how != "merge":
        return cells[token_map.keep[:, prefix:] - prefix]
    every = torch.cat([cells.new_zeros(prefix, 2), cells])[None].expand(token_map.index.shape[0], -1, -1)
    return token_map.merge(every)[:, prefix:]
