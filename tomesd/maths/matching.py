"""Metric + partition + r -> TokenMap: which r tokens leave, and whom they join."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .grid import Grid, Partition
from .numbers import up_to
from .token_map import TokenMap, lengths, take

# Similarities held at once for each sample by exact matching; more are computed in chunks of src rows. The
# size of the batch does not enter: compiled and exported programs may leave it open.
CHUNK = 1 << 24
TINY = 1e-30


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of an image, all of one shape: `L` tokens and `K` cells each.

    Where the image is no multiple of them, the last ones of a row or column overlap their neighbours.
    """

    tokens: Tensor  # position of each token, int64 [windows, L]
    cells: Tensor  # number of each cell, int64 [windows, K]
    slot: Tensor  # where in `tokens` each token of the image is to be looked up, int64 [N]

    @classmethod
    def of(cls, grid: Grid, side: int = 16, device: torch.device | None = None) -> Windows:
        """The windows of an image, at most `side` tokens wide and high, as even as the image allows."""
        y = _Axis(grid.h, grid.sy, grid.rows, side, device)
        x = _Axis(grid.w, grid.sx, grid.columns, side, device)

        def outer(y: Tensor, x: Tensor, width: int) -> Tensor:
            return (y[:, None, :, None] * width + x[None, :, None, :]).flatten(2).flatten(0, 1)

        number = y.number[:, None] * x.starts.shape[0] + x.number
        slot = (number * y.tokens.shape[1] + y.place[:, None]) * x.tokens.shape[1] + x.place
        cells = outer(y.cells, x.cells, grid.columns)
        return cls(outer(y.tokens, x.tokens, grid.w), cells, slot.flatten())

    def compared(self, dst: Tensor) -> Tensor:
        """The tokens of each window, then the dst of its cells, given one of each cell `[1 or B, cells]`.

        Returns:
            Positions, int64 `[1 or B, windows, L + K]`.
        """
        there = dst.index_select(1, self.cells.flatten()).view(-1, *self.cells.shape)
        return torch.cat([self.tokens.expand(there.shape[0], -1, -1), there], dim=2)


@torch.no_grad()
def match_exact(
    metric: Tensor, partition: Partition, r: int, ids: Tensor | None = None, padding: int | None = None
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
    norm = lengths(metric)
    src, dst = take(metric, partition.src), take(metric, partition.dst)
    unit, bad = _unit(dst, take(norm, partition.dst))
    chunk = max(1, CHUNK // max(1, unit.shape[1]))
    products = (part @ unit.transpose(1, 2) for part in chunks(src, chunk))
    src_ids = None
    if ids is not None:
        src_ids, dst_ids = take(ids, partition.src), take(ids, partition.dst)
        strangers = (part[..., None] != dst_ids[:, None] for part in chunks(src_ids, chunk))
        products = (
            part.masked_fill(mask, -torch.inf) for part, mask in zip(products, strangers, strict=True)
        )
    best = [part.max(dim=-1) for part in products]
    value, local = (torch.cat(parts, dim=1) for parts in zip(*best, strict=True))
    score = _score(value, take(norm, partition.src), bad.gather(1, local))
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
def match_windowed(
    metric: Tensor, windows: Windows, dst: Tensor, r: int, compared: Tensor | None = None
) -> TokenMap:
    """As exact matching, but a token may only join a dst of its own window of the image.

    Similarity is the cosine of what layer norms leave of tokens, which is what attention is given. The r best
    pairs are still taken over the whole image. With windows of side w it costs `N * w^2 / (sx * sy)`
    similarities instead of `N^2 / (sx * sy)`. Of a window in which a dst is not finite tokens merge last.
    Groups are in no order.

    Args:
        metric: what is compared, floating point `[B, h * w, C]`.
        windows: of the image.
        dst: position of each cell's dst, int64 `[1 or B, cells]`.
        r: how many tokens leave, at most the grid's `max_r`.
        compared: `windows.compared(dst)`, if it is known already.
    """
    (b, n, c), cells, (count, side) = metric.shape, dst.shape[1], windows.tokens.shape
    compared = windows.compared(dst) if compared is None else compared
    tokens = take(F.layer_norm(metric, (c,), eps=TINY), compared.flatten(1)).view(b * count, -1, c)
    value, local = (tokens[:, :side] @ tokens[:, side:].mT).max(dim=-1)
    del tokens  # the largest that is held

    def joined(choices: Tensor) -> Tensor:
        """Which of each window's `choices` `[1 or B, windows, K]` each token of the image takes."""
        best = choices.expand(b, -1, -1).gather(2, local.view(b, count, -1))
        # Back to the image: where windows overlap each token takes its own window's answer.
        return best.view(b, -1).index_select(1, windows.slot)

    if r == n - cells:  # all join, and nobody has to be chosen
        index = joined(windows.cells[None])
        cell = up_to(cells, dst.device)
        dst = dst.expand(b, -1)
        return TokenMap(index.scatter_(1, dst, cell.expand(b, -1)), dst)
    # dst must rank below whatever may leave, or they could be among what leaves.
    score = value.view(b, -1).index_select(1, windows.slot).nan_to_num_(torch.finfo(value.dtype).min)
    score.scatter_(1, dst.expand(b, -1), -torch.inf)
    keep = score.topk(n - r, dim=1, largest=False, sorted=False).indices
    stays_or_joins = joined(compared[..., side:]).scatter_(1, keep, keep)
    # Of tokens that leave it is never read.
    rank = torch.empty_like(stays_or_joins).scatter_(1, keep, up_to(n - r, dst.device).expand(b, -1))
    return TokenMap(rank.gather(1, stays_or_joins), keep)


def chunks(x: Tensor, size: int) -> tuple[Tensor, ...]:
    # The exporter of TorchScript cannot split into one part.
    return (x,) if x.shape[1] <= size else x.split(size, dim=1)


def _unit(dst: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors of dst, and which of them are not finite (those become zero)."""
    bad = ~torch.isfinite(norm)
    norm = norm.clamp_min(torch.finfo(norm.dtype).tiny)
    # The argmax over dst does not depend on the length of src, so only dst needs normalising.
    return (dst / norm[..., None]).masked_fill(bad[..., None], 0).to(dst.dtype), bad


def _score(value: Tensor, norm: Tensor, bad: Tensor) -> Tensor:
    """Cosines from products of src, of this norm, with unit dst; -2, below any, where one is not finite."""
    score = value / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return score.where(torch.isfinite(score) & ~bad, -2)


class _Axis:
    """The windows along one axis of the image.

    The last one is moved inwards to fit, and each reaches as far past its cells as the image does past its
    last one: so all have one shape, and all tokens have dst to join.
    """

    def __init__(self, length: int, stride: int, cells: int, side: int, device: torch.device | None) -> None:
        windows = -(-cells // max(1, side // stride))
        span = -(-cells // windows)  # as even as can be, so that the last one overlaps little
        first = torch.arange(windows, device=device) * span
        self.starts = first.clamp_max(cells - span)
        self.cells = self.starts[:, None] + torch.arange(span, device=device)
        reach = span * stride + length - cells * stride
        self.tokens = self.starts[:, None] * stride + torch.arange(reach, device=device)
        token = torch.arange(length, device=device)
        self.number = (token // (span * stride)).clamp_max(first.shape[0] - 1)
        self.place = token - self.starts[self.number] * stride
