"""TokenMerger: merging by keys, layer by layer, in packed sequences."""

import pytest
import torch
import torch.nn.functional as F

from tomesd import TokenMap, TokenMerger


def test_the_example():
    x = torch.randn(1, 16, 2)
    first = TokenMerger(x, 4)
    y = first(x)
    assert y.shape == (1, 12, 2)
    second = TokenMerger(y, 4, adm=first.adm)
    z = second(y)
    assert z.shape == (1, 8, 2)
    assert second.unmerge(z).shape == (1, 16, 2)
    assert second.adm.shape == (1, 8, 16)


def test_the_most_similar_pairs_merge():
    keys = torch.randn(3, 11, 5)
    merger = TokenMerger(keys, 3)
    for b in range(3):
        cosines = {
            i: max((F.cosine_similarity(keys[b, i], keys[b, j], dim=0).item(), j) for j in range(1, 11, 2))
            for i in range(0, 11, 2)
        }
        leaving = sorted(cosines, key=lambda i: -cosines[i][0])[:3]
        joined = merger.unmerge(merger.merge(torch.arange(11).expand(3, -1), "drop"))[b]
        for i in range(11):
            assert joined[i] == (cosines[i][1] if i in leaving else i)


def test_layers_chained_in_any_way_are_one():
    x = torch.randn(2, 20, 3)
    first = TokenMerger(x, 5)
    y = first(x)
    ways = [
        first.chain(y, 4),
        TokenMerger(y, 4, adm=first.adm),
        TokenMerger(y, 4, adm=first.adm.bool()),
        TokenMerger(y, 4, adm=first.total),
    ]
    z = ways[0](y)
    for merger in ways:
        assert torch.equal(merger(y), z)
        assert torch.equal(merger.adm, ways[0].adm)
        assert torch.equal(merger.unmerge(z), first.unmerge(ways[0].map.unmerge(z)))
        assert torch.equal(merger.unmerge_all(z), merger.unmerge(z))
    assert first.chain(y).r == 5
    dense = ways[0].adm / ways[0].adm.sum(-1, keepdim=True)
    torch.testing.assert_close(ways[0].merge_all(x), dense @ x)
    assert torch.equal(ways[0].sizes, ways[0].adm.sum(-1).long())


@pytest.mark.parametrize("mode", ["mean", "sum", "amax", "mlerp", "drop"])
def test_modes_and_shapes(mode):
    merger = TokenMerger(torch.randn(2, 9, 4), 4)
    for shape in ((2, 9), (2, 9, 3), (2, 9, 3, 5)):
        y = merger(torch.randn(shape), mode)
        assert y.shape == (2, 5, *shape[2:])
        assert merger.unmerge(y).shape == shape


def test_sequences_and_padding_keep_to_themselves():
    ids = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, 1, -100, -100, -100, -100], [3] * 9 + [7] * 5])
    keys = torch.ones(2, 14, 4) + 1e-3 * torch.randn(2, 14, 4)  # all alike: only ids hold them apart
    merger = TokenMerger(keys, 5, sequence_ids=ids)
    assert merger.merged_ids.shape == (2, 9)
    assert torch.equal(merger.unmerge(merger.merged_ids), ids)
    assert (merger.merged_ids[0] == -100).sum() == 2  # every padding token that may leave left first
    following = merger.chain(merger(keys), 3)
    assert torch.equal(following.unmerge(following.merged_ids), ids)
    assert following.mask_id == -100
    other = TokenMerger(keys, 5, sequence_ids=ids + 100, mask_id=0)
    assert torch.equal(other.merged_ids, merger.merged_ids + 100)


def test_long_sequences_are_compared_in_chunks_alike(monkeypatch):
    from tomesd.maths import matching

    keys, ids = torch.randn(2, 40, 4), torch.arange(40).div(10, rounding_mode="floor").expand(2, -1)
    want = TokenMerger(keys, 12, sequence_ids=ids).total.index
    monkeypatch.setattr(matching, "CHUNK", 100)
    assert torch.equal(TokenMerger(keys, 12, sequence_ids=ids).total.index, want)


def test_too_few_tokens_of_a_sequence_is_an_error_not_a_merge_across():
    keys = torch.randn(1, 8, 4)
    with pytest.raises(ValueError, match="r is 2, but in one sample only 1 tokens have one to join"):
        TokenMerger(keys, 2, sequence_ids=torch.tensor([[0, 0, 1, 2, 3, 4, 5, 6]]))
    assert TokenMerger(keys, 1, sequence_ids=torch.tensor([[0, 0, 1, 2, 3, 4, 5, 6]])).total.groups == 7


def test_gradients_flow_to_tokens_and_r_0_changes_nothing():
    x = torch.randn(2, 8, 4, requires_grad=True)
    merger = TokenMerger(x, 3)
    merger.unmerge(merger(x)).square().sum().backward()
    assert x.grad.isfinite().all()
    nothing = TokenMerger(x, 0)
    assert nothing(x) is x
    assert nothing.unmerge(x) is x
    assert nothing.sizes.shape == (2, 8)
    assert TokenMerger(x, 2, adm=nothing.adm).adm.shape == (2, 6, 8)


def test_compiles_to_one_graph():
    def layer(x, keys):
        merger = TokenMerger(keys, 4)
        following = merger.chain(merger(keys), 2)
        return following.unmerge(torch.relu(following(merger(x))))

    x, keys = torch.randn(2, 16, 8), torch.randn(2, 16, 4)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, keys), layer(x, keys))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (dict(keys=torch.ones(2, 8)), ValueError, r"keys must be \[B, S, C\], got \[2, 8\]"),
        (dict(keys=torch.ones(2, 8, 4).long()), TypeError, "floating point tensor, got torch.int64"),
        (dict(keys=[1.0]), TypeError, "floating point tensor, got list"),
        (dict(r=5), ValueError, "r must be from 0 to 4, half of the 8 tokens, got 5"),
        (dict(r=-1), ValueError, "got -1"),
        (dict(r=1.0), TypeError, "r must be an integer, got 1.0"),
        (dict(adm=torch.ones(2, 7, 9)), ValueError, r"adm must be \[2, 8, N\] as keys, got \[2, 7, 9\]"),
        (dict(adm=torch.ones(2, 8, 9)), ValueError, "exactly one non-zero entry in each column"),
        (dict(adm=TokenMap.identity(9)), ValueError, r"keys must be of the \[1, 9\] tokens that are left"),
        (dict(adm="a"), TypeError, "a tensor or a TokenMap, got str"),
        (dict(sequence_ids=torch.ones(2, 7).long()), ValueError, r"sequence_ids must be \[2, 8\] as keys"),
        (dict(sequence_ids=[0] * 8), TypeError, "sequence_ids must be a tensor, got list"),
        (dict(mask_id="a"), TypeError, "mask_id must be an integer, got 'a'"),
        (dict(sequence_ids=torch.ones(2, 8)), TypeError, "sequence_ids must be integers, got torch.float32"),
    ],
)
def test_errors_name_what_was_given(kwargs, error, message):
    with pytest.raises(error, match=message):
        TokenMerger(**{**dict(keys=torch.ones(2, 8, 4), r=2), **kwargs})


def test_tokens_of_another_shape_are_an_error():
    merger = TokenMerger(torch.randn(2, 8, 4), 2)
    with pytest.raises(ValueError, match=r"merge needs a tensor of shape \[2, 8, ...\], got \[2, 7, 4\]"):
        merger(torch.randn(2, 7, 4))
    with pytest.raises(ValueError, match=r"unmerge needs a tensor of shape \[2, 6, ...\], got \[2, 8, 4\]"):
        merger.unmerge(torch.randn(2, 8, 4))
