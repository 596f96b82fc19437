"""What fewer keys miss: against sums in plain loops, and on attention that is nearly linear."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from tomesd import TokenMap
from tomesd.maths.moments import Layers, Missed, add_missed, missed_by_groups, missed_by_sample

HEADS, WIDTH, C, E, N, M = 2, 3, 5, 4, 48, 12


def layers(dtype=torch.float64, bias=False):
    generator = torch.Generator().manual_seed(0)

    def weights(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    inner = HEADS * WIDTH
    q_bias = weights(inner) if bias else None
    return Layers(
        weights(inner, C), q_bias, weights(inner, C), weights(inner, C), weights(E, inner), HEADS, 0.4
    )


def attention(x, keys, w, bias=None):
    q = x @ w.q.mT + (0 if w.q_bias is None else w.q_bias)
    heads = [z.unflatten(-1, (HEADS, -1)).transpose(1, 2) for z in (q, keys @ w.k.mT, keys @ w.v.mT)]
    out = F.scaled_dot_product_attention(*heads, attn_mask=bias, scale=w.scale)
    return out.transpose(1, 2).flatten(2) @ w.out.mT


def tokens(b=2):
    return torch.randn(b, N, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 1


def sample(b=1):
    """A random quarter of the tokens, other ones for each sample."""
    generator = torch.Generator().manual_seed(2)
    orders = torch.stack([torch.randperm(N, generator=generator) for _ in range(b)])
    return TokenMap.from_pairs(N, orders[:, M:], orders[:, :M].repeat(1, 3))


def covariance(a, b, weight=None):
    weight = torch.full((len(a),), 1 / len(a), dtype=a.dtype) if weight is None else weight
    return (weight[:, None] * (a - weight @ a)).T @ (b - weight @ b)


@pytest.mark.parametrize("b", [1, 2])
def test_what_a_sample_misses_is_differences_of_moments(b):
    x, chosen = tokens(), sample(b)
    kept = chosen.merge(x, "drop")
    missed = missed_by_sample(x, kept, chosen, 2)
    for i in range(2):
        torch.testing.assert_close(missed.mean[i, 0], x[i].mean(0) - kept[i].mean(0))
        torch.testing.assert_close(
            missed.covariance[i], covariance(x[i], x[i]) - covariance(kept[i], kept[i])
        )
        torch.testing.assert_close(missed.left[i], covariance(kept[i], kept[i]))
    assert missed_by_sample(x, kept, chosen, 1).covariance is None


def test_what_merged_keys_miss_is_the_spread_inside_of_groups():
    x, token_map = tokens(), sample(2)
    merged = token_map.merge(x)
    missed = missed_by_groups(x, merged, token_map)
    assert missed.mean is None
    for i in range(2):
        left = covariance(merged[i], merged[i], token_map.sizes[i].double() / N)
        torch.testing.assert_close(missed.left[i], left)
        torch.testing.assert_close(missed.covariance[i], covariance(x[i], x[i]) - left)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias of queries"])
def test_attention_that_is_nearly_linear_is_made_whole(bias):
    """The smaller the queries, the nearer attention is to its first order: errors fall as their squares."""
    x, chosen, token_map = tokens(), sample(), sample(2)
    sizes = token_map.sizes.double().log()[:, None, None]
    errors = []
    for scale in (1e-1, 1e-2, 1e-3):
        w = layers(bias=bias)._replace(scale=scale)
        want = attention(x, x, w)
        kept, merged = chosen.merge(x, "drop"), token_map.merge(x)
        sampled = attention(x, kept, w)
        grouped = attention(x, merged, w, sizes)
        errors.append(
            [
                (sampled - want).norm(),
                (add_missed(sampled, x, missed_by_sample(x, kept, chosen, 1), w) - want).norm(),
                (add_missed(sampled, x, missed_by_sample(x, kept, chosen, 2), w) - want).norm(),
                (grouped - want).norm(),
                (add_missed(grouped, x, missed_by_groups(x, merged, token_map), w) - want).norm(),
            ]
        )
    for large, small in pairwise(errors):
        falls = [float(a / b) for a, b in zip(large, small, strict=True)]
        assert falls[0] < 2  # the mean of values stays wrong
        assert falls[1] == pytest.approx(10, rel=0.5)
        assert falls[2] == pytest.approx(100, rel=0.8)
        assert falls[3] == pytest.approx(10, rel=0.5)
        assert falls[4] == pytest.approx(100, rel=0.8)


def test_the_map_is_damped_where_attention_gave_less():
    """Of an output that ignores queries nothing is to be expected; more than all is never added."""
    x, chosen, w = tokens(), sample(), layers()
    kept = chosen.merge(x, "drop")
    missed = missed_by_sample(x, kept, chosen, 2)
    for y in (torch.ones(2, N, E, dtype=torch.float64), -attention(x, kept, w)):
        torch.testing.assert_close(add_missed(y, x, missed, w), add_missed(y, x, Missed(missed.mean), w))
    y = torch.zeros(2, N, E, dtype=torch.float64)
    linear = attention(x, kept, w._replace(scale=1e-9)) * 1e9
    linear = linear - linear.mean(1, keepdim=True)
    whole = add_missed(w.scale * linear, x, missed, w)
    torch.testing.assert_close(add_missed(5 * w.scale * linear, x, missed, w) - 4 * w.scale * linear, whole)
    half = add_missed(0.5 * w.scale * linear, x, missed, w) - 0.5 * w.scale * linear
    rest = add_missed(y, x, Missed(missed.mean), w)
    torch.testing.assert_close(2 * (half - rest), whole - w.scale * linear - rest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    x, chosen, w = tokens(), sample(), layers()
    kept = chosen.merge(x, "drop")
    want = add_missed(attention(x, kept, w), x, missed_by_sample(x, kept, chosen, 2), w)
    w = Layers(*(z.to(dtype) if isinstance(z, torch.Tensor) else z for z in w))
    x, kept = x.to(dtype), kept.to(dtype)
    got = add_missed(attention(x, kept, w), x, missed_by_sample(x, kept, chosen, 2), w)
    assert got.dtype == dtype
    assert (got.double() - want).norm() < 0.02 * want.norm()


def test_gradients():
    x, chosen, w = tokens(1), sample(), layers()

    def run(x):
        kept = chosen.merge(x, "drop")
        return add_missed(attention(x, kept, w), x, missed_by_sample(x, kept, chosen, 2), w)

    assert torch.autograd.gradcheck(run, x[:, :N].requires_grad_())
