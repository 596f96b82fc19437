"""apply_patch on whole diffusers pipelines, and beside everything else that people put on them."""

from types import SimpleNamespace

import diffusers as D
import numpy as np
import pytest
import tiny
import torch
from diffusers.models import attention_processor
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor
from PIL import Image

import tomesd

pytestmark = pytest.mark.usefixtures("no_grad")


def picture(side=128):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype="uint8"))


def mask(side=128):
    return Image.fromarray(np.triu(np.full((side, side), 255, dtype="uint8")))


def check(pipe, **call):
    """Patching changes the picture, the same seed repeats it, removal restores it."""
    plain = tiny.generate(pipe, **call)
    assert tomesd.apply_patch(pipe, ratio=0.5) is pipe
    merged = tiny.generate(pipe, **call)
    assert merged.shape == plain.shape
    assert torch.isfinite(merged).all()
    assert not torch.equal(merged, plain)
    assert torch.equal(tiny.generate(pipe, **call), merged)
    tomesd.remove_patch(pipe)
    assert torch.equal(tiny.generate(pipe, **call), plain)


def test_text_to_image():
    check(tiny.sd(), height=128, width=192)


def test_img2img():
    check(tiny.sd(D.StableDiffusionImg2ImgPipeline), image=picture(), strength=1.0)


def test_inpaint_by_mask_and_by_a_nine_channel_unet():
    check(
        tiny.sd(D.StableDiffusionInpaintPipeline), image=picture(), mask_image=mask(), height=128, width=128
    )
    nine = tiny.sd(D.StableDiffusionInpaintPipeline, unet=tiny.unet(in_channels=9))
    check(nine, image=picture(), mask_image=mask(), height=128, width=128)


def test_sdxl_base():
    check(tiny.sdxl(), height=128, width=128)


def test_sdxl_refiner():
    pipe = tiny.sdxl(
        D.StableDiffusionXLImg2ImgPipeline,
        unet=tiny.sdxl_unet(
            projection_class_embeddings_input_dim=5 * 8 + tiny.TEXT, cross_attention_dim=tiny.TEXT
        ),
        text_encoder=None,
        tokenizer=None,
        requires_aesthetics_score=True,
    )
    check(pipe, image=picture(), strength=1.0)


def test_animatediff_merges_spatial_blocks_only():
    pipe = tiny.animatediff()
    check(pipe, height=64, width=64, num_frames=3)
    tomesd.apply_patch(pipe)
    rows = tomesd.explain(pipe).rows
    assert rows
    assert not [row.name for row in rows if "motion" in row.name]


def test_pixart():
    pipe = tiny.pixart_pipe()
    call = dict(height=128, width=192, use_resolution_binning=False)
    check(pipe, **call)
    tomesd.apply_patch(pipe, tomesd.SampleKeys(0.5))
    with tomesd.trace(pipe) as plans:
        tiny.generate(pipe, **call)
    # Latents of 16 x 24 in patches of 2 x 2.
    assert {(plan.h, plan.w, plan.map.tokens, plan.map.groups) for plan in plans} == {(8, 12, 96, 24)}
    rows = tomesd.explain(pipe, 128, 192).rows
    assert {(row.before, row.after) for row in rows} == {(96, 24)}


@pytest.mark.skipif(not hasattr(D, "DreamLiteUNetModel"), reason="this diffusers has none")
@pytest.mark.parametrize(
    "method", [tomesd.Merge(), tomesd.SampleKeys(), tomesd.MergeKeys(), tomesd.MergeStage()], ids=str
)
def test_dreamlite(method):
    """Several heads of queries share one of keys there, and some transformers have no self-attention."""
    torch.manual_seed(0)
    blocks = ("CrossAttnNoSelfAttnDown", "CrossAttnDown"), ("CrossAttnUp", "CrossAttnNoSelfAttnUp")
    down, up = ([f"DreamLite{kind}Block2D" for kind in kinds] for kinds in blocks)
    config = dict(block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=tiny.TEXT)
    heads = dict(attention_head_dim=4, num_kv_heads=1, qk_norm="rms_norm", norm_num_groups=8)
    unet = D.DreamLiteUNetModel(down_block_types=down, up_block_types=up, **config, **heads).eval()
    call = tiny.CASES["sd"]
    plain = call(unet)
    with tomesd.patched(unet, type(method)(0.0), 8):
        assert torch.equal(call(unet), plain)
    tomesd.apply_patch(unet, method, 8)
    rows = [row.name for row in tomesd.explain(unet).rows if row.left_alone is None]
    assert len(rows) == (7 if method == tomesd.MergeStage() else 4)
    assert 0 < (call(unet) - plain).norm() / plain.norm() < 0.3
    tomesd.remove_patch(unet)
    assert torch.equal(call(unet), plain)


def test_temporal_blocks_are_left_alone():
    for name in ("svd", "i2vgen", "sparse_controlnet", "animatediff", "unet3d"):
        case = tiny.CASES[name]
        model = case.build()
        tomesd.apply_patch(model, max_downsample=8)
        rows = tomesd.explain(model).rows
        assert rows
        assert not [row.name for row in rows if "temp" in row.name or "motion" in row.name]


@pytest.mark.parametrize("several", [False, True])
def test_controlnet_is_patched_as_well(several):
    nets = [tiny.controlnet(), tiny.controlnet()] if several else tiny.controlnet()
    pipe = tiny.sd(D.StableDiffusionControlNetPipeline, controlnet=nets)
    check(pipe, image=[picture()] * 2 if several else picture())
    tomesd.apply_patch(pipe)
    parts = {row.name.split(".down")[0] for row in tomesd.explain(pipe).rows if ".down" in row.name}
    assert parts == (
        {"unet", "controlnet.nets.0", "controlnet.nets.1"} if several else {"unet", "controlnet"}
    )


def test_t2i_adapter():
    torch.manual_seed(0)
    adapter = D.T2IAdapter(
        in_channels=3,
        channels=[16, 32, 32, 32],
        num_res_blocks=1,
        downscale_factor=8,
        adapter_type="full_adapter",
    )
    check(tiny.sd(D.StableDiffusionAdapterPipeline, adapter=adapter.eval()), image=picture())


def ip_adapter_state(unet):
    """The state dict of an IP-Adapter for a tiny UNet, as `_load_ip_adapter_weights` takes it."""
    torch.manual_seed(0)
    state, number = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            width = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            for part in ("to_k_ip", "to_v_ip"):
                state[f"{number}.{part}.weight"] = torch.randn(width, tiny.TEXT) * 0.1
            number += 2
    tokens = 4
    projection = {
        "proj.weight": torch.randn(tokens * tiny.TEXT, tiny.TEXT) * 0.1,
        "proj.bias": torch.zeros(tokens * tiny.TEXT),
        "norm.weight": torch.ones(tiny.TEXT),
        "norm.bias": torch.zeros(tiny.TEXT),
    }
    return {"image_proj": projection, "ip_adapter": state}


def test_ip_adapter():
    pipe = tiny.sd()
    pipe.unet._load_ip_adapter_weights([ip_adapter_state(pipe.unet)])
    embeds = [torch.randn(2, 1, tiny.TEXT)]
    check(pipe, ip_adapter_image_embeds=embeds)
    masks = [torch.ones(1, 1, 128, 128)]
    check(pipe, ip_adapter_image_embeds=embeds, cross_attention_kwargs={"ip_adapter_masks": masks})
    tomesd.apply_patch(pipe, merge_crossattn=True)
    with pytest.raises(ValueError, match="ip_adapter_masks"):
        tiny.generate(
            pipe, ip_adapter_image_embeds=embeds, cross_attention_kwargs={"ip_adapter_masks": masks}
        )
    assert torch.isfinite(tiny.generate(pipe, ip_adapter_image_embeds=embeds)).all()


def test_lora_before_and_after_patching():
    from peft import LoraConfig

    pipe = tiny.sd()
    config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    pipe.unet.add_adapter(config, "first")
    check(pipe)
    tomesd.apply_patch(pipe)
    merged = tiny.generate(pipe)
    pipe.unet.add_adapter(config, "second")
    pipe.unet.set_adapters(["first", "second"])
    assert not torch.equal(tiny.generate(pipe), merged)
    pipe.unet.delete_adapters(["second"])
    pipe.unet.set_adapters(["first"])
    torch.testing.assert_close(tiny.generate(pipe), merged)
    pipe.unet.disable_adapters()
    tomesd.remove_patch(pipe)
    assert torch.equal(tiny.generate(pipe), tiny.generate(tiny.sd()))


def test_gligen_boxes_still_act():
    pipe = tiny.sd(D.StableDiffusionGLIGENPipeline, unet=tiny.unet(attention_type="gated"))
    for module in pipe.unet.modules():  # GLIGEN's gates start at zero
        if hasattr(module, "alpha_attn"):
            module.alpha_attn.data.fill_(1.0)
            module.alpha_dense.data.fill_(1.0)
    boxes = dict(gligen_phrases=["cat"], gligen_scheduled_sampling_beta=1.0, height=128, width=128)
    tomesd.apply_patch(pipe)
    left, right = (
        tiny.generate(pipe, gligen_boxes=[box], **boxes) for box in ([0, 0, 0.4, 1], [0.6, 0, 1, 1])
    )
    assert not torch.equal(left, right)
    tomesd.remove_patch(pipe)
    check(pipe, gligen_boxes=[[0, 0, 0.5, 0.5]], **boxes)


def chunk_feed_forward(unet, size, dim=1):
    for module in unet.modules():
        if hasattr(module, "set_chunk_feed_forward"):
            module.set_chunk_feed_forward(size, dim)


@pytest.mark.parametrize(
    "switch",
    [
        lambda pipe: pipe.enable_attention_slicing(1),
        lambda pipe: pipe.enable_attention_slicing("max"),
        lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()),
        lambda pipe: chunk_feed_forward(pipe.unet, 4),
        lambda pipe: pipe.vae.enable_tiling(),
        lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4),
        lambda pipe: pipe.unet.fuse_qkv_projections(),
        lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
    ],
    ids=["slicing", "slicing-max", "eager", "chunking", "vae-tiling", "freeu", "fused-qkv", "channels-last"],
)
def test_switches_of_the_host(switch):
    pipe = tiny.sd()
    tomesd.apply_patch(pipe)
    merged = tiny.generate(pipe)
    tomesd.remove_patch(pipe)
    switch(pipe)
    check(pipe, output_type="pt", height=128, width=128)
    if "freeu" not in str(switch.__code__.co_names):
        tomesd.apply_patch(pipe)
        torch.testing.assert_close(tiny.generate(pipe), merged, atol=1e-4, rtol=1e-3)


def test_chunks_of_a_feed_forward_are_left_as_they_are():
    unet = tiny.unet()
    chunk_feed_forward(unet, 4)
    plain = tiny.CASES["sd"](unet)
    tomesd.apply_patch(unet, merge_attn=False, merge_mlp=True)
    with pytest.warns(
        UserWarning, match=r"ff was called with \[2, 4\] tokens, not with its block's \[2, 256\]"
    ):
        assert torch.equal(tiny.CASES["sd"](unet), plain)
    tomesd.apply_patch(unet, merge_mlp=True)
    chunk_feed_forward(unet, None)
    assert torch.isfinite(tiny.CASES["sd"](unet)).all()


def test_a_custom_processor_sees_merged_tokens():
    seen = []

    class Custom(AttnProcessor):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, mine=None):
            seen.append((hidden_states.shape[1], encoder_hidden_states is not None, mine))
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)

    pipe = tiny.sd()
    pipe.unet.set_attn_processor(Custom())
    tomesd.apply_patch(pipe, ratio=0.75)
    tiny.generate(pipe, num_inference_steps=1, cross_attention_kwargs={"mine": 1})
    assert seen[:2] == [(64, False, 1), (256, True, 1)]


def test_xformers_processor(monkeypatch):
    seen = []

    def attention(query, key, value, attn_bias=None, op=None, scale=None):
        # xformers' kernels run on GPUs only; the same function in plain torch lets its processor run here.
        seen.append((query.shape[1], key.shape[1]))
        scores = query @ key.mT * (scale or query.shape[-1] ** -0.5)
        return (scores if attn_bias is None else scores + attn_bias).softmax(-1) @ value

    module = SimpleNamespace(ops=SimpleNamespace(memory_efficient_attention=attention))
    monkeypatch.setattr(attention_processor, "xformers", module)
    # Whether its kernels take a bias depends on shapes, so by default they are given none.
    for prop_attn, default in ((True, True), (False, None)):
        pipe = tiny.sd()
        tomesd.apply_patch(pipe, tomesd.Merge(0.5, prop_attn=prop_attn))
        merged = tiny.generate(pipe)
        pipe.unet.set_attn_processor(XFormersAttnProcessor())
        tomesd.apply_patch(pipe, tomesd.Merge(0.5, prop_attn=default))
        torch.testing.assert_close(tiny.generate(pipe), merged, atol=1e-4, rtol=1e-3)
    assert (128, 128) in seen
    assert (256, 77) in seen


def test_caches_of_self_attention_are_refused():
    pipe = tiny.sd()
    tomesd.apply_patch(pipe)
    config = D.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: 500,
    )
    D.apply_pyramid_attention_broadcast(pipe.unet, config)
    with pytest.raises(ValueError, match="cached by diffusers' pyramid_attention_broadcast"):
        tiny.generate(pipe)
    tomesd.apply_patch(pipe, merge_attn=False, merge_mlp=True)
    assert torch.isfinite(tiny.generate(pipe)).all()


def test_self_attention_masks_are_merged(monkeypatch):
    unet = tiny.small_unet(mid_block_type=None)
    x, text = tiny.inputs(16, 16, 2)
    t = torch.tensor(500)
    tomesd.apply_patch(unet)
    free = unet(x, t, text).sample
    everything = torch.ones(2, 256)
    torch.testing.assert_close(unet(x, t, text, attention_mask=everything).sample, free, atol=1e-5, rtol=1e-4)
    half = everything.clone()
    half[:, :128] = 0
    assert not torch.allclose(unet(x, t, text, attention_mask=half).sample, free)
    kept = []

    def attend(*args, original=AttnProcessor2_0.__call__, **kwargs):
        kept.append((args[2], kwargs["attention_mask"]))
        return original(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(AttnProcessor2_0, "__call__", attend)
        unet(x, t, text, attention_mask=half)
    tokens, bias = kept[0]
    assert (tokens.shape[1], list(bias.shape)) == (128, [2, 1, 128])
    assert 0 < (bias == 0).sum() < bias.numel()
    with pytest.raises(ValueError, match=r"self-attention mask of shape \[2, 1, 256, 256\]"):
        unet(x, t, text, attention_mask=torch.ones(2, 256, 256))


@pytest.mark.parametrize(
    ("method", "most"),
    [(tomesd.Merge(), 0.02), (tomesd.SampleKeys(0.2), 0.03), (tomesd.MergeKeys(), 0.03)],
    ids=str,
)
def test_masks_hide_keys_whatever_has_merged_with_them(method, most):
    """Every third token, and a part of the image."""
    unet = tiny.small_unet(mid_block_type=None)
    (x, text), mask = tiny.inputs(16, 16, 2), torch.ones(2, 256)
    mask[0, :100], mask[1, ::3] = 0, 0
    plain = unet(x, 500, text, attention_mask=mask).sample
    tomesd.apply_patch(unet, method)
    merged = unet(x, 500, text, attention_mask=mask).sample
    assert 0 < (merged - plain).norm() / plain.norm() < most


@pytest.mark.parametrize("kind", ["model", "sequential"])
@pytest.mark.parametrize("order", ["patch first", "offload first"])
def test_offload(kind, order):
    """accelerate's hooks, with the CPU as execution device."""
    import accelerate

    def offload(pipe):
        if kind == "model":
            _, hook = accelerate.cpu_offload_with_hook(pipe.unet, "cpu")
            return hook
        accelerate.cpu_offload(pipe.unet, "cpu", offload_buffers=True)

    reference = tiny.sd()
    plain = tiny.generate(reference)
    tomesd.apply_patch(reference)
    merged = tiny.generate(reference)
    pipe = tiny.sd()
    if order == "patch first":
        tomesd.apply_patch(pipe)
    hook = offload(pipe)
    if order == "offload first":
        tomesd.apply_patch(pipe)
    assert torch.equal(tiny.generate(pipe), merged)
    if hook is not None:
        hook.offload()
    tomesd.remove_patch(pipe)
    assert torch.equal(tiny.generate(pipe), plain)


def test_save_and_load_pretrained(tmp_path):
    pipe = tiny.sd()
    plain = tiny.generate(pipe)
    tomesd.apply_patch(pipe)
    merged = tiny.generate(pipe)
    pipe.save_pretrained(tmp_path)
    assert "tome" not in (tmp_path / "unet" / "config.json").read_text()
    loaded = D.StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(tiny.generate(loaded), plain)
    tomesd.apply_patch(loaded)
    assert torch.equal(tiny.generate(loaded), merged)


def test_networks_shared_by_pipelines_are_patched_once():
    text = tiny.sd()
    image = D.StableDiffusionImg2ImgPipeline(**text.components, requires_safety_checker=False)
    tomesd.apply_patch(text)
    tomesd.apply_patch(image)
    merged = tiny.generate(text)
    tomesd.remove_patch(image)
    assert not torch.equal(tiny.generate(text), merged)


def test_calls_by_keyword_and_with_a_number_as_timestep():
    unet = tiny.unet()
    tomesd.apply_patch(unet)
    x, text = tiny.inputs(17, 23, 1)
    by_position = unet(x, torch.tensor(500), text).sample
    assert torch.equal(unet(encoder_hidden_states=text, timestep=500, sample=x).sample, by_position)
    assert torch.equal(unet(x, 500.0, text).sample, by_position)
    assert torch.equal(unet(x, torch.tensor([500]), text).sample, by_position)


def test_guidance_halves_may_be_called_apart():
    unet = tiny.unet()
    tomesd.apply_patch(unet)
    x, text = tiny.inputs(16, 16, 2)
    t = torch.tensor(500)
    together = unet(x, t, text).sample
    apart = torch.cat([unet(x[i : i + 1], t, text[i : i + 1]).sample for i in range(2)])
    torch.testing.assert_close(apart, together, atol=1e-5, rtol=1e-4)
    many = unet(x, torch.tensor([500, 20]), text).sample
    torch.testing.assert_close(many[:1], together[:1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(many[1:], unet(x[1:], 20, text[1:]).sample, atol=1e-5, rtol=1e-4)


def test_numbers_as_timesteps_compile():
    unet = tiny.small_unet(mid_block_type=None)
    tomesd.apply_patch(unet)
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    x, text = tiny.inputs(16, 16, 2)
    for t in (500.0, 400.5, 7):
        torch.testing.assert_close(compiled(x, t, text).sample, unet(x, t, text).sample, atol=1e-5, rtol=1e-4)
    torch.compiler.reset()


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": tomesd.Merge()},
        {"ratio": tomesd.MergeKeys()},
        {"ratio": tomesd.SampleKeys()},
        {"ratio": tomesd.MergeStage()},
        {"auto": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("blocks", [False, True])
def test_a_denoising_loop_compiles_once(blocks, options):
    pipe = tiny.sd(unet=tiny.small_unet())
    tomesd.apply_patch(pipe, max_downsample=8, **options)
    if options.get("ratio") == tomesd.SampleKeys():  # programs do not know the number of a step
        with tomesd.patched(pipe, tomesd.SampleKeys(replacement=True), 8):
            want = tiny.generate(pipe, num_inference_steps=5)
    else:
        want = tiny.generate(pipe, num_inference_steps=5)
    if blocks:
        pipe.unet.compile_repeated_blocks(backend="eager", fullgraph=True)
    else:
        pipe.unet.compile(backend="eager", fullgraph=True)
    tiny.generate(pipe, num_inference_steps=2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(tiny.generate(pipe, num_inference_steps=5), want)
    torch.compiler.reset()


@pytest.mark.parametrize("options", [{}, {"ratio": tomesd.MergeStage()}], ids=str)
@pytest.mark.parametrize("way", ["wrapper", "in place", "blocks"])
def test_patching_after_compiling(way, options):
    unet = tiny.small_unet()
    call = tiny.CASES["sd"]
    plain = call(unet)
    tomesd.apply_patch(unet, **options)
    merged = call(unet)
    tomesd.remove_patch(unet)
    if way == "wrapper":
        compiled = torch.compile(unet, backend="eager")
    elif way == "in place":
        compiled = unet
        unet.compile(backend="eager")
    else:
        compiled = unet
        unet.compile_repeated_blocks(backend="eager", fullgraph=True)
    torch.testing.assert_close(call(compiled), plain)
    tomesd.apply_patch(compiled, **options)
    torch.testing.assert_close(call(compiled), merged)
    tomesd.remove_patch(compiled)
    torch.testing.assert_close(call(compiled), plain)
