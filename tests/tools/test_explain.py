"""explain: what a patch does to each block."""

import pytest
import tiny
import torch
from diffusers.models.attention_processor import AttnProcessor

import tomesd

pytestmark = pytest.mark.usefixtures("no_grad")


def test_explain_counts_what_the_sites_really_see():
    pipe = tiny.sd()
    tomesd.apply_patch(pipe, ratio=0.6, max_downsample=2)
    seen = {}
    for name, module in pipe.unet.named_modules():
        if name.endswith("attn1"):
            module.to_q.register_forward_pre_hook(
                lambda m, a, name=name: seen.update({f"unet.{name.removesuffix('.attn1')}": a[0].shape[1]})
            )
    tiny.generate(pipe, height=136, width=200, num_inference_steps=1)
    table = tomesd.explain(pipe, height=136, width=200)
    assert (table.height, table.width) == (136, 200)
    assert {row.name: row.after for row in table.rows} == seen
    merged = [row for row in table.rows if row.left_alone is None]
    assert {row.downsample for row in merged} == {1, 2}
    assert all(0 < row.saved < 1 for row in merged)
    assert 0 < table.saved < 1
    text = str(table)
    assert "downsample 4 > max_downsample 2" in text
    assert f"{len(merged)} of {len(table.rows)} blocks compute less at 200 x 136 pixels" in text


@pytest.mark.parametrize("config", [{}, {"only_cross_attention": True}])
def test_explain_estimates_the_flops_that_torch_counts(config):
    from torch.utils.flop_counter import FlopCounterMode

    unet = tiny.small_unet(**config)
    unet.set_attn_processor(AttnProcessor())  # torch does not count its fused attention on CPU
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    x, text = torch.randn(1, 256, 16), torch.randn(1, 77, tiny.TEXT)

    def count():
        with FlopCounterMode(display=False) as counter:
            block(x, encoder_hidden_states=text)
        return counter.get_total_flops()

    plain = count()
    row = tomesd.explain(unet).rows[0]
    assert row.flops == pytest.approx(plain, rel=1e-6)
    tomesd.apply_patch(unet, ratio=0.5, merge_crossattn=True, merge_mlp=True)
    row = tomesd.explain(unet, 128, 128).rows[0]
    tomesd.remove_patch(unet)
    x = x[:, : row.after]
    assert row.saved == pytest.approx(1 - count() / plain, rel=1e-6)


def test_explain_of_an_unpatched_model_and_wrong_sizes():
    pipe = tiny.sdxl()
    table = tomesd.explain(pipe)
    assert {row.left_alone for row in table.rows} == {"not patched"}
    assert (table.height, table.width, table.saved) == (128, 128, 0)
    with pytest.raises(ValueError, match="height must be at least 8, got 0"):
        tomesd.explain(pipe, 0)
    with pytest.raises(TypeError, match=r"width must be an integer, got 12\.5"):
        tomesd.explain(pipe, 512, 12.5)


def test_explain_of_sizes_below_a_token_of_patches():
    model = tiny.pixart()
    with pytest.raises(ValueError, match="height must be at least 16, got 8"):
        tomesd.explain(model, 8, 64)
    assert tomesd.explain(model, 16, 64).rows[0].before == 4


def test_a_ratio_of_0_counts_as_nothing():
    unet = tomesd.apply_patch(tiny.small_unet(), 0)
    assert "0 of 4 blocks compute less" in str(tomesd.explain(unet))


def test_explain_counts_all_parts_of_a_stage():
    unet = tiny.small_unet()
    tomesd.apply_patch(unet, 0.5)
    attention = tomesd.explain(unet, 128).saved
    tomesd.apply_patch(unet, 0.5, merge_crossattn=True, merge_mlp=True)
    parts = tomesd.explain(unet, 128).saved
    tomesd.apply_patch(unet, tomesd.MergeStage(0.5))
    assert attention < parts == tomesd.explain(unet, 128).saved
