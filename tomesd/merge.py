"""The functional API: build a merge, get `(merge, unmerge)` callables.

Every function takes a `metric` `[B, N, C]` and returns two callables: `merge(x, mode="mean")` turns
`[B, N, ...]` into `[B, M, ...]` and `unmerge(y)` turns that back into `[B, N, ...]`. They are the methods
of a `TokenMap`, which has the modes. As in tomesd and ToMe, an `r` larger than the number of tokens that
may leave is cut to it, and `r <= 0` merges nothing. Unlike there, the tokens that remain keep their order.
What is of the wrong type is a TypeError, a metric of another shape a ValueError.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .maths.grid import Grid, Partition, alternate, cell_offsets, every_kth, random_src
from .maths.matching import match_exact
from .maths.token_map import TokenMap, check_integers

Merge = Callable[..., Tensor]
Unmerge = Callable[[Tensor], Tensor]


def bipartite_soft_matching_random2d(
    metric: Tensor,
    w: int,
    h: int,
    sx: int,
    sy: int,
    r: int,
    no_rand: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Merge, Unmerge]:
    """Merges `r` tokens of an image, one random dst in each cell of `sx` x `sy` (Bolya and Hoffman, 2023).

        merge, unmerge = bipartite_soft_matching_random2d(x, 64, 64, 2, 2, r=2048)  # x: [B, 4096, C]
        y = unmerge(attention(merge(x)))  # attention on [B, 2048, C]

    Args:
        metric: what is compared, floating point `[B, h * w, C]`.
        w: width of the image in tokens.
        h: height of the image in tokens.
        sx: width of a cell in tokens; need not divide `w`.
        sy: height of a cell in tokens; need not divide `h`.
        r: number of tokens to remove.
        no_rand: take the top left token of each cell instead of a random one.
        generator: drawn from if given; without one a fixed hash of the cell decides.

    Raises:
        ValueError: the metric is not `[B, h * w, C]`, or a side or stride is below 1.
        TypeError: the metric is not floating point, or a number no integer.
    """
    _check_metric(metric)
    check_integers(w=w, h=h, sx=sx, sy=sy, r=r)
    _check_generator(generator)
    if min(w, h, sx, sy) < 1:
        raise ValueError(f"w, h, sx and sy must be at least 1, got w={w}, h={h}, sx={sx}, sy={sy}")
    if metric.shape[1] != w * h:
        raise ValueError(f"metric has {metric.shape[1]} tokens, but w * h = {w} * {h} = {w * h}")
    grid = Grid(h, w, sy, sx)
    options = grid.sy * grid.sx
    if no_rand:
        offset = torch.zeros(1, grid.cells, dtype=torch.int64, device=metric.device)
    elif generator is not None:
        offset = torch.randint(options, (1, grid.cells), device=generator.device, generator=generator)
    else:
        offset = cell_offsets(grid.cells, options, seed=0, device=metric.device)
    return _callables(metric, grid.partition(grid.dst(offset.to(metric.device))), r)


def bipartite_soft_matching(
    metric: Tensor, r: int, class_token: bool = False, distill_token: bool = False
) -> tuple[Merge, Unmerge]:
    """Merges `r` of the even tokens into odd ones (Bolya et al., 2023).

    Args:
        metric: what is compared, floating point `[B, N, C]`.
        r: number of tokens to remove, at most half of those that are not protected.
        class_token: the first token is a class token: protect it.
        distill_token: the token after it is a distillation token: protect it too.
    """
    _check_metric(metric)
    check_integers(r=r)
    protected = bool(class_token) + bool(distill_token)
    r = min(r, (metric.shape[1] - protected) // 2)
    return _callables(metric, alternate(metric.shape[1], protected, metric.device), r)


def kth_bipartite_soft_matching(metric: Tensor, k: int) -> tuple[Merge, Unmerge]:
    """Merges all tokens into every `k`-th one: `N // k` remain, and never none.

    Args:
        metric: what is compared, floating point `[B, N, C]`.
        k: 2 halves the number of tokens; 1 and below merge nothing.
    """
    _check_metric(metric)
    check_integers(k=k)
    n = metric.shape[1]
    if k <= 1:
        return _identity(metric)
    partition = every_kth(n, min(k, max(n, 1)), device=metric.device)
    return _callables(metric, partition, partition.src.shape[1])


def random_bipartite_soft_matching(
    metric: Tensor, r: int, generator: torch.Generator | None = None
) -> tuple[Merge, Unmerge]:
    """Merges `r` random tokens into the most similar of the others: the baseline without a choice of src.

    Args:
        metric: what is compared, floating point `[B, N, C]`.
        r: number of tokens to remove, at most N - 1.
        generator: drawn from if given; without one a fixed hash of the position decides.
    """
    _check_metric(metric)
    check_integers(r=r)
    _check_generator(generator)
    b, n, _ = metric.shape
    if generator is not None:
        priority = torch.rand(b, n, device=generator.device, generator=generator).to(metric.device)
    else:
        priority = cell_offsets(n, 1 << 31, seed=0, device=metric.device)
    r = max(0, min(r, n - 1))
    return _callables(metric, random_src(priority, r), r)


def merge_wavg(merge: Merge, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Merges by the mean weighed by how many original tokens each token stands for.

    Args:
        merge: as returned by the functions above.
        x: `[B, N, C]`.
        size: `[B, N, 1]`; ones if not given.

    Returns:
        The merged tokens `[B, M, C]` and their sizes `[B, M, 1]`.

    Raises:
        TypeError: `merge` is no callable, such as the pair that the functions above return, or `x` no tensor.
        ValueError: sizes of another shape.
    """
    _check_merge(merge, x)
    if size is None:
        size = torch.ones_like(x[..., :1])
    if size.shape != (*x.shape[:-1], 1):
        raise ValueError(f"size must be {[*x.shape[:-1], 1]} as the tokens, got {list(size.shape)}")
    return merge(x, size=size[..., 0]), merge(size, mode="sum")


def merge_source(merge: Merge, x: Tensor, source: Tensor | None = None) -> Tensor:
    """Tracks which original tokens each token holds, as a dense `[B, M, N]` matrix of 0 and 1.

    Args:
        merge: as returned by the functions above.
        x: the tokens that are merged, `[B, N, C]`; read for its shape alone.
        source: the result of the previous layer's call, `[B, N, N0]`.

    Raises:
        TypeError: as in `merge_wavg`.
    """
    _check_merge(merge, x)
    if source is None:
        source = torch.eye(x.shape[1], device=x.device).expand(x.shape[0], -1, -1)
    return merge(source, mode="amax")


def do_nothing(x: Tensor, mode: str | None = None, size: Tensor | None = None) -> Tensor:
    """The merge and the unmerge of tokens that stay: gives back `x`. What tomesd 0.1.3 calls so."""
    return x


def compute_merge(x: Tensor, tome_info: Mapping[str, Any]) -> tuple[Callable[..., Tensor], ...]:
    """What tomesd 0.1.3 asks in a block: how to merge before each part of it, and how to unmerge after it.

    Args:
        x: the block's tokens, `[B, N, C]`.
        tome_info: `"size"`, the `(h, w)` of the network's input, and `"args"`, a dict of `ratio`,
            `max_downsample`, `sx`, `sy`, `use_rand`, `merge_attn`, `merge_crossattn`, `merge_mlp` and perhaps
            a `generator`. What is not there is as by default.

    Returns:
        Six callables: merge for self-attention, cross-attention and the feed-forward layers, and unmerge.

    Raises:
        TypeError: `tome_info` has no such size and options, or the ratio is no number.
        ValueError: these are not the tokens of an image of that size.
    """
    args: dict[str, Any] = dict(max_downsample=1, ratio=0.5, sx=2, sy=2, use_rand=True, merge_attn=True)
    try:
        args |= dict(tome_info["args"])
        height, width = (operator.index(side) for side in tome_info["size"])
    except (KeyError, TypeError, ValueError):
        raise TypeError(
            f'tome_info must be {{"size": (height, width), "args": {{"ratio": 0.5, ...}}}}, got {tome_info!r}'
        ) from None
    if not isinstance(args["ratio"], Real):
        raise TypeError(f"ratio must be a number, got {args['ratio']!r}")
    downsample = max(1, round(math.sqrt(height * width / x.shape[1])))
    both: tuple[Merge, Unmerge] = (do_nothing, do_nothing)
    if downsample <= args["max_downsample"]:
        w, h = -(-width // downsample), -(-height // downsample)
        r = int(x.shape[1] * float(args["ratio"]))
        generator = args.get("generator") if args["use_rand"] else None
        both = bipartite_soft_matching_random2d(
            x, w, h, args["sx"], args["sy"], r, no_rand=not args["use_rand"], generator=generator
        )
    wanted = [args.get(name, False) for name in ("merge_attn", "merge_crossattn", "merge_mlp")]
    return tuple(way if merges else do_nothing for way in both for merges in wanted)


def _check_metric(metric: Tensor) -> None:
    if not isinstance(metric, Tensor) or not metric.is_floating_point():
        kind = metric.dtype if isinstance(metric, Tensor) else type(metric).__name__
        raise TypeError(f"metric must be a floating point tensor, got {kind}")
    if metric.dim() != 3:
        raise ValueError(f"metric must be [B, N, C], got {list(metric.shape)}")


def _check_merge(merge: Any, x: Any) -> None:
    if not callable(merge):
        raise TypeError(
            f"merge must be the first of the two callables of a matching, got {type(merge).__name__}"
        )
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")


def _check_generator(generator: Any) -> None:
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(f"generator must be a torch.Generator or None, got {generator!r}")


def _identity(metric: Tensor) -> tuple[Merge, Unmerge]:
    nothing = TokenMap.identity(metric.shape[1], metric.device)
    return nothing.merge, nothing.unmerge


def _callables(metric: Tensor, partition: Partition, r: int) -> tuple[Merge, Unmerge]:
    r = min(r, partition.src.shape[1]) if partition.dst.shape[1] else 0
    if r <= 0:
        return _identity(metric)
    merging = match_exact(metric, partition, r)
    return merging.merge, merging.unmerge
