"""Unmerging by a linear fit: what a module did to merged tokens tells what it would do to each of theirs."""

from __future__ import annotations

import torch
from torch import Tensor

from .token_map import TokenMap, in_full_precision

# So many merged tokens are looked at; of each three, two are fitted and one judges the fit.
SAMPLE = 768
# Ridges, as shares of the mean square of the inputs: flat attention is fitted best by the first, peaky by the
# second (scripts/bench attention --fit).
RIDGES = (0.01, 0.3)
TINY = 1e-30


def unmerge_linear(token_map: TokenMap, x: Tensor, merged: Tensor, y: Tensor) -> Tensor:
    """Gives every token its group's output, plus what a linear map makes of its distance to the group.

        y_i = y_g(i) + (x_i - x_g(i)) W

    `W` is fitted, for each sample, to what the module made of merged tokens: ridge regression of `y` on
    `merged`. It is exact as far as the module is linear in each token and the ridge is small. Where other
    merged tokens are not predicted better than by their mean, `W` is 0, and this is `TokenMap.unmerge`.

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
    base = token_map.unmerge(y)
    if token_map.is_identity or token_map.groups < 3:
        return base
    # In place, as each of these has the size of all tokens.
    apart = token_map.unmerge(merged).neg_().add_(x).to(y.dtype)
    with in_full_precision(x):
        return base.baddbmm_(apart, fit(merged, y).to(y.dtype))


def fit(x: Tensor, y: Tensor) -> Tensor:
    """The linear map `[B, C, D]` that makes `y` `[B, M, D]` of `x` `[B, M, C]` but for a constant, or 0."""
    some = slice(None, None, -(-x.shape[1] // SAMPLE))
    sample = torch.cat([x[:, some], y[:, some]], dim=2)
    sample = sample[:, : sample.shape[1] // 3 * 3].to(torch.promote_types(sample.dtype, torch.float32))
    thirds = (sample - sample.mean(1, keepdim=True)).unflatten(1, (-1, 3))
    inputs, outputs = thirds[:, :, :2].flatten(1, 2).tensor_split([x.shape[2]], dim=2)
    given, wanted = thirds[:, :, 2].tensor_split([x.shape[2]], dim=2)
    first, second = maps = ridge(inputs, outputs)
    missed = (wanted - given @ maps).square().sum((2, 3))
    better = torch.where((missed[1] < missed[0])[:, None, None], second, first)
    # Not numbers are not less, so that a sample that has such falls back as well.
    fits = missed.amin(0) < wanted.square().sum((1, 2))
    return torch.where(fits[:, None, None], better, 0)


def ridge(x: Tensor, y: Tensor) -> Tensor:
    """Ridge regression, without intercept, of `y` `[B, n, D]` on `x` `[B, n, C]`: `[2, B, C, D]`."""
    n, c = x.shape[1:]
    # Of the two forms of the same solution the one with the smaller matrix.
    gram, right = (x.mT @ x, x.mT @ y) if c <= n else (x @ x.mT, y)
    size = x.square().sum((1, 2)) / c + TINY
    grams = gram.repeat(len(RIDGES), 1, 1, 1)
    for i, share in enumerate(RIDGES):
        grams[i].diagonal(dim1=1, dim2=2).add_(size[:, None], alpha=share)
    # cholesky_ex does not wait for the device to say whether it failed; with a ridge it does not.
    found = torch.cholesky_solve(right.expand(len(RIDGES), *right.shape), torch.linalg.cholesky_ex(grams).L)
    return found if c <= n else x.mT @ found
