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
    of_all, of_few = x.mean(1, keepdim=True), sampled.mean(1, keepdim=True)
    if moments < 2:
        return Missed(of_all - of_few)
    left = _covariance(sampled, of_few)
    return Missed(of_all - of_few, _covariance(x, of_all) - left, left)


def missed_by_groups(x: Tensor, merged: Tensor, token_map: TokenMap) -> Missed:
    """What keys `merged` `[B, M, C]`, weighed by their sizes, miss of tokens `x` `[B, N, C]`: no mean."""
    x, merged, n = _precise(x), _precise(merged), token_map.tokens
    apart = x - token_map.unmerge(merged)
    merged = merged - x.mean(1, keepdim=True)
    # Not sizes / n, which would be of torch's default dtype.
    left = (merged * token_map.sizes[..., None]).mT @ merged / n
    return Missed(None, torch.baddbmm(left, apart.mT, apart, beta=0, alpha=1 / n), left)


def add_missed(y: Tensor, x: Tensor, missed: Missed, layers: Layers) -> Tensor:
    """Adds to the output `y` `[B, N, E]` of an attention of queries `x` `[B, N, C]` what its keys missed."""
    mean, covariance, left = missed
    q, k, v, out = (_precise(weight) for weight in (layers.q, layers.k, layers.v, layers.out))
    shift = 0 if mean is None else mean.to(v.dtype) @ v.mT @ out.mT
    if covariance is None or left is None:
        return (y + shift).to(y.dtype)
    b, heads = y.shape[0], layers.heads
    # Each product is one of matrices, of all heads or all samples at once: [2, B, C, heads * D] of keys, then
    # [heads, 2 * B * D, E] with values, then [C, 2 * B * E] with queries.
    products = (torch.stack([covariance, left]).to(k.dtype) @ k.mT).unflatten(3, (heads, -1))
    products = products.permute(3, 0, 1, 4, 2).reshape(heads, -1, v.shape[1])
    products = products @ v.unflatten(0, (heads, -1)).mT @ out.unflatten(1, (heads, -1)).permute(1, 2, 0)
    products = products.view(heads, 2, b, -1, out.shape[0]).permute(0, 3, 1, 2, 4).reshape(q.shape[0], -1)
    matrix, of_left = (q.mT @ products).view(-1, 2, b, out.shape[0]).permute(1, 2, 0, 3)
    some = slice(None, None, -(-x.shape[1] // SAMPLE))
    given, seen = (_precise(z[:, some]) for z in (x, y))
    expected = (given - given.mean(1, keepdim=True)) @ of_left
    # Sums of products with what is centred need no other centring.
    whole = expected.square().sum((1, 2)).mul(layers.scale).clamp_min(TINY)
    damping = ((expected * seen).sum((1, 2)) / whole).clamp(0, 1).mul(layers.scale)[:, None, None]
    if layers.q_bias is not None:
        of_bias = (_precise(layers.q_bias) @ products).view(2, b, 1, -1)[0]
        shift = shift + damping * of_bias
    return (y + shift).to(y.dtype).baddbmm_(x.to(y.dtype), (damping * matrix).to(y.dtype))


def _covariance(x: Tensor, mean: Tensor) -> Tensor:
    """That of tokens `x` `[B, N, C]` of this `mean` `[B, 1, C]`."""
    return torch.baddbmm(mean.mT @ mean, x.mT, x, beta=-1, alpha=1 / x.shape[1])


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
