"""apply_patch's signature, its errors, and agreement with tomesd 0.1.3."""

import inspect
import subprocess
import sys

import diffusers as D
import pytest
import tiny
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

import tomesd


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_signature_is_that_of_tomesd():
    names = list(inspect.signature(tomesd.apply_patch).parameters)
    assert names[:9] == [
        *("model", "ratio", "max_downsample", "sx", "sy"),
        *("use_rand", "merge_attn", "merge_crossattn", "merge_mlp"),
    ]
    kinds = {p.kind for p in list(inspect.signature(tomesd.apply_patch).parameters.values())[9:]}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}
    unet = tiny.unet()
    tomesd.apply_patch(unet, 0.6, 2, 3, 4, False, True, True, True)
    config = unet._tomesd.config
    assert (config.ratio, config.max_downsample, config.sx, config.sy) == (0.6, 2, 3, 4)
    assert (config.use_rand, config.merge_attn, config.merge_crossattn, config.merge_mlp) == (
        False,
        *[True] * 3,
    )


@pytest.mark.parametrize("case", ["sd", "ldm"])
@pytest.mark.parametrize(
    "options",
    [
        dict(max_downsample=1),
        dict(max_downsample=8, ratio=0.75),
        dict(max_downsample=2, ratio=0.6, merge_crossattn=True, merge_mlp=True),
        dict(max_downsample=4, ratio=0.7, sx=4, sy=2),
        dict(max_downsample=1, ratio=0.3, merge_attn=False, merge_mlp=True),
    ],
)
@pytest.mark.parametrize("size", [(16, 16), (24, 16)])
def test_equals_tomesd_0_1_3(case, options, size):
    old = tiny.peer("tomesd", "tomesd_0_1_3")
    case = tiny.CASES[case]
    model = case.build()
    plain = case(model, *size)
    old.apply_patch(model, use_rand=False, **options)
    theirs = case(model, *size)
    old.remove_patch(model)
    tomesd.apply_patch(model, use_rand=False, matching="exact", **options)
    ours = case(model, *size)
    assert (theirs - plain).abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


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


def test_patched_is_undone_even_after_an_error():
    unet, call = tiny.unet(), tiny.CASES["sd"]
    plain = call(unet)
    with tomesd.patched(unet, 0.5, seed=1) as same:
        assert same is unet
        assert not torch.equal(call(unet), plain)
    assert torch.equal(call(unet), plain)
    with pytest.raises(KeyError), tomesd.patched(unet):
        raise KeyError
    assert torch.equal(call(unet), plain)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (dict(ratio=1.0), ValueError, r"ratio must be in \[0, 1\).*got 1.0"),
        (dict(ratio=-0.1), ValueError, r"got -0.1"),
        (dict(ratio=float("nan")), ValueError, r"got nan"),
        (dict(ratio=0.8), ValueError, r"ratio 0.8 is above 0.75, .* 2 x 2 cell"),
        (dict(ratio=0.6, sx=2, sy=1), ValueError, r"above 0.5"),
        (dict(ratio="0.5"), TypeError, r"ratio must be a number, got '0.5' \(str\)"),
        (dict(ratio=[0.0] * 1000), TypeError, r"ratio must be a number, got \[0.0, .*\.\.\.\] \(list\)"),
        (dict(ratio=True), TypeError, r"ratio must be a number, got True"),
        (dict(sx=0), ValueError, r"sx must be at least 1, got 0"),
        (dict(sy=2.0), TypeError, r"sy must be an integer, got 2.0 \(float\)"),
        (dict(max_downsample=3), ValueError, r"max_downsample must be None .* or one of 1, 2, 4, 8, got 3"),
        (dict(max_downsample="1"), TypeError, r"max_downsample must be an integer or None"),
        (dict(use_rand=1), TypeError, r"use_rand must be a bool, got 1 \(int\)"),
        (dict(merge_attn=False), ValueError, "merge_mlp and merge_stage are all False"),
        (dict(matching="fast"), ValueError, r"matching must be one of exact, windowed, got 'fast'"),
        (dict(seed=None), TypeError, r"seed must be an integer, got None"),
    ],
)
def test_bad_options_are_named_before_anything_is_touched(options, error, says):
    unet, call = tiny.small_unet(), tiny.CASES["sd"]
    tomesd.apply_patch(unet, 0.25)
    merged = call(unet)
    with pytest.raises(error, match=says):
        tomesd.apply_patch(unet, **options)
    assert torch.equal(call(unet), merged)


def transformer():
    torch.manual_seed(0)
    return D.SD3Transformer2DModel(sample_size=8, num_layers=1, num_attention_heads=2, attention_head_dim=8)


@pytest.mark.parametrize("verb", [tomesd.apply_patch, tomesd.remove_patch, tomesd.explain])
@pytest.mark.parametrize(
    ("model", "error", "says"),
    [
        (lambda: 3, TypeError, r"expected a pipeline or a torch module, got 3 \(int\)"),
        (lambda: "runwayml/stable-diffusion-v1-5", TypeError, r"a pipeline or a torch module, got 'runwayml"),
        (lambda: [nn.Linear(2, 2)], TypeError, r"got one \(list\)"),
        (
            lambda: D.StableDiffusionPipeline,
            TypeError,
            "got the class StableDiffusionPipeline: make one first",
        ),
        (lambda: None, TypeError, "got None"),
        (
            lambda: nn.Linear(2, 2),
            ValueError,
            "Linear holds no network that tomesd knows. Known are.*UNet2DCond",
        ),
        (tiny.vae, ValueError, "AutoencoderKL holds no network"),
        (transformer, ValueError, "SD3Transformer2DModel holds no network"),
    ],
)
def test_unknown_models_are_named(verb, model, error, says):
    with pytest.raises(error, match=says):
        verb(model())


def test_nothing_to_merge_is_an_error():
    bare = tiny.unet(
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type=None,
    )
    with pytest.raises(ValueError, match="nothing to merge: no transformer blocks in UNet2DConditionModel"):
        tomesd.apply_patch(bare)
    pipe = tiny.sdxl()
    with pytest.raises(ValueError, match=r"in unet with max_downsample=1: .* at downsample 2, 4"):
        tomesd.apply_patch(pipe, max_downsample=1)
    assert tomesd.apply_patch(pipe).unet._tomesd is not None


def test_blocks_and_parts_called_alone_say_so():
    unet = tiny.small_unet()
    tomesd.apply_patch(unet)
    container = unet.down_blocks[0].attentions[0]
    block = container.transformer_blocks[0]
    with pytest.raises(RuntimeError, match="given 9 tokens and no image: call the whole network"):
        block(torch.randn(1, 9, 16))
    with pytest.raises(RuntimeError, match="given no tokens and no image: call the whole network"):
        block.attn1(torch.randn(1, 9, 16))
    tomesd.apply_patch(unet, merge_attn=False, merge_mlp=True)
    with pytest.raises(RuntimeError, match="called without its block"):
        block.ff(torch.randn(1, 9, 16))
    image, text = torch.randn(1, 16, 4, 6), torch.randn(1, 7, tiny.TEXT)
    by_position = container(image, text).sample
    assert torch.equal(container(encoder_hidden_states=text, hidden_states=image).sample, by_position)


def test_every_network_of_a_pipeline_must_have_something_to_merge():
    pipe = tiny.sd(D.StableDiffusionControlNetPipeline, unet=tiny.sdxl_unet(), controlnet=tiny.controlnet())
    with pytest.raises(ValueError, match="nothing to merge in unet with max_downsample=1"):
        tomesd.apply_patch(pipe, max_downsample=1)
    assert not hasattr(pipe.controlnet, "_tomesd")


def test_blocks_of_other_makes_are_left_alone_and_explained():
    unet = tiny.small_unet()
    del unet.down_blocks[0].attentions[0].transformer_blocks[0].norm1
    tomesd.apply_patch(unet)
    reasons = {row.name: row.left_alone for row in tomesd.explain(unet).rows}
    assert reasons["down_blocks.0.attentions.0.transformer_blocks.0"] == "has no norm1 and attn1 to plan at"
    assert reasons["up_blocks.1.attentions.0.transformer_blocks.0"] is None


def test_explain_counts_what_the_sites_really_see():
    pipe = tiny.sd()
    tomesd.apply_patch(pipe, ratio=0.6, max_downsample=2)
    seen = {}
    for name, module in pipe.unet.named_modules():
        if name.endswith("attn1"):
            module.register_forward_pre_hook(
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
    assert f"{len(merged)} of {len(table.rows)} blocks merge at 200 x 136 pixels" in text


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
    with pytest.raises(ValueError, match="height must be an integer of at least 8 pixels, got 0"):
        tomesd.explain(pipe, 0)
    with pytest.raises(ValueError, match=r"width must be .*, got 12\.5"):
        tomesd.explain(pipe, 512, 12.5)


def test_import_loads_torch_only():
    code = (
        "import sys, tomesd.vit;"
        "heavy = {'diffusers', 'transformers', 'timm', 'PIL', 'triton', 'torch._dynamo'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_compiled_networks_of_a_class_keep_apart():
    """By default torch.compile does not look at hooks, and would run one's code for the other."""
    call = (torch.randn(1, 4, 16, 16), 5, torch.randn(1, 7, tiny.TEXT))
    for order in ((0, 1, 0, 1), (1, 0, 1, 0)):
        networks = [tiny.small_unet(), tiny.small_unet()]
        tomesd.apply_patch(networks[1])
        with torch.no_grad():
            want = [network(*call).sample for network in networks]
            compiled = [torch.compile(network, backend="eager") for network in networks]
            for i in order:
                torch.testing.assert_close(compiled[i](*call).sample, want[i])
        assert not torch.equal(*want)
