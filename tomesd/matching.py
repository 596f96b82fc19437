"""Metric + partition + r -> TokenMap: which r tokens leave, and whom they join."""

from __future__ import annotations

import torch
from torch import Tensor

from .partition import Grid, Partition
from .token_map import TokenMap, _norm, _take

# Similarities held at once for each sample by exact matching; more are computed in chunks of src rows. The
# size of the batch does not enter: compiled and exported programs may leave it open.
CHUNK = 1 << 24


@torch.no_grad()
def match_exact(
    metric: Tensor,
    partition: Partition,
    r: int,
    ids: Tensor | None = None,
    padding: int | None = None,
) -> TokenMap:
    """Merges the `r` src tokens most similar to their most similar dst into it (Bolya et al., 2023).

    Similarity is the cosine. Tokens with non-finite values merge last. Memory is bounded: similarities
    are computed in chunks of src rows.

    Args:
        metric: what is compared, floating point `[B, N, C]`.
        partition: who may leave and who receives.
        r: how many tokens leave, at most the number of src tokens.
        ids: which sequence each token belongs to, integer `[B, N]`; a token may only join its own sequence.
        padding: the id of tokens that leave first.

    Raises:
        ValueError: fewer than r tokens have somebody in their own sequence to join.
    """
    src, dst = _rows(metric, partition.src), _rows(metric, partition.dst)
    unit, bad = _unit(dst)
    chunk = max(1, CHUNK // max(1, unit.shape[1]))
    products = (part @ unit.mT for part in src.split(chunk, dim=1))
    src_ids = None
    if ids is not None:
        src_ids, dst_ids = _rows(ids, partition.src), _rows(ids, partition.dst)
        strangers = (part[..., None] != dst_ids[:, None] for part in src_ids.split(chunk, dim=1))
        products = (
            part.masked_fill(mask, -torch.inf) for part, mask in zip(products, strangers, strict=True)
        )
    best = [part.max(dim=-1) for part in products]
    value, local = (torch.cat(parts, dim=1) for parts in zip(*best, strict=True))
    score = _score(value, src, bad.gather(1, local))
    if src_ids is not None:
        if padding is not None:
            score = score.masked_fill(src_ids == padding, 2)
        score = score.masked_fill(value == -torch.inf, -torch.inf)
        joins = (score > -torch.inf).sum(1)
        if not torch.compiler.is_compiling() and bool((joins < r).any()):
            raise ValueError(f"r is {r}, but in one sample only {int(joins.min())} tokens have one to join")
    chosen = score.topk(r, dim=1, sorted=False).indices
    b = metric.shape[0]
    return TokenMap.from_pairs(
        metric.shape[1],
        partition.src.expand(b, -1).gather(1, chosen),
        partition.dst.expand(b, -1).gather(1, local.gather(1, chosen)),
    )


@torch.no_grad()
def match_windowed(metric: Tensor, grid: Grid, dst: Tensor, r: int, window: int = 16) -> TokenMap:
    """As exact matching, but a token may only join a dst of its own window of the image.

    The r best pairs are still taken over the whole image. Costs `N * window^2 / (sx * sy)`
    similarities instead of `N^2 / (sx * sy)`.

    Args:
        metric: what is compared, floating point `[B, h * w, C]`.
        grid: the image.
        dst: position of each cell's dst, int64 `[1 or B, cells]`.
        r: how many tokens leave, at most `grid.max_r`.
        window: side of a window in tokens, at most; windows are as even as the image allows.
    """
    b, n, _ = metric.shape
    dst = dst.expand(b, -1)
    tokens, cells, slot = _windows(grid, window, metric.device)
    windows, k = cells.shape
    members = metric.index_select(1, tokens.flatten()).unflatten(1, tokens.shape).flatten(0, 1)
    receivers = dst.index_select(1, cells.flatten())
    unit, bad = _unit(_take(metric, receivers))
    value, local = (members @ unit.unflatten(1, (windows, k)).flatten(0, 1).mT).max(dim=-1)
    # Back from windows to the image: where windows overlap each token takes its own window's answer.
    local = local.unflatten(0, (b, windows)) + k * torch.arange(windows, device=metric.device)[:, None]
    local = local.flatten(1).index_select(1, slot)
    value = value.view(b, -1).index_select(1, slot)
    # dst must rank below whatever may leave, or topk could pick one of them.
    score = _score(value, metric, bad.gather(1, local)).scatter(1, dst, -torch.inf)
    chosen = score.topk(r, dim=1, sorted=False).indices
    return TokenMap.from_pairs(n, chosen, receivers.gather(1, local.gather(1, chosen)))


def _rows(x: Tensor, positions: Tensor) -> Tensor:
    if positions.shape[0] == 1:
        return x.index_select(1, positions[0])
    return _take(x, positions)


def _unit(dst: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors of dst, and which of them are not finite (those become zero)."""
    norm = _norm(dst)
    bad = ~torch.isfinite(norm)
    norm = norm.clamp_min(torch.finfo(norm.dtype).tiny)
    # The argmax over dst does not depend on the length of src, so only dst needs normalising.
    return (dst / norm[..., None]).masked_fill(bad[..., None], 0).to(dst.dtype), bad


def _score(value: Tensor, src: Tensor, bad: Tensor) -> Tensor:
    """Cosines from products with unit dst; -2, below any cosine, where src or its dst is not finite."""
    norm = _norm(src)
    score = value / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return score.where(torch.isfinite(score) & ~bad, -2)


def _windows(grid: Grid, window: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens `[windows, L]` and cells `[windows, K]` of each window, and each token's slot `[N]` in them."""
    y = _Axis(grid.h, grid.sy, grid.rows, window, device)
    x = _Axis(grid.w, grid.sx, grid.columns, window, device)

    def outer(y: Tensor, x: Tensor, width: int) -> Tensor:
        return (y[:, None, :, None] * width + x[None, :, None, :]).flatten(2).flatten(0, 1)

    number = y.number[:, None] * x.starts.shape[0] + x.number
    slot = (number * y.tokens.shape[1] + y.place[:, None]) * x.tokens.shape[1] + x.place
    return outer(y.tokens, x.tokens, grid.w), outer(y.cells, x.cells, grid.columns), slot.flatten()


class _Axis:
    """The windows along one axis of the image.

    The last window is moved inwards to fit, and each reaches as far past its cells as the image does past
    its last one: so all have one shape, and tokens outside of whole cells have dst to join as well.
    """

    def __init__(self, length: int, stride: int, cells: int, window: int, device: torch.device) -> None:
        windows = -(-cells // max(1, window // stride))
        span = -(-cells // windows)  # as even as can be, so that the last one overlaps little
        first = torch.arange(windows, device=device) * span
        self.starts = first.clamp_max(cells - span)
        self.cells = self.starts[:, None] + torch.arange(span, device=device)
        reach = span * stride + length - cells * stride
        self.tokens = self.starts[:, None] * stride + torch.arange(reach, device=device)
        token = torch.arange(length, device=device)
        self.number = (token // (span * stride)).clamp_max(first.shape[0] - 1)
        self.place = token - self.starts[self.number] * stride
