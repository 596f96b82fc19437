"""MergeStage: whole transformers on merged tokens."""

import copy
import gc

import pytest
import tiny
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

import tomesd

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("matching", ["windowed", "exact"])
def test_a_stage_adds_to_every_token_what_its_group_has_gained(matching):
    unet = tiny.sdxl_unet()
    container = unet.down_blocks[2].attentions[0]  # three blocks
    assert len(container.transformer_blocks) == 3
    plain = copy.deepcopy(container.transformer_blocks)
    tomesd.apply_patch(unet, tomesd.MergeStage(0.6, matching=matching, prop_attn=False), 8)
    seen = {}
    container.transformer_blocks[0].register_forward_pre_hook(
        lambda m, args, kwargs: seen.update(x=args[0], text=kwargs["encoder_hidden_states"]),
        with_kwargs=True,
        prepend=True,
    )
    container.transformer_blocks[2].register_forward_hook(
        lambda m, args, kwargs, y: seen.update(y=y), with_kwargs=True
    )
    with tomesd.trace(unet) as plans:
        tiny.CASES["sdxl"](unet, h=12, w=20)
    (token_map,) = (plan.map for plan in plans if plan.block.startswith("down_blocks.2.attentions.0"))
    x, y = seen["x"], seen["y"]
    assert (token_map.tokens, token_map.groups) == (15, 6)
    merged = f = token_map.merge(x)
    for block in plain:
        f = block(f, encoder_hidden_states=seen["text"])
    for b in range(len(x)):
        for n in range(x.shape[1]):
            group = token_map.index[b, n]
            torch.testing.assert_close(y[b, n], x[b, n] + f[b, group] - merged[b, group])


def test_stages_merge_once_for_each_transformer():
    unet = tiny.sdxl_unet()
    tomesd.apply_patch(unet, tomesd.MergeStage(), max_downsample=4)
    with tomesd.trace(unet) as plans:
        tiny.CASES["sdxl"](unet)
    assert len(plans) == len({row.name.split(".transformer_blocks")[0] for row in tomesd.explain(unet).rows})


def test_what_a_stage_cannot_do_is_said():
    pipe = tiny.sd()
    tomesd.apply_patch(pipe, tomesd.MergeStage())
    with pytest.raises(ValueError, match="cannot be used with MergeStage"):
        tiny.generate(pipe, cross_attention_kwargs={"ip_adapter_masks": [torch.ones(1, 1, 16, 16)]})
    unet = tiny.sdxl_unet()
    tomesd.apply_patch(unet, tomesd.MergeStage(), max_downsample=4)
    blocks = unet.down_blocks[2].attentions[0].transformer_blocks
    x, text = torch.randn(1, 9, 32), torch.randn(1, 7, 2 * tiny.TEXT)
    with pytest.raises(RuntimeError, match="it is not known which image its 9 tokens are"):
        blocks[0](x, encoder_hidden_states=text)
    with pytest.raises(RuntimeError, match=r"a part of a stage, was called without the rest of it"):
        blocks[-1](x, encoder_hidden_states=text)


def test_self_attention_masks_merge_with_a_stage(monkeypatch):
    unet = tiny.small_unet()
    container = unet.down_blocks[0].attentions[0]
    tomesd.apply_patch(unet, tomesd.MergeStage())
    x, text = torch.randn(2, 16, 4, 6), torch.randn(2, 7, tiny.TEXT)
    seen = []

    def attend(*args, original=AttnProcessor2_0.__call__, **kwargs):
        seen.append((args[2], kwargs["attention_mask"]))
        return original(*args, **kwargs)

    monkeypatch.setattr(AttnProcessor2_0, "__call__", attend)
    container(x, text, attention_mask=torch.ones(2, 24))
    tokens, mask = seen[0]
    assert tokens.shape[1] == mask.shape[-1] == 12


def test_a_stage_needs_all_blocks_of_its_transformer():
    unet = tiny.sdxl_unet()
    names = [row.name for row in tomesd.explain(unet).rows if row.name.startswith("mid_block")]
    with pytest.raises(
        ValueError, match=rf"MergeStage runs all blocks .* {names[-1]} of one would be left out"
    ):
        tomesd.apply_patch(unet, tomesd.Recipe({name: tomesd.MergeStage() for name in names[:-1]}))
    tomesd.apply_patch(unet, tomesd.Recipe({name: tomesd.MergeStage() for name in names}))
    with tomesd.trace(unet) as plans:
        tiny.CASES["sdxl"](unet)
    assert [plan.block for plan in plans] == names[:1]


def test_a_stage_keeps_nothing_after_a_call_without_gradients():
    def tokens():
        found = [x for x in gc.get_objects() if type(x) is torch.Tensor]
        return sum(x.dim() == 3 and x.shape[1] == 256 for x in found)

    model = tiny.ldm()
    tomesd.apply_patch(model, tomesd.MergeStage())
    before = tokens()
    tiny.CASES["ldm"](model)
    assert tokens() == before
