"""Fewer tokens out of a vision tower."""

import pytest
import tiny_vit
import torch

import tomesd.vit as tome

X = torch.randn(2, 1 + 48, 24, generator=torch.Generator().manual_seed(0))
HOWS = ("merge", "sample", "random")
GRID = {"grid": (6, 8), "prefix": 1}


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(("keep", "left"), [(30, 30), (5, 5), (1, 1), (0.25, 12), (48, 48)])
def test_so_many_tokens_are_left_as_were_asked_for(how, keep, left):
    reduced = tome.reduce(X, keep, how=how, **GRID)
    assert reduced.tokens.shape == (2, 1 + left, 24)
    assert reduced.positions.shape == (2, left, 2)
    assert reduced.sizes.shape == (2, 1 + left)
    assert (reduced.sizes.sum(1) == 49).all()
    assert torch.equal(reduced.tokens[:, 0], X[:, 0])
    assert reduced.map.unmerge(reduced.tokens).shape == X.shape
    assert (reduced.map.keep.diff(dim=1) > 0).all()


def test_merged_tokens_and_positions_are_means_of_their_members():
    reduced = tome.reduce(X, 10, **GRID)
    index = reduced.map.index
    for sample, group in ((0, 3), (1, 7)):
        members = (index[sample] == group).nonzero().flatten()
        torch.testing.assert_close(reduced.tokens[sample, group], X[sample, members].mean(0))
        place = members - 1
        where = torch.stack([place // 8, place % 8], -1).float().mean(0)
        torch.testing.assert_close(reduced.positions[sample, group - 1], where)


@pytest.mark.parametrize("how", ["sample", "random"])
def test_others_are_tokens_as_they_were(how):
    reduced = tome.reduce(X, 12, how=how, **GRID)
    kept = reduced.map.keep.expand(2, -1)
    assert torch.equal(reduced.tokens, X.gather(1, kept[..., None].expand(-1, -1, 24)))
    place = kept[:, 1:] - 1
    assert torch.equal(reduced.positions, torch.stack([place // 8, place % 8], -1).float())
    assert not torch.equal(tome.reduce(X, 12, how=how, seed=1, **GRID).map.keep, reduced.map.keep)


def test_merging_is_nearer_than_dropping():
    smooth = X.cumsum(1)
    errors = {}
    for how in HOWS:
        reduced = tome.reduce(smooth, 12, how=how, **GRID)
        errors[how] = (reduced.map.unmerge(reduced.tokens) - smooth).norm().item()
    assert errors["merge"] == min(errors.values())


def test_merging_goes_on_from_what_a_patched_tower_has_left():
    model = tome.apply_patch(tiny_vit.CASES["timm ViT"].build(), trace_source=True)
    model.r = 8
    with torch.no_grad():
        features = model.forward_features(tiny_vit.images())
    source = tome.source(model)
    reduced = tome.reduce(features, 32, prefix=1, source=source)
    assert torch.equal(reduced.tokens, source.merge(features, "drop"))
    fewer = tome.reduce(features, 10, prefix=1, source=source)
    assert fewer.tokens.shape == (2, 11, 24)
    # Who is together in the tower stays together.
    assert torch.equal(fewer.map.index.gather(1, source.keep).gather(1, source.index), fewer.map.index)
    whole = fewer.map.merge(features)
    torch.testing.assert_close(fewer.tokens, whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="has left 33 tokens, fewer than the 41 to keep"):
        tome.reduce(features, 40, prefix=1, source=source)


@pytest.mark.parametrize("how", HOWS)
def test_no_pictures_are_reduced_to_none(how):
    reduced = tome.reduce(X[:0], 10, how=how, **GRID)
    assert reduced.tokens.shape == (0, 11, 24)
    assert reduced.positions.shape == (0, 10, 2)
    assert tome.keep(X[:0, 1:], 0.5, (6, 8), how=how).shape == (0, 48)


@pytest.mark.parametrize("rate", [1, -0.1, float("nan")])
def test_a_rate_is_a_share(rate):
    with pytest.raises(ValueError, match="rate must be from 0 to below 1, the share of tokens that goes"):
        tome.keep(X[:, 1:], rate, grid=(6, 8))


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("rate", [0, 0.1, 0.5, 0.99])
def test_a_mask_keeps_exactly_the_rest_of_a_rate(how, rate):
    mask = tome.keep(X[:, 1:], rate, grid=(6, 8), how=how)
    assert mask.dtype == torch.bool
    assert (mask.sum(1) == 48 - int(rate * 48)).all()
    assert torch.equal(tome.keep(X[1, 1:], rate, grid=(6, 8), how=how), mask[1])


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"features": "x"}, TypeError, "features must be a floating point tensor"),
        ({"features": X[0]}, TypeError, r"got torch.float32 \[49, 24\]"),
        ({"keep": 0}, ValueError, "keep must be from 1 to 48 patches, or a share below 1, got 0"),
        ({"keep": 49}, ValueError, "got 49"),
        ({"keep": 1.5}, ValueError, r"got 1\.5"),
        ({"keep": True}, TypeError, "keep must be"),
        ({"how": "best"}, ValueError, "how must be one of merge, sample, random"),
        ({"grid": None}, ValueError, r"48 patches are no 6 x 6: pass grid=\(rows, columns\)"),
        ({"grid": 8}, TypeError, r"grid must be \(rows, columns\), two integers above 0, got 8"),
        ({"grid": (-6, -8)}, TypeError, r"two integers above 0, got \(-6, -8\)"),
        ({"prefix": 49}, ValueError, "no patches to reduce: the features have no more"),
        ({"source": 3}, TypeError, "source must be a TokenMap"),
    ],
)
def test_errors_name_what_was_given(change, error, reason):
    given = {"features": X, "keep": 8, **GRID, **change}
    with pytest.raises(error, match=reason):
        tome.reduce(**given)


def test_llava_reads_so_many_tokens_as_its_prompt_has_places():
    import transformers as T

    config = T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**tiny_vit.CONFIG),
        text_config=T.LlamaConfig(
            vocab_size=40,
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=3,
        ),
        image_token_index=39,
    )
    model = tiny_vit.randomised(T.LlavaForConditionalGeneration(config))
    projector = model.model.multi_modal_projector
    projector.register_forward_pre_hook(lambda module, args: (tome.reduce(args[0], 16).tokens,))
    tome.apply_patch(model)
    model.r = 6
    ids = torch.tensor([[1] + 16 * [39] + [2, 3]]).expand(2, -1)
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=tiny_vit.images()).logits
    assert logits.shape == (2, 19, 40)
    assert logits.isfinite().all()
