"""TokenMap against plain loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tomesd import TokenMap


@st.composite
def maps(draw):
    b, n = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    r = draw(st.integers(0, n - 1))
    seed = draw(st.integers(0, 999))
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(b, n, generator=generator).argsort(1)
    src, stay = order[:, :r], order[:, r:]
    dst = stay.gather(1, torch.randint(n - r, (b, r), generator=generator))
    return TokenMap.from_pairs(n, src, dst), src, dst, generator


def loop(token_map, x, reduce):
    """Reduces each group with a function of its tokens `[k, ...]` and their positions."""
    b, m = token_map.index.shape[0], token_map.groups
    rows = [[torch.nonzero(token_map.index[i] == g)[:, 0] for g in range(m)] for i in range(b)]
    return torch.stack([torch.stack([reduce(x[i][at], at) for at in rows[i]]) for i in range(b)])


@settings(max_examples=60, deadline=None)
@given(maps())
def test_from_pairs_sends_each_src_to_its_dst_and_keeps_the_order(drawn):
    token_map, src, dst, _ = drawn
    for b in range(src.shape[0]):
        left = [n for n in range(token_map.tokens) if n not in src[b].tolist()]
        assert token_map.keep[b].tolist() == left
        goes = {**{n: n for n in left}, **dict(zip(src[b].tolist(), dst[b].tolist(), strict=True))}
        assert token_map.index[b].tolist() == [left.index(goes[n]) for n in range(token_map.tokens)]


@settings(max_examples=60, deadline=None)
@given(maps(), st.sampled_from([(), (3,), (2, 2)]))
def test_every_mode_reduces_each_group(drawn, shape):
    token_map, _, _, generator = drawn
    x = torch.randn(*token_map.index.shape, *shape, generator=generator, dtype=torch.float64)
    size = torch.rand(*token_map.index.shape, generator=generator, dtype=torch.float64) + 0.1
    weigh = lambda v, w: (w.view(-1, *[1] * len(shape)) * v).sum(0) / w.sum()  # noqa: E731

    def mlerp(v, at):
        mean, longest = v.mean(0), v.flatten(1).norm(dim=1).max() if shape else v.abs().max()
        return mean / mean.norm() * longest

    want = {
        "mean": lambda v, at: v.mean(0),
        "sum": lambda v, at: v.sum(0),
        "amax": lambda v, at: v.amax(0),
        "mlerp": mlerp,
    }
    for mode, reduce in want.items():
        torch.testing.assert_close(token_map.merge(x, mode), loop(token_map, x, reduce), atol=1e-6, rtol=1e-5)
    drop = torch.stack([x[b, token_map.keep[b]] for b in range(x.shape[0])])
    assert torch.equal(token_map.merge(x, "drop"), drop)
    weighted = torch.stack(
        [
            torch.stack(
                [
                    weigh(x[b][token_map.index[b] == g], size[b][token_map.index[b] == g])
                    for g in range(token_map.groups)
                ]
            )
            for b in range(x.shape[0])
        ]
    )
    torch.testing.assert_close(token_map.merge(x, "mean", size=size), weighted)


@settings(max_examples=40, deadline=None)
@given(maps())
def test_merge_undoes_unmerge_and_keeps_the_weighted_mean(drawn):
    token_map, _, _, generator = drawn
    y = torch.randn(token_map.index.shape[0], token_map.groups, 3, generator=generator)
    for mode in ("mean", "amax", "mlerp", "drop"):
        torch.testing.assert_close(token_map.merge(token_map.unmerge(y), mode), y)
    x = torch.randn(*token_map.index.shape, 3, generator=generator)
    merged = token_map.merge(x)
    torch.testing.assert_close((merged * token_map.sizes[..., None]).sum(1), x.sum(1), atol=1e-5, rtol=1e-5)
    for b, row in enumerate(token_map.index):
        assert torch.equal(token_map.unmerge(merged)[b], merged[b][row])
    source = token_map.source_matrix()
    torch.testing.assert_close(source @ x, token_map.merge(x, "sum"), atol=1e-5, rtol=1e-5)
    assert torch.equal(source.sum(2).long(), token_map.sizes)


@settings(max_examples=40, deadline=None)
@given(maps(), st.integers(0, 99))
def test_composition_is_the_two_steps(drawn, seed):
    first, _, _, generator = drawn
    b, m = first.index.shape[0], first.groups
    r = seed % m
    order = torch.rand(b, m, generator=generator).argsort(1)
    second = TokenMap.from_pairs(m, order[:, :r], order[:, r:].gather(1, torch.zeros(b, r).long()))
    both = first.compose(second)
    x = torch.randn(b, first.tokens, 2, generator=generator)
    for mode in ("sum", "amax", "drop"):
        torch.testing.assert_close(both.merge(x, mode), second.merge(first.merge(x, mode), mode))
    mean = second.merge(first.merge(x), size=first.sizes)
    torch.testing.assert_close(both.merge(x), mean)
    y = torch.randn(b, second.groups, 2, generator=generator)
    assert torch.equal(both.unmerge(y), first.unmerge(second.unmerge(y)))


INDEX = torch.tensor([[0, 1, 0, 2, 1], [0, 0, 0, 1, 2]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_dtypes_stay(dtype):
    token_map = TokenMap.from_index(INDEX, 3)
    x = torch.randn(2, 5, 4).to(dtype)
    for mode in ("mean", "sum", "amax", "mlerp", "drop"):
        merged = token_map.merge(x, mode)
        assert merged.dtype == dtype
        torch.testing.assert_close(merged.double(), token_map.merge(x.double(), mode), atol=2e-2, rtol=2e-2)


def test_integers_round_down_and_booleans_ask_for_any():
    token_map = TokenMap.from_index(INDEX[:1], 3)
    x = torch.tensor([[1, -1, 4, 7, -4]])
    assert token_map.merge(x).tolist() == [[2, -3, 7]]
    assert token_map.merge(x, "sum").tolist() == [[5, -5, 7]]
    assert token_map.merge(x, "amax").tolist() == [[4, -1, 7]]
    assert token_map.merge(x, "drop").tolist() == [[1, -1, 7]]
    small = TokenMap.from_index(torch.zeros(1, 8, dtype=torch.int64), 1)
    for dtype, value in ((torch.uint8, 200), (torch.int8, -100)):
        assert small.merge(torch.full((1, 8), value, dtype=dtype)).tolist() == [[value]]
    flags = torch.tensor([[True, False, False, False, False]])
    for mode in ("mean", "sum", "amax", "drop"):
        assert token_map.merge(flags, mode).tolist() == [[True, False, False]]
    assert token_map.unmerge(torch.tensor([[True, False, False]])).tolist() == [
        [True, False, True, False, False]
    ]


def test_one_row_serves_any_batch():
    one = TokenMap.from_index(INDEX[:1], 3)
    each = TokenMap.from_index(INDEX[:1].repeat(4, 1), 3)
    x = torch.randn(4, 5, 2)
    for mode in ("mean", "sum", "amax", "mlerp", "drop"):
        assert torch.equal(one.merge(x, mode), each.merge(x, mode))
    assert torch.equal(one.unmerge(x[:, :3]), each.unmerge(x[:, :3]))


def test_a_mean_of_zero_stays_zero_under_mlerp():
    token_map = TokenMap.from_index(torch.tensor([[0, 0]]), 1)
    assert token_map.merge(torch.tensor([[[1.0, -2.0], [-1.0, 2.0]]]), "mlerp").tolist() == [[[0.0, 0.0]]]


def test_gradients():
    token_map = TokenMap.from_index(INDEX, 3)
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    size = torch.rand(2, 5, dtype=torch.float64) + 0.5
    for mode in ("mean", "sum", "amax", "drop"):
        assert torch.autograd.gradcheck(lambda v, mode=mode: token_map.merge(v, mode), x)
    assert torch.autograd.gradcheck(lambda v: token_map.merge(v, size=size), x)
    assert torch.autograd.gradcheck(lambda v: token_map.unmerge(token_map.merge(v)), x)
    assert torch.autograd.gradgradcheck(lambda v: token_map.merge(v, size=size).square(), x)
    assert torch.autograd.gradcheck(lambda v: token_map.merge(x.detach(), size=v), size.requires_grad_())
    size = size.detach()
    token_map.merge(x, "mlerp").sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_equal_tokens_merge_into_themselves_in_half_precision(dtype):
    """Exactly so for groups of up to 4, as those of 2 x 2 cells mostly are."""
    token_map = TokenMap.from_index(torch.tensor([[0, 1, 1, 2, 2, 2, 3, 3, 3, 3]]), 4)
    y = torch.randn(1, 4, 64).to(dtype)
    for mode in ("mean", "amax", "drop"):
        assert torch.equal(token_map.merge(token_map.unmerge(y), mode), y)


def test_empty_batches_and_channels():
    token_map = TokenMap.from_index(INDEX[:1], 3)
    for mode in ("mean", "sum", "amax", "mlerp", "drop"):
        assert token_map.merge(torch.zeros(0, 5, 2), mode).shape == (0, 3, 2)
        assert token_map.merge(torch.zeros(2, 5, 0), mode).shape == (2, 3, 0)


def test_identity_returns_its_input():
    x = torch.randn(2, 5, 3)
    identity = TokenMap.identity(5)
    assert identity.merge(x) is x
    assert identity.merge(x, "sum") is x
    assert identity.unmerge(x) is x


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda m: m.merge(torch.zeros(2, 4, 3)), r"merge needs .*\[2, 5, \.\.\.\], got \[2, 4, 3\]"),
        (lambda m: m.merge(torch.zeros(3, 5, 3)), r"got \[3, 5, 3\]"),
        (lambda m: m.unmerge(torch.zeros(2, 5, 3)), r"unmerge needs .*\[2, 3, \.\.\.\]"),
        (lambda m: m.merge(torch.zeros(2, 5), "median"), "mean, sum, amax, mlerp, drop, got 'median'"),
        (lambda m: m.merge(torch.zeros(2, 5), "sum", size=torch.ones(2, 5)), "mean and mlerp only"),
        (lambda m: m.merge(torch.zeros(2, 5), size=torch.ones(2, 5, 1)), r"\[2, 5\] as the tokens"),
        (lambda m: m.merge(torch.zeros(2, 5).long(), "mlerp"), "floating point"),
        (lambda m: m.compose(TokenMap.identity(4)), "4 tokens cannot follow one that leaves 3"),
        (lambda m: m.compose(TokenMap.from_index(torch.zeros(3, 3).long(), 1)), "2 and 3 samples"),
        (lambda m: TokenMap.from_index(INDEX.int(), 3), "int64"),
        (lambda m: TokenMap.from_index(INDEX, 2), r"\[0, 2\), got 0\.\.2"),
        (lambda m: TokenMap.from_index(INDEX, 4), "some have none"),
    ],
)
def test_mistakes_are_named(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong(TokenMap.from_index(INDEX, 3))


def test_it_prints_what_it_does():
    index = torch.tensor([[0, 1, 1], [0, 0, 1]])
    assert repr(TokenMap.from_index(index, 2)) == "TokenMap(3 -> 2 tokens, 2 samples)"


def test_it_can_be_cut_to_some_samples():
    index = torch.tensor([[0, 1, 1], [0, 0, 1]])
    one = TokenMap.from_index(index, 2)[1:]
    assert torch.equal(one.index, index[1:])
    assert one.groups == 2
    with pytest.raises(TypeError, match="indexed by a slice of its samples, got 0"):
        TokenMap.from_index(index, 2)[0]


@settings(max_examples=30, deadline=None)
@given(maps())
def test_attention_comes_back_as_of_groups_that_share_evenly(drawn):
    token_map, *_, generator = drawn
    b, n, m = token_map.index.shape[0], token_map.tokens, token_map.groups
    weights = torch.rand(b, 2, m, m, generator=generator).softmax(-1)
    got = token_map.unmerge_attention(weights)
    assert got.shape == (b, 2, n, n)
    assert torch.equal(token_map.unmerge_attention(weights[:, 0]), got[:, 0])
    with pytest.raises(ValueError, match=rf"weights must be \[B, heads, {m}, {m}\] or"):
        token_map.unmerge_attention(weights[..., :-1])
    for sample in range(b):
        group, sizes = token_map.index[sample].tolist(), token_map.sizes[sample].tolist()
        for i in range(n):
            for j in range(n):
                want = weights[sample, :, group[i], group[j]] / sizes[group[j]]
                torch.testing.assert_close(got[sample, :, i, j], want)
