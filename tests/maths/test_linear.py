"""The linear unmerge, against its formula in plain loops and on modules that are linear, or not at all."""

import pytest
import torch
from torch import nn

from tomesd import TokenMap
from tomesd.maths import linear
from tomesd.maths.linear import unmerge_linear


def case(b=2, n=300, groups=150, c=8, dtype=torch.float64, seed=0):
    """A map of some samples, tokens that lie near to those of their group, and the same merged."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.cat([torch.arange(groups), torch.randint(groups, (n - groups,), generator=generator)])
    token_map = TokenMap.from_index(
        torch.stack([index[torch.randperm(n, generator=generator)] for _ in range(b)]), groups
    )
    centres = torch.randn(b, groups, c, generator=generator, dtype=torch.float64)
    x = token_map.unmerge(centres) + 0.1 * torch.randn(b, n, c, generator=generator, dtype=torch.float64)
    x = x.to(dtype)
    return token_map, x, token_map.merge(x)


def error(got, want):
    return ((got - want).norm() / want.norm()).item()


def test_it_is_exact_where_the_module_is_linear(monkeypatch):
    token_map, x, merged = case()
    module = nn.Linear(8, 5, dtype=torch.float64)
    want = module(x)
    assert error(token_map.unmerge(module(merged)), want) > 0.05
    assert error(unmerge_linear(token_map, x, merged, module(merged)), want) < 0.002
    monkeypatch.setattr(linear, "RIDGES", (1e-12, 1e-12))
    torch.testing.assert_close(unmerge_linear(token_map, x, merged, module(merged)), want)


@pytest.mark.parametrize("c", [8, 80], ids=["fewer channels than tokens", "more channels than tokens"])
def test_it_is_ridge_regression_by_plain_loops(c):
    token_map, x, merged = case(b=2, groups=90, c=c)
    module = nn.Sequential(nn.Linear(c, 16), nn.Tanh(), nn.Linear(16, 6)).double()
    y = module(merged)
    got = unmerge_linear(token_map, x, merged, y)
    for b in range(2):
        xc, yc = merged[b] - merged[b].mean(0), y[b] - y[b].mean(0)
        fitted = [m for m in range(90) if m % 3 < 2]
        judges = [m for m in range(90) if m % 3 == 2]
        best, least = torch.zeros(c, 6, dtype=torch.float64), yc[judges].square().sum()
        for ridge in linear.RIDGES:
            a = xc[fitted]
            size = a.square().sum() / c
            gram = a.T @ a + ridge * size * torch.eye(c, dtype=torch.float64)
            w = torch.linalg.inv(gram) @ a.T @ yc[fitted]
            missed = (yc[judges] - xc[judges] @ w).square().sum()
            if missed < least:
                best, least = w, missed
        assert best.abs().max() > 0
        for n in range(x.shape[1]):
            group = token_map.index[b, n]
            torch.testing.assert_close(got[b, n], y[b, group] + (x[b, n] - merged[b, group]) @ best)


def test_samples_that_a_fit_does_not_help_copy_to_the_bit():
    token_map, x, merged = case(b=6, dtype=torch.float32)
    y = torch.randn(6, 150, 6)  # what no map of the tokens predicts
    y[1] = nn.Linear(8, 6)(merged[1]).detach()
    merged, x = merged.clone(), x.clone()
    merged[2] = 3.0  # nothing to fit to
    merged[3, 5] = torch.nan
    y[4, 7] = torch.inf
    y[4, 8] = -torch.inf
    merged[5], x[5] = merged[5] * 1e25, x[5] * 1e25  # whose squares overflow
    got, copied = unmerge_linear(token_map, x, merged, y), token_map.unmerge(y)
    for b in (0, 2, 5):
        assert torch.equal(got[b], copied[b])
    assert not torch.equal(got[1], copied[1])
    where = token_map.index[3] != 5
    assert torch.equal(got[3][where], copied[3][where])
    assert torch.equal(got[4].isfinite(), copied[4].isfinite())


def test_few_groups_and_none_that_merge():
    for groups in (1, 2):
        token_map, x, merged = case(n=4, groups=groups)
        assert torch.equal(unmerge_linear(token_map, x, merged, merged), token_map.unmerge(merged))
    for groups in (3, 4, 5, 7):
        token_map, x, merged = case(n=12, groups=groups)
        assert unmerge_linear(token_map, x, merged, merged.sin()).isfinite().all()
    identity, x = TokenMap.identity(6), torch.randn(2, 6, 3)
    assert unmerge_linear(identity, x, x, x) is x


@pytest.mark.parametrize("groups", [20, 7], ids=["narrow", "wide"])
def test_gradients_of_both_orders(groups):
    token_map, x, _ = case(b=1, n=30, groups=groups, c=6)
    module = nn.Sequential(nn.Linear(6, 4), nn.Tanh()).double()

    def run(x):
        merged = token_map.merge(x)
        return unmerge_linear(token_map, x, merged, module(merged))

    x.requires_grad_()
    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)


def test_gradients_are_finite_where_there_is_nothing_to_fit():
    token_map, x, _ = case(dtype=torch.float32)
    x = torch.ones_like(x).requires_grad_()
    merged = token_map.merge(x)
    unmerge_linear(token_map, x, merged, merged * 2).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_fitted_in_float32(dtype):
    token_map, x, _ = case(dtype=torch.float32)
    module = nn.Linear(8, 5)
    half = 300 * x.to(dtype)  # whose squares overflow float16
    merged = token_map.merge(half)
    with torch.no_grad():
        y = module(merged.float() / 300).to(dtype)
        got, want = unmerge_linear(token_map, half, merged, y), module(x)
    assert got.dtype == dtype
    assert error(got.float(), want) < 0.02 < 0.05 < error(token_map.unmerge(y).float(), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(unmerge_linear(token_map, half, merged, y), got)


def test_it_compiles_to_one_graph():
    token_map, x, merged = case(dtype=torch.float32)
    y = merged.tanh()
    compiled = torch.compile(unmerge_linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(token_map, x, merged, y), unmerge_linear(token_map, x, merged, y))
    torch.compiler.reset()
