"""The functional API, as users of the older packages call it."""

import pytest
import tiny
import torch

from tomesd import merge as M


def test_bipartite_soft_matching_protects_and_cuts_r():
    x = torch.randn(2, 9, 4)
    for protected in range(3):
        merge, unmerge = M.bipartite_soft_matching(x, 99, protected > 0, protected > 1)
        y = merge(x)
        assert y.shape == (2, 9 - (9 - protected) // 2, 4)
        assert torch.equal(y[:, :protected], x[:, :protected])
        assert torch.equal(unmerge(y)[:, :protected], x[:, :protected])


def test_merges_the_most_similar_pairs():
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [-1.0, 0.0], [-3.0, 0.1], [0.0, -1.0]]])
    merge, unmerge = M.bipartite_soft_matching(x, 2)  # even tokens into odd ones: 2 -> 1 and 4 -> 3
    torch.testing.assert_close(merge(x)[0, :3], torch.tensor([[1.0, 0.0], [0.05, 1.0], [-2.0, 0.05]]))
    assert unmerge(merge(x))[0, 4].tolist() == unmerge(merge(x))[0, 3].tolist()


@pytest.mark.parametrize(("n", "k", "left"), [(12, 2, 6), (13, 3, 4), (5, 9, 1), (4, 1, 4), (4, 0, 4)])
def test_kth(n, k, left):
    x = torch.randn(2, n, 4)
    merge, unmerge = M.kth_bipartite_soft_matching(x, k)
    assert merge(x).shape == (2, left, 4)
    torch.testing.assert_close(merge(x, mode="sum").sum(1), x.sum(1))
    assert unmerge(merge(x)).shape == x.shape


def test_random():
    x = torch.randn(2, 20, 4)
    merge, _ = M.random_bipartite_soft_matching(x, 8)
    again, _ = M.random_bipartite_soft_matching(x, 8)
    assert torch.equal(merge(x), again(x))
    assert merge(x).shape == (2, 12, 4)
    state = torch.get_rng_state()
    drawn, _ = M.random_bipartite_soft_matching(x, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(drawn(x), merge(x))
    assert M.random_bipartite_soft_matching(x, 99)[0](x).shape == (2, 1, 4)


def test_wavg_and_source_through_two_layers():
    x = torch.randn(2, 12, 4)
    first, _ = M.bipartite_soft_matching(x, 4)
    y, size = M.merge_wavg(first, x)
    source = M.merge_source(first, x)
    second, _ = M.bipartite_soft_matching(y, 3)
    z, size = M.merge_wavg(second, y, size)
    source = M.merge_source(second, y, source)
    assert torch.equal(source.sum(1), torch.ones(2, 12))
    assert torch.equal(source.sum(2, keepdim=True), size)
    torch.testing.assert_close(z, source @ x / size)


def test_wavg_does_not_overflow_in_half_precision():
    x = torch.full((1, 4096, 2), 30.0, dtype=torch.float16)
    merge, _ = M.kth_bipartite_soft_matching(x, 4096)
    assert torch.equal(M.merge_wavg(merge, x)[0], x[:, :1])


def test_random2d_without_a_generator_is_repeatable_and_r_0_does_nothing():
    x = torch.randn(2, 30, 4)
    state = torch.get_rng_state()
    (merge, unmerge), (again, _) = (M.bipartite_soft_matching_random2d(x, 6, 5, 2, 2, 9) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(merge(x), again(x))
    assert unmerge(merge(x)).shape == x.shape
    merge, unmerge = M.bipartite_soft_matching_random2d(x, 6, 5, 2, 2, 0)
    assert merge(x) is x
    assert unmerge(x) is x
    assert M.bipartite_soft_matching(x, -3)[0](x) is x
    one = torch.randn(1, 1, 4)
    assert M.bipartite_soft_matching_random2d(one, 1, 1, 2, 2, 5)[0](one) is one


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (
            lambda x: M.bipartite_soft_matching_random2d(x, 4, 4, 2, 2, 1),
            ValueError,
            r"30 tokens, but w \* h = 4 \* 4",
        ),
        (lambda x: M.bipartite_soft_matching_random2d(x, 6, 5, 0, 2, 1), ValueError, "sx=0"),
        (
            lambda x: M.bipartite_soft_matching(x[0], 1),
            ValueError,
            r"metric must be \[B, N, C\], got \[30, 4\]",
        ),
        (
            lambda x: M.bipartite_soft_matching(x.long(), 1),
            TypeError,
            "floating point tensor, got torch.int64",
        ),
        (lambda x: M.kth_bipartite_soft_matching([1], 1), TypeError, "got list"),
        (lambda x: M.bipartite_soft_matching(x, 4)[0](x[:, :7]), ValueError, r"got \[2, 7, 4\]"),
    ],
)
def test_mistakes_are_named(call, error, says):
    with pytest.raises(error, match=says):
        call(torch.randn(2, 30, 4))


def test_the_names_of_tomesd_0_1_3_are_there_and_do_the_same():
    from tomesd.patch import compute_merge
    from tomesd.utils import init_generator, isinstance_str

    old = tiny.peer("tomesd", "tomesd_0_1_3")
    args = dict(max_downsample=2, ratio=0.4, sx=2, sy=2, use_rand=False, generator=None)
    args |= dict(merge_attn=True, merge_crossattn=False, merge_mlp=True)
    for h, w in ((8, 12), (4, 6), (2, 3)):
        x = torch.randn(2, h * w, 5)
        infos = [{"size": (8, 12), "args": dict(args)} for _ in range(2)]
        ours, theirs = compute_merge(x, infos[0]), old.patch.compute_merge(x, infos[1])
        for i in range(3):
            assert ours[i](x).shape == theirs[i](x).shape
            torch.testing.assert_close(ours[i + 3](ours[i](x)), theirs[i + 3](theirs[i](x)))
    assert compute_merge(x, {"size": (2, 3), "args": {"ratio": 0.5}})[0](x).shape[1] == 3
    for info in (
        None,
        {},
        {"size": (2, 3)},
        {"args": {}},
        {"size": 6, "args": {}},
        {"size": "ab", "args": {}},
    ):
        with pytest.raises(TypeError, match=r"tome_info must be .*\"size\": \(height, width\)"):
            compute_merge(x, info)
    assert M.do_nothing(x, mode="mean") is x
    assert isinstance_str(torch.nn.Linear(1, 1), "Module")
    assert not isinstance_str(x, "Module")
    state = torch.get_rng_state()
    drawn = torch.rand(3, generator=init_generator(x.device))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(drawn, torch.rand(3))
