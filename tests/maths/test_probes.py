"""What fewer keys miss, learned from probes: against its formula in plain loops, and on attention itself."""

import pytest
import torch
import torch.nn.functional as F

from tomesd.maths import probes as module
from tomesd.maths.probes import RIDGE

N, C, E, P = 96, 6, 4, 24


def add_missed(y, x, chosen, exact):
    return module.add_missed(y, x, chosen, take(x, chosen), exact - take(y, chosen))


def tokens(b=2, dtype=torch.float64):
    return torch.randn(b, N, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype) + 1


def positions(b=1):
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(N, generator=generator)[:P] for _ in range(b)])


def take(x, chosen):
    return torch.stack([sample[row] for sample, row in zip(x, chosen.expand(len(x), -1), strict=True)])


def attend(x, keys):
    """One of attention's heads, which looks at few keys."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(C, E, generator=generator, dtype=torch.float64).to(x.dtype) / 2 for _ in range(3))
    return F.scaled_dot_product_attention(x @ q, keys @ k, keys @ v)


@pytest.mark.parametrize("b", [1, 2])
def test_it_is_normalised_kernel_regression_by_plain_loops(b):
    x, chosen = tokens(), positions(b)
    y, exact = torch.randn(2, N, E, dtype=torch.float64), torch.randn(2, P, E, dtype=torch.float64)
    got = add_missed(y, x, chosen, exact)
    for i in range(2):
        at = chosen[i % b]
        near = x[i, at]
        size = (near - near.mean(0)).square().sum(1).mean()
        kernel = torch.exp(-(x[i][:, None] - near).square().sum(2) / (2 * size))
        total = kernel.sum(1, keepdim=True)
        found = torch.linalg.inv(kernel[at] + RIDGE * torch.eye(P)) @ (total[at] * (exact[i] - y[i, at]))
        torch.testing.assert_close(got[i], y[i] + kernel / total @ found)


def test_it_brings_attention_to_few_keys_nearer():
    x, chosen = tokens(), positions(2)
    want, y = attend(x, x), attend(x, x[:, ::4])
    got = add_missed(y, x, chosen, take(want, chosen))
    assert (got - want).norm() < 0.5 * (y - want).norm()


def test_where_nothing_is_missed_nothing_is_added():
    x, chosen = tokens(), positions()
    y = attend(x, x)
    assert torch.equal(add_missed(y, x, chosen, take(y, chosen)), y)


def test_far_from_all_probes_what_is_added_stays_of_the_size_of_what_they_missed():
    x, chosen = tokens(1), positions()
    far = next(n for n in range(N) if n not in chosen)
    x[0, far] *= 1000
    y = attend(x, x[:, ::4])
    exact = take(attend(x, x), chosen)
    added = add_missed(y, x, chosen, exact) - y
    assert 0 < added[0, far].norm() < 10 * (exact - take(y, chosen)).norm(dim=2).max()


@pytest.mark.parametrize("x", [torch.ones(1, N, C), torch.zeros(1, N, C)], ids=["equal", "zero"])
def test_tokens_that_are_all_alike_are_given_their_mean(x):
    exact = torch.randn(1, P, E, generator=torch.Generator().manual_seed(0))
    got = add_missed(torch.zeros(1, N, E), x, positions(), exact)
    mean = exact.mean(1, keepdim=True).expand(-1, N, -1)
    torch.testing.assert_close(got, mean / (1 + RIDGE / P), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    x, chosen = tokens(), positions()
    want, y = attend(x, x), attend(x, x[:, ::4])
    whole = add_missed(y, x, chosen, take(want, chosen))
    got = add_missed(*(z.to(dtype) for z in (y, x)), chosen, take(want, chosen).to(dtype))
    assert got.dtype == dtype
    assert (got.double() - whole).norm() < 0.015 * whole.norm()
    inputs = [z.to(dtype).requires_grad_() for z in (y, x)]
    add_missed(*inputs, chosen, take(want, chosen).to(dtype)).sum().backward()
    assert all(z.grad.isfinite().all() for z in inputs)


def test_probes_that_are_nearly_equal_overflow_nothing():
    x, chosen = torch.zeros(1, N, C, dtype=torch.float16), positions()
    x[0, chosen[0, 0], 0] = 1e-4
    ones = torch.ones(1, N, E, dtype=torch.float16)
    assert add_missed(ones, x, chosen, 2 * ones[:, :P]).isfinite().all()


def test_a_sample_has_the_same_result_in_any_batch():
    x, chosen = tokens(), positions()
    y, exact = attend(x, x[:, ::4]), take(attend(x, x), chosen)
    both = add_missed(y, x, chosen, exact)
    torch.testing.assert_close(both[1:], add_missed(y[1:], x[1:], chosen, exact[1:]))


def test_gradients():
    x, chosen = tokens(1)[:, :, :3].contiguous(), positions()[:, :5]

    def run(x, y, exact):
        return add_missed(y, x, chosen, exact)

    y, exact = torch.randn(1, N, 2, dtype=torch.float64), torch.randn(1, 5, 2, dtype=torch.float64)
    inputs = [z.requires_grad_() for z in (x, y, exact)]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_a_device_that_cannot_solve_adds_nothing(monkeypatch):
    monkeypatch.setattr(module, "has_cholesky", lambda device: False)
    y = torch.randn(1, N, E)
    assert add_missed(y, torch.randn(1, N, C), positions(), torch.randn(1, P, E)) is y
