"""Unmerging by a linear fit: what a module did to merged tokens tells what it would do to each of theirs."""

from __future__ import annotations

import torch
from torch import Tensor

from .devices import has_cholesky
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
        w = fit(merged, y).to(y.dtype)
        # Before unmerging, so that nothing but the output has the size of all tokens.
        constant = torch.baddbmm(y, merged.to(y.dtype), w, alpha=-1)
        return token_map.unmerge(constant).baddbmm_(x.to(y.dtype), w)


def fit(x: Tensor, y: Tensor) -> Tensor:
    """The linear map `[B, C, D]` that makes `y` `[B, M, D]` of `x` `[B, M, C]` but for a constant, or 0."""
    c, every = x.shape[2], -(-x.shape[1] // SAMPLE)
    n = -(-x.shape[1] // every) // 3
    # Each third one to the end, so that what is fitted and what judges are contiguous.
    thirds = [z[:, : 3 * n * every : every].unflatten(1, (n, 3)).transpose(1, 2) for z in (x, y)]
    sample = torch.cat(thirds, dim=3)
    sample = sample.to(torch.promote_types(sample.dtype, torch.float32))
    sample = sample - sample.mean((1, 2), keepdim=True)
    first, second = maps = ridge(sample[:, :2].flatten(1, 2), c)
    given, wanted = sample[:, 2].tensor_split([c], dim=2)
    missed = torch.linalg.vector_norm(wanted - given @ maps, dim=(2, 3), keepdim=True)
    better = torch.where(missed[1] < missed[0], second, first)
    # Not numbers are not less, so that a sample that has such falls back as well.
    fits = missed.amin(0) < torch.linalg.vector_norm(wanted, dim=(1, 2), keepdim=True)
    return torch.where(fits, better, 0)


def ridge(sample: Tensor, c: int) -> Tensor:
    """Ridge regression, without intercept, of the channels from `c` on, on those before.

    Args:
        sample: `[B, n, C + D]`.

    Returns:
        One for each of the ridges, `[2, B, C, D]`.
    """
    x, y = sample[..., :c], sample[..., c:]
    if c <= sample.shape[1]:
        gram = x.mT @ sample
        return _solve(gram[..., :c], gram[..., c:], c)
    # Of the two forms of the same solution this one has the smaller matrix.
    return x.mT @ _solve(x @ x.mT, y, c)


def _solve(gram: Tensor, right: Tensor, c: int) -> Tensor:
    # The trace of either form is the sum of the inputs' squares.
    size = gram.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).add_(TINY)
    grams = gram.repeat(len(RIDGES), 1, 1, 1)
    for i, share in enumerate(RIDGES):
        grams[i].diagonal(dim1=1, dim2=2).add_(size, alpha=share * gram.shape[1] / c)
    # cholesky_ex does not wait for the device to say whether it failed. Then there are no numbers, which fit
    # nothing.
    return torch.cholesky_solve(right.expand(len(RIDGES), *right.shape), torch.linalg.cholesky_ex(grams).L)
