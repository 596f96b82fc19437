"""Unmerging by a linear fit: what a module did to merged tokens tells what it would do to each of theirs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .devices import has_cholesky
from .numbers import kept, up_to
from .token_map import TokenMap, in_full_precision

# So many merged tokens are looked at, or somewhat more; of each three, two are fitted and one judges the fit.
# Twice as many are a little nearer where attention is peaky, and take twice the time.
SAMPLE = 320
# Ridges, as shares of the mean square of the inputs: flat attention is fitted best by the first, peaky by the
# second (scripts/bench attention --fit).
RIDGES = (0.01, 0.3)
TINY = 1e-30


def unmerge_linear(token_map: TokenMap, x: Tensor, merged: Tensor, y: Tensor) -> Tensor:
    """Gives every token its group's output, plus what a linear map makes of its distance to the group.

        y_i = y_g(i) + (x_i - x_g(i)) W

    `W` is fitted, for each sample, to what the module made of merged tokens: ridge regression of `y` on
    `merged`. It is exact as far as the module is linear in each token and the ridge is small. Where other
    merged tokens are not predicted better than by their mean, or where a device cannot solve for it, `W` is
    0, and this is `TokenMap.unmerge`.

    The fit is in float32, shapes are static, nothing waits for the device, and gradients of all orders are
    those of the formula.

    Args:
        token_map: of N tokens to M groups.
        x: the tokens before they merged, `[B, N, C]`.
        merged: the same merged, which the module was given, `[B, M, C]`.
        y: what the module made of them, `[B, M, D]`.

    Returns:
        `[B, N, D]` in the dtype of `y`.
    """
    if token_map.is_identity or token_map.groups < 3 or not has_cholesky(y.device):
        return token_map.unmerge(y)
    with in_full_precision(x):
        apart = token_map.unmerge(merged).sub_(x).to(y.dtype)
        return token_map.unmerge(y).baddbmm_(apart, fit(merged, y).to(y.dtype), alpha=-1)


def fit(x: Tensor, y: Tensor) -> Tensor:
    """The linear map `[B, C, D]` that makes `y` `[B, M, D]` of `x` `[B, M, C]` but for a constant, or 0."""
    (b, m, c), d = x.shape, y.shape[2]
    every = max(1, m // SAMPLE)
    n = -(-m // every) // 3
    # Each third one to the end, so that what is fitted and what judges are contiguous; outputs for each map.
    tokens = [x, *[y] * (1 + len(RIDGES))]
    thirds = [z[:, : 3 * n * every : every].unflatten(1, (n, 3)).transpose(1, 2) for z in tokens]
    sample = torch.cat(thirds, dim=3)
    sample = sample.to(torch.promote_types(sample.dtype, torch.float32))
    sample = sample - sample.mean((1, 2), keepdim=True)
    fitted, judged = sample[:, :2].flatten(1, 2), sample[:, 2]
    inputs, is_wide = fitted[..., :c], c > 2 * n
    # Of the two forms of the same solution the one with the smaller matrix: channels by channels, or tokens
    # by tokens, where the map is `inputs.mT` times what is solved for.
    if is_wide:
        products, ridges = _products(sample.flatten(1, 2)[..., :c], inputs.mT, c)
        k = 2 * n
        features, wanted = products[:, k:], fitted[..., c : c + d]
    else:
        products, ridges = _products(inputs.mT, fitted[..., : c + d], c)
        k = c
        features, wanted = judged[..., :c], products[..., c:]
    maps = _solve(products[:, :k, :k], wanted, ridges[:, :k, :k])
    maps = F.pad(maps, (0, 0, d, 0))  # the first is 0
    missed = torch.baddbmm(judged[..., c:], features, maps.mT, alpha=-1)
    missed = torch.linalg.vector_norm(missed.unflatten(2, (-1, d)), dim=(1, 3))
    # What is not a number comes last; where nothing is one, the map that is 0 stays first.
    best = missed.sort(dim=1, stable=True).indices[:, 0]
    chosen: Tensor = maps.unflatten(1, (-1, d))[up_to(b, x.device), best].mT
    return inputs.mT @ chosen if is_wide else chosen


def _products(a: Tensor, b: Tensor, c: int) -> tuple[Tensor, Tensor]:
    """`a @ b`, `[B, n, m]`, and the ridges where the mean of its diagonal is 1, `[ridges, n, m]`."""

    def make() -> Tensor:
        # The trace of either form is the sum of the inputs' squares.
        share = torch.tensor(RIDGES, dtype=a.dtype, device=a.device) * min(n, m) / c
        return torch.eye(n, m, dtype=a.dtype, device=a.device) * share[:, None, None]

    n, m = a.shape[1], b.shape[2]
    ridges = kept(("ridges", n, m, c, a.dtype, RIDGES), a.device, make)
    # Not quite a @ b, so that gradients are numbers where all tokens are the same.
    return torch.baddbmm(ridges[0], a, b, beta=TINY), ridges


def _solve(gram: Tensor, right: Tensor, ridges: Tensor) -> Tensor:
    """The transposed solution for each of the ridges, one below the other, `[B, ridges * D, k]`."""
    size = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None, None]
    # cholesky_ex does not wait for the device to say whether it failed. Then there are no numbers.
    root = torch.linalg.cholesky_ex(torch.addcmul(gram[:, None], size, ridges)).L
    return torch.cholesky_solve(right[:, None].expand(-1, len(ridges), -1, -1), root).mT.flatten(1, 2)
