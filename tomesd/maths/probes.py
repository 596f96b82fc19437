"""What attention to fewer keys misses, learned from a few queries that attend to all of them.

A probe is a token whose attention to all keys is computed as well. What fewer keys missed there is known, and
it is a smooth function of the query: kernel ridge regression carries it to all other tokens.

    y_i += sum_p k(x_i, x_p) c_p,    k(a, b) = exp(-|a - b|^2 / 2 s),    (K + RIDGE) c = missed

`s` is the mean square of the distance of probes from their mean. The kernel is the one of attention itself,
whose weights are exponentials of products, but for factors of its own of each token, which keep it from
growing: far from all probes nothing is added.

Source: kernel ridge regression, also known as kriging, as in Rasmussen and Williams, Gaussian Processes for
Machine Learning, 2006.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .devices import has_cholesky
from .token_map import _take, in_full_precision

# .003 to .03 are alike; the highest of these leaves most room for what rounding does to the kernel.
RIDGE = 0.03
# Tokens for each probe at least, so that probes cost little beside what they look at.
SHARE = 16
TINY = 1e-30


def number_of_probes(most: int, tokens: int) -> int:
    """Number of probes of an image of so many tokens."""
    return min(most, tokens // SHARE)


def add_missed(y: Tensor, x: Tensor, probes: Tensor, missed: Tensor) -> Tensor:
    """Adds to the output of an attention to fewer keys what these missed.

    The fit is of each sample by itself and in float32, shapes are static, nothing waits for the device, and
    gradients of all orders are those of the formula. Where a device cannot solve for it, nothing is added.

    Args:
        y: what attention to fewer keys gave, `[B, N, E]`.
        x: the tokens whose queries it had, `[B, N, C]`.
        probes: positions of P of them, int64 `[1 or B, P]`.
        missed: what attention to all keys gives them, less what that to fewer keys does, `[B, P, E]`.

    Returns:
        `[B, N, E]` in the dtype of `y`.
    """
    if not has_cholesky(y.device):
        return y
    with in_full_precision(y):
        precise = torch.promote_types(y.dtype, torch.float32)
        spread, centre = torch.var_mean(_take(x, probes).to(precise), dim=1, correction=0, keepdim=True)
        # In half precision what is divided by less would overflow.
        size = spread.sum(2, keepdim=True).clamp_min(TINY if y.dtype == precise else 1e-6)
        # Distances do not depend on the centre, but their rounding does.
        x = x.to(y.dtype) - centre.to(y.dtype)
        of_x = torch.linalg.vector_norm(x, dim=2, keepdim=True, dtype=precise).square() / size
        given, of_given = _take(x, probes), _take(of_x, probes)
        kernel = closeness(x, of_x, given, of_given, size)
        if y.dtype == precise:
            among = _take(kernel, probes)
        else:  # rounding could make this one of no factors
            given = given.to(precise)
            among = closeness(given, of_given, given, of_given, size)
            if among.requires_grad:  # training needs it as it was
                among = among.clone()
        among.diagonal(dim1=1, dim2=2).add_(RIDGE)
        # cholesky_ex does not wait for the device to say whether it failed.
        root = torch.linalg.cholesky_ex(among).L
        found = torch.cholesky_solve(missed.to(precise), root)
        return torch.baddbmm(y, kernel, found.to(y.dtype))


def closeness(a: Tensor, of_a: Tensor, b: Tensor, of_b: Tensor, size: Tensor) -> Tensor:
    """`exp(-|a - b|^2 / 2 size)` of `a` `[B, N, C]` and `b` `[B, P, C]`: `[B, N, P]`.

    `of_a` and `of_b` are their lengths' squares, over `size`.
    """
    of_a, of_b, scaled = of_a.to(a.dtype), of_b.to(a.dtype), (b / size).to(a.dtype)
    return torch.baddbmm(of_a, a, scaled.mT, beta=-0.5).add_(of_b.mT, alpha=-0.5).exp_()
