"""What attention to fewer keys misses, learned from a few queries that attend to all of them.

A probe is a token whose attention to all keys is computed as well. What fewer keys missed there is known, and
it is a smooth function of the query: kernel regression carries it to all other tokens.

    y_i += sum_p w(x_i, p) c_p,    w(a, p) = k(a, x_p) / sum_q k(a, x_q),    k(a, b) = exp(-|a - b|^2 / 2 s)

`s` is the mean square of the distance of probes from their mean, and `c` is such that probes are given what
they missed, but for a ridge. These weights are those of attention to the probes: factors of the query alone
cancel, so that `w(a, .)` is the softmax of `a x_p' / s - |x_p|^2 / 2 s`.

Source: kernel ridge regression as in Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006,
with the normalised kernels of Nadaraya and Watson, 1964.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .devices import has_cholesky
from .token_map import in_full_precision, take

# A third of it is a little nearer, three times as much is farther; a high one leaves most room for rounding.
RIDGE = 0.03
# Tokens for each probe at least, so that probes cost little beside what they look at.
SHARE = 16
TINY = 1e-30


def number_of_probes(most: int, tokens: int) -> int:
    """Number of probes of an image of so many tokens."""
    return min(most, tokens // SHARE)


def add_missed(y: Tensor, x: Tensor, probes: Tensor, given: Tensor, missed: Tensor) -> Tensor:
    """Adds to the output of an attention to fewer keys what these missed.

    The fit is of each sample by itself and in float32, shapes are static, nothing waits for the device, and
    gradients of all orders are those of the formula. Where a device cannot solve for it, nothing is added.

    Args:
        y: what attention to fewer keys gave, `[B, N, E]`.
        x: the tokens whose queries it had, `[B, N, C]`.
        probes: positions of P of them, int64 `[1 or B, P]`.
        given: these tokens, `[B, P, C]`.
        missed: what attention to all keys gives them, less what that to fewer keys does, `[B, P, E]`.

    Returns:
        `[B, N, E]` in the dtype of `y`.
    """
    if not has_cholesky(y.device):
        return y
    with in_full_precision(y):
        dtype, precise = y.dtype, torch.promote_types(y.dtype, torch.float32)
        x = x.to(dtype)
        given = given.to(precise)
        spread, centre = torch.var_mean(given, dim=1, correction=0, keepdim=True)
        # In half precision what is divided by less would overflow.
        size = spread.sum(2, keepdim=True).clamp_min(TINY if dtype == precise else 1e-6)
        # What all probes share cancels as well, and would be rounded.
        scaled = (given - centre) / size
        lengths = (scaled * (given + centre)).sum(2)[:, None]
        weights = nearness(x, scaled.to(dtype), lengths.to(dtype))
        # Rounding could make a matrix of no factors.
        among = take(weights, probes) if dtype == precise else nearness(given, scaled, lengths)
        # A probe is nearest to itself.
        own = among.diagonal(dim1=1, dim2=2)[..., None]
        kernel = among / own
        kernel.diagonal(dim1=1, dim2=2).add_(RIDGE)
        # cholesky_ex does not wait for the device to say whether it failed.
        root = torch.linalg.cholesky_ex(kernel).L
        found = torch.cholesky_solve(missed.to(precise) / own, root)
        return torch.baddbmm(y, weights, found.to(dtype))


def nearness(x: Tensor, scaled: Tensor, lengths: Tensor) -> Tensor:
    """The weight of each probe for tokens `x` `[B, N, C]`: `[B, N, P]`, of sum 1.

    Args:
        scaled: what tells probes from their mean, over the size of the kernel, `[B, P, C]`.
        lengths: their lengths' squares over it, but for a constant, `[B, 1, P]`.
    """
    return torch.baddbmm(lengths, x, scaled.mT, beta=-0.5).softmax(2)
