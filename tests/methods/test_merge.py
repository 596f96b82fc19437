"""Merge: tomesd's own method, and agreement with tomesd 0.1.3."""

import pytest
import tiny
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

import tomesd
from tomesd import TokenMap

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("case", ["sd", "ldm"])
@pytest.mark.parametrize(
    ("max_downsample", "theirs", "options"),
    [
        (1, {}, {}),
        (8, {"ratio": 0.75}, {"ratio": 0.75}),
        (
            2,
            {"ratio": 0.6, "merge_crossattn": True, "merge_mlp": True},
            {"ratio": 0.6, "parts": ("attn", "cross", "mlp")},
        ),
        (4, {"ratio": 0.7, "sx": 4, "sy": 2}, {"ratio": 0.7, "sx": 4, "sy": 2}),
        (1, {"ratio": 0.3, "merge_attn": False, "merge_mlp": True}, {"ratio": 0.3, "parts": ("mlp",)}),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(16, 16), (24, 16)])
def test_equals_tomesd_0_1_3(case, max_downsample, theirs, options, size):
    old = tiny.peer("tomesd", "tomesd_0_1_3")
    case = tiny.CASES[case]
    model = case.build()
    plain = case(model, *size)
    old.apply_patch(model, use_rand=False, max_downsample=max_downsample, **theirs)
    want = case(model, *size)
    old.remove_patch(model)
    method = tomesd.Merge(matching="exact", seed=None, prop_attn=False, unmerge="copy", **options)
    tomesd.apply_patch(model, method, max_downsample)
    ours = case(model, *size)
    assert (want - plain).abs().max() > 1e-3
    torch.testing.assert_close(ours, want, atol=1e-5, rtol=1e-5)


def test_functional_api_equals_tomesd_0_1_3_but_for_the_order_of_tokens():
    old = tiny.peer("tomesd", "tomesd_0_1_3")
    metric, x = torch.randn(2, 7 * 9, 8), torch.randn(2, 7 * 9, 3)
    for r in (0, 10, 40, 1000):
        ours = tomesd.merge.bipartite_soft_matching_random2d(metric, 9, 7, 2, 3, r, no_rand=True)
        theirs = old.merge.bipartite_soft_matching_random2d(metric, 9, 7, 2, 3, r, no_rand=True)
        assert ours[0](x).shape == theirs[0](x).shape
        torch.testing.assert_close(ours[1](ours[0](x)), theirs[1](theirs[0](x)))
    drawn = [torch.Generator().manual_seed(5) for _ in range(2)]
    ours = tomesd.merge.bipartite_soft_matching_random2d(metric, 9, 7, 2, 2, 20, generator=drawn[0])
    theirs = old.merge.bipartite_soft_matching_random2d(metric, 9, 7, 2, 2, 20, generator=drawn[1])
    torch.testing.assert_close(ours[1](ours[0](x)), theirs[1](theirs[0](x)))
    assert torch.equal(drawn[0].get_state(), drawn[1].get_state())


def test_proportional_attention_is_exact_where_equal_tokens_merge(monkeypatch):
    torch.manual_seed(0)
    unet = tiny.small_unet()
    container = unet.down_blocks[0].attentions[0]
    index = torch.randint(16, (1, 64))  # groups of very different sizes
    image = torch.randn(2, 16, 16)[:, :, index[0]].unflatten(2, (8, 8))
    text = torch.randn(2, 7, tiny.TEXT)
    plain = container(image, text).sample
    for method in (
        tomesd.Merge(),
        tomesd.Merge(unmerge="copy"),
        tomesd.MergeStage(),
        tomesd.Merge(prop_attn=False),
        tomesd.Merge(prop_attn=False, unmerge="copy"),
        tomesd.MergeStage(prop_attn=False),
    ):
        monkeypatch.setattr(type(method), "plan", lambda self, x, image: TokenMap.from_index(index, 16))
        tomesd.apply_patch(unet, method)
        error = (container(image, text).sample - plain).abs().max()
        assert error > 1e-3 if method.prop_attn is False else error < 1e-5


def test_attention_that_takes_no_bias_is_refused():
    model = tiny.ldm()
    with pytest.raises(ValueError, match=r"of model\.diffusion_model takes no bias, which prop_attn"):
        tomesd.apply_patch(model, tomesd.Merge(prop_attn=True))
    assert {row.left_alone for row in tomesd.explain(model).rows} == {"not patched"}
    outputs = []
    for prop_attn in (None, False):
        tomesd.apply_patch(model, tomesd.Merge(prop_attn=prop_attn))
        outputs.append(tiny.CASES["ldm"](model))
    assert torch.equal(*outputs)


class Odd(AttnProcessor2_0):
    """A processor that nobody knows."""


def test_keys_weigh_by_default_where_attention_is_known_to_be_plain():
    unet, case = tiny.small_unet(), tiny.CASES["sd"]
    outputs = {}
    for processor in (AttnProcessor2_0, AttnProcessor, Odd):
        unet.set_attn_processor(processor())
        for prop_attn in (None, True, False):
            method = tomesd.Merge(prop_attn=prop_attn)
            if processor is Odd and prop_attn:
                with pytest.raises(
                    ValueError, match="processor Odd, of which it is not known whether it adds"
                ):
                    tomesd.apply_patch(unet, method)
            else:
                outputs[processor, prop_attn] = case(tomesd.apply_patch(unet, method))
    for processor in (AttnProcessor2_0, AttnProcessor):
        assert torch.equal(outputs[processor, None], outputs[processor, True])
    assert torch.equal(outputs[Odd, None], outputs[Odd, False])
    assert not torch.equal(outputs[Odd, None], outputs[AttnProcessor, None])


def test_a_linear_unmerge_is_exact_where_a_part_is_linear():
    unet, case = tiny.small_unet(), tiny.CASES["sd"]
    errors = {}
    for block in (m for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock"):
        block.ff = torch.nn.Linear(block.ff.net[2].out_features, block.ff.net[2].out_features)
    plain = case(unet)
    for unmerge in ("linear", "copy"):
        tomesd.apply_patch(unet, tomesd.Merge(parts=("mlp",), unmerge=unmerge))
        errors[unmerge] = (case(unet) - plain).norm().item()
    assert errors["linear"] < 0.1 * errors["copy"]


def test_blocks_and_parts_called_alone_say_so():
    unet = tiny.small_unet()
    tomesd.apply_patch(unet)
    container = unet.down_blocks[0].attentions[0]
    block = container.transformer_blocks[0]
    outside = (
        "outside of its network, so it is not known which image its 9 tokens are: call the whole network"
    )
    with pytest.raises(RuntimeError, match=outside):
        block(torch.randn(1, 9, 16))
    with pytest.raises(RuntimeError, match=outside):
        block.attn1(torch.randn(1, 9, 16))
    tomesd.apply_patch(unet, merge_attn=False, merge_mlp=True)
    with pytest.raises(RuntimeError, match=outside):
        block.ff(torch.randn(1, 9, 16))
    image, text = torch.randn(1, 16, 4, 6), torch.randn(1, 7, tiny.TEXT)
    by_position = container(image, text).sample
    assert torch.equal(container(encoder_hidden_states=text, hidden_states=image).sample, by_position)
