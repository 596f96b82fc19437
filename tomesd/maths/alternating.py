"""One step of merging in a vision transformer, in few operations: small batches wait for each of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .devices import has_bags, is_traced
from .matching import CHUNK, chunks
from .numbers import up_to
from .token_map import TokenMap, add_rows, in_full_precision

EPSILON = 1e-12


class Step(NamedTuple):
    """What a step has merged, of N tokens to M."""

    map: TokenMap
    tokens: Tensor  # those that are left, [B, M, C]
    kept: Tensor  # what they were before, [B, M, C]
    size: Tensor  # how many of the first tokens each stands for, float32 [B, M]


def merge_alternating(
    x: Tensor,
    size: Tensor,
    metric: Tensor,
    r: int,
    protected: int = 0,
    last: int = 0,
    mode: str = "mlerp",
) -> Step:
    """Merges the `r` even tokens that are most alike to an odd one into it, as ToMe does.

    It is `match_exact` of `alternate`, and `TokenMap.merge`: those say what comes out. Here only what leaves
    is touched twice, tokens of all samples are rows of one table, and nothing is sorted.

    Args:
        x: the tokens, `[B, N, C]`; gradients flow to them.
        size: how many of the first tokens each stands for, float32 `[B, N]`.
        metric: what is compared, `[B, N, D]`. Tokens that are not finite are like no others.
        r: how many tokens leave, 1 to half of those that may.
        protected: so many tokens before the others never merge.
        last: so many after them.
        mode: `"mean"`, weighed by sizes, or `"mlerp"`, that one's direction and the largest of the norms.

    Source: Bolya et al., Token Merging: Your ViT But Faster, 2023.
    """
    (b, n, c), m = x.shape, x.shape[1] - r
    even = slice(protected + protected % 2, n - last, 2)
    odd = slice(protected + 1 - protected % 2, n - last, 2)
    # In half precision many cosines near 1 are equal, and the accuracy of a model suffers.
    with in_full_precision(x):
        leaving, joined = _match(metric, even, odd, r)
    row = up_to(b * n, x.device)
    leaving = torch.add(row[even.start :: n, None], leaving, alpha=2).flatten()
    stays = leaving.new_ones(b * n).scatter(0, leaving, 0)
    rank = stays.cumsum(0).sub_(1)  # of what stays; groups are as their survivors
    group = rank.view(b, n)[:, odd].gather(1, joined).flatten()
    rows = rank.scatter(0, leaving, group)
    if has_bags(x.device) and not torch.compiler.is_compiling():  # ONNX cannot search
        keep = torch.searchsorted(rank, row[: b * m])
    else:  # rows that leave write to a spare last place, so that no data-dependent shape arises
        keep = rank.new_zeros(b * m + 1).scatter(0, rank.where(stays == 1, b * m), row)[: b * m]
    order = torch.cat([keep, leaving])
    ordered, sizes = x.reshape(b * n, c).index_select(0, order), size.flatten().index_select(0, order)
    weighed = ordered * sizes[:, None]  # in float32 at least
    if x.is_cuda:  # adds in one order always, as index_add there does not
        total = weighed[: b * m].index_put((group,), weighed[b * m :], accumulate=True)
    else:
        total = add_rows(weighed[: b * m], group, weighed[b * m :])
    merged_size = sizes[: b * m].scatter_add(0, group, sizes[b * m :])
    if mode == "mean":
        tokens = total / merged_size[:, None]
    else:
        norm = _length(ordered)
        longest = norm[: b * m].scatter_reduce(0, group, norm[b * m :], "amax")
        # A mean of zero has no direction to keep: it stays zero.
        tokens = total * (longest / _length(total).clamp_min(EPSILON))[:, None]
    index, survivors = rows.view(b, n), keep.view(b, m)
    if b > 1 or is_traced():
        index, survivors = index - row[: b * m : m, None], survivors - row[::n, None]
    return Step(
        TokenMap(index, survivors, {"rows": rows, "keep_rows": keep}),
        tokens.to(x.dtype).view(b, m, c),
        ordered[: b * m].view(b, m, c),
        merged_size.view(b, m),
    )


@torch.no_grad()
def _match(metric: Tensor, even: slice, odd: slice, r: int) -> tuple[Tensor, Tensor]:
    """Which `r` of the even tokens leave, and whom of the odd ones they join, `[B, r]` each."""
    unit = (metric / _length(metric)[..., None]).nan_to_num_(0, 0, 0)
    to = unit[:, odd].transpose(1, 2)
    parts = [(part @ to).max(dim=-1) for part in chunks(unit[:, even], max(1, CHUNK // to.shape[2]))]
    value, local = parts[0]
    if len(parts) > 1:
        value, local = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
    leaving = value.topk(r, dim=1, sorted=False).indices
    return leaving, local.gather(1, leaving)


def _length(x: Tensor) -> Tensor:
    """Of each token; squares of float16 overflow."""
    dtype = torch.float32 if x.dtype.itemsize < 4 else None
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=dtype)
    return length
