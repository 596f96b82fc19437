"""One step of a vision transformer is exact matching of alternate tokens, and what a map merges."""

import pytest
import torch

from tomesd.maths import alternating, devices
from tomesd.maths.alternating import merge_alternating
from tomesd.maths.grid import alternate
from tomesd.maths.matching import match_exact


def tokens(b, n=27, dtype=torch.float64):
    generator = torch.Generator().manual_seed(b)
    x = torch.randn(b, n, 8, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(1, 5, (b, n), generator=generator).float()


@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("edges", [(0, 0), (1, 0), (2, 3), (5, 1)], ids=str)
@pytest.mark.parametrize("mode", ["mean", "mlerp"])
@pytest.mark.parametrize("how", ["fast", "plain", "in chunks"])
def test_it_is_exact_matching_and_a_merge(b, edges, mode, how, monkeypatch):
    x, size = tokens(b)
    first, last = edges
    if how == "plain":
        monkeypatch.setattr(devices, "_tried", lambda operation, kind: False)
    if how == "in chunks":
        monkeypatch.setattr(alternating, "CHUNK", 30)
    step = merge_alternating(x, size, x[..., :5], 9, first, last, mode)
    want = match_exact(x[..., :5], alternate(27 - last, first), 9)
    assert torch.equal(step.map.index, want.index)
    assert torch.equal(step.map.keep, want.keep)
    assert torch.equal(step.map.rows, want.rows)
    assert torch.equal(step.map.keep_rows, want.keep_rows)
    torch.testing.assert_close(step.tokens, want.merge(x, mode, size))
    assert torch.equal(step.kept, want.merge(x, "drop"))
    assert torch.equal(step.size, want.merge(size, "sum"))


@pytest.mark.parametrize("mode", ["mean", "mlerp"])
def test_gradients_are_those_of_the_merge(mode):
    x, size = tokens(2)
    x.requires_grad_()

    def merged(x):
        return merge_alternating(x, size, x.detach(), 9, 1, mode=mode).tokens

    assert torch.autograd.gradcheck(merged, x)


def test_half_precision_is_summed_in_float32():
    """A group of many large tokens, whose sum float16 cannot hold."""
    x = torch.full((1, 41, 8), 6e4, dtype=torch.float16)
    for mode in ("mean", "mlerp"):
        step = merge_alternating(x, torch.full((1, 41), 7.0), x, 20, 1, mode=mode)
        assert step.map.sizes.max() > 10
        torch.testing.assert_close(step.tokens, x[:, :21])


def test_tokens_that_are_not_finite_or_nothing_keep_to_themselves():
    x, size = tokens(2)
    want = merge_alternating(x, size, x, 5, 1)
    for value in (float("nan"), float("inf")):
        broken = x.clone()
        broken[0, 4:6] = value
        step = merge_alternating(broken, size, broken, 5, 1)
        torch.testing.assert_close(step.tokens[1], want.tokens[1])
        given = step.map.unmerge(step.tokens)[0]
        assert torch.equal((~given.isfinite()).any(-1).nonzero()[:, 0], torch.tensor([4, 5]))
    zeros = torch.zeros_like(x)
    assert torch.equal(merge_alternating(zeros, size, zeros, 9, 1).tokens, zeros[:, :18])
    opposite = torch.cat([x[:, :1], -x[:, :1], x[:, :1]], 1)
    assert merge_alternating(opposite, torch.ones(2, 3), opposite, 1, 1).tokens.isfinite().all()
