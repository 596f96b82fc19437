"""What attention to fewer keys misses of attention to all, by the first two moments of the tokens.

Where a query tells keys little apart, attention gives the mean of the values and, to first order in the
query, its product with the covariance of keys and values. Both are known exactly, of all tokens and of those
that are left. What they differ by is added: a vector, and a linear map of the tokens.

Where attention is peaky, it gives less than that product, and the map would add too much. How much less is
seen in what attention to the keys that are left gave, so the map is damped by it: a control variate.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .token_map import TokenMap

# So many tokens are looked at to see how peaky attention is.
SAMPLE = 512
TINY = 1e-30


class Layers(NamedTuple):
    """The weights of an attention, which is `softmax(scale * q k') v` in each head between linear layers."""

    q: Tensor  # [heads * D, C]
    q_bias: Tensor | None  # [heads * D]
    k: Tensor  # [heads * D, C]
    v: Tensor  # [heads * D, C]
    out: Tensor  # [E, heads * D]
    heads: int
    scale: float


class Missed(NamedTuple):
    """By how much moments of all tokens differ from those of the keys that are left."""

    mean: Tensor | None = None  # [B, 1, C]; None where it does not
    covariance: Tensor | None = None  # [B, C, C]; None where it is not asked for
    left: Tensor | None = None  # the covariance of the keys that are left, [B, C, C]


def missed_by_sample(x: Tensor, sampled: Tensor, sample: TokenMap, moments: int) -> Missed:
    """What `sampled` ones of tokens `x` `[B, N, C]` miss: of the mean, with 2 moments of the covariance."""
    x, sampled = _precise(x), _precise(sampled)
    n, m = sample.tokens, sample.groups
    share = x.new_full((sample.keep.shape[0], n), 1 / n)
    share = share.scatter(1, sample.keep, x.new_full(sample.keep.shape, 1 / n - 1 / m))
    weighted = x * share[..., None]
    mean = weighted.sum(1, keepdim=True)
    if moments < 2:
        return Missed(mean)
    # Covariances are second moments less squares of means: those of all, and of all less the difference.
    cross = x.mean(1, keepdim=True).mT @ mean
    sampled = sampled - sampled.mean(1, keepdim=True)
    covariance = weighted.mT @ x - cross - cross.mT + mean.mT @ mean
    return Missed(mean, covariance, sampled.mT @ sampled / m)


def missed_by_groups(x: Tensor, merged: Tensor, token_map: TokenMap) -> Missed:
    """What keys `merged` `[B, M, C]`, weighed by their sizes, miss of tokens `x` `[B, N, C]`: no mean."""
    x, merged, n = _precise(x), _precise(merged), token_map.tokens
    apart = x - token_map.unmerge(merged)
    merged = merged - x.mean(1, keepdim=True)
    return Missed(None, apart.mT @ apart / n, (merged * (token_map.sizes / n)[..., None]).mT @ merged)


def add_missed(y: Tensor, x: Tensor, missed: Missed, layers: Layers) -> Tensor:
    """Adds to the output `y` `[B, N, E]` of an attention of queries `x` `[B, N, C]` what its keys missed."""
    mean, covariance, left = missed
    q, k, v, out = (_precise(weight) for weight in (layers.q, layers.k, layers.v, layers.out))
    shift = 0 if mean is None else mean.to(v.dtype) @ v.mT @ out.mT
    if covariance is None or left is None:
        return (y + shift).to(y.dtype)
    keys, values, queries = (weight.unflatten(0, (layers.heads, -1)) for weight in (k, v, q))
    # [2, B, heads, D, D]
    change = layers.scale * (keys @ torch.stack([covariance, left])[:, :, None].to(k.dtype)) @ values.mT

    def outputs(per_head: Tensor) -> Tensor:
        return per_head.transpose(-3, -2).flatten(-2) @ out.mT  # of [..., heads, T, D]

    matrix, of_left = outputs(queries.mT @ change)
    some = slice(None, None, -(-x.shape[1] // SAMPLE))
    given, seen = (_precise(z[:, some]) for z in (x, y))
    expected = (given - given.mean(1, keepdim=True)) @ of_left
    # Sums of products with what is centred need no other centring.
    damping = (expected * seen).sum((1, 2)) / expected.square().sum((1, 2)).clamp_min(TINY)
    damping = damping.clamp(0, 1)[:, None, None]
    if layers.q_bias is not None:
        shift = shift + damping * outputs(
            _precise(layers.q_bias).unflatten(0, (layers.heads, 1, -1)) @ change[0]
        )
    return (y + shift).to(y.dtype).baddbmm_(x.to(y.dtype), (damping * matrix).to(y.dtype))


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
