"""Whole stages, plans that last, and merging only where it pays."""

import copy
import itertools
import threading

import diffusers as D
import pytest
import tiny
import torch

import tomesd
from tomesd import worth
from tomesd.config import MergeConfig
from tomesd.families import FAMILIES, find_sites
from tomesd.layout import Layout
from tomesd.partition import Grid, thin_out
from tomesd.token_map import TokenMap


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def count_plans(monkeypatch):
    """A list that grows by every plan that is made."""
    made = []
    original = TokenMap.from_pairs
    monkeypatch.setattr(TokenMap, "from_pairs", lambda *args: made.append(original(*args)) or made[-1])
    return made


# Whole stages


@pytest.mark.parametrize("matching", ["windowed", "exact"])
def test_a_stage_adds_to_every_token_what_its_group_has_gained(matching):
    unet = tiny.sdxl_unet()
    container = unet.down_blocks[2].attentions[0]  # three blocks
    assert len(container.transformer_blocks) == 3
    plain = copy.deepcopy(container.transformer_blocks)
    tomesd.apply_patch(unet, 0.6, max_downsample=8, matching=matching, merge_stage=True)
    seen = {}
    container.transformer_blocks[0].register_forward_pre_hook(
        lambda m, args, kwargs: seen.update(x=args[0], text=kwargs["encoder_hidden_states"]),
        with_kwargs=True,
        prepend=True,
    )
    container.transformer_blocks[2].register_forward_hook(
        lambda m, args, kwargs, y: seen.update(y=y, call=kwargs["cross_attention_kwargs"]["_tomesd"]),
        with_kwargs=True,
    )
    tiny.CASES["sdxl"](unet, h=12, w=20)
    x, y, token_map = seen["x"], seen["y"], seen["call"].stage.map
    assert (token_map.tokens, token_map.groups) == (15, 6)
    merged = f = token_map.merge(x)
    for block in plain:
        f = block(f, encoder_hidden_states=seen["text"])
    for b in range(len(x)):
        for n in range(x.shape[1]):
            group = token_map.index[b, n]
            torch.testing.assert_close(y[b, n], x[b, n] + f[b, group] - merged[b, group])


def test_stages_merge_once_for_each_transformer(monkeypatch):
    made = count_plans(monkeypatch)
    unet = tiny.sdxl_unet()
    tomesd.apply_patch(unet, max_downsample=4, merge_stage=True)
    tiny.CASES["sdxl"](unet)
    assert len(made) == len({row.name.split(".transformer_blocks")[0] for row in tomesd.explain(unet).rows})


def test_explain_counts_all_parts_of_a_stage():
    unet = tiny.small_unet()
    tomesd.apply_patch(unet, 0.5)
    attention = tomesd.explain(unet, 128).saved
    tomesd.apply_patch(unet, 0.5, merge_crossattn=True, merge_mlp=True)
    parts = tomesd.explain(unet, 128).saved
    tomesd.apply_patch(unet, 0.5, merge_stage=True)
    assert attention < parts == tomesd.explain(unet, 128).saved


def test_what_a_stage_cannot_do_is_said():
    pipe = tiny.sd()
    tomesd.apply_patch(pipe, merge_stage=True)
    with pytest.raises(ValueError, match="cannot be used with merge_stage=True"):
        tiny.generate(pipe, cross_attention_kwargs={"ip_adapter_masks": [torch.ones(1, 1, 16, 16)]})
    unet = tiny.sdxl_unet()
    tomesd.apply_patch(unet, max_downsample=4, merge_stage=True)
    blocks = unet.down_blocks[2].attentions[0].transformer_blocks
    x, text = torch.randn(1, 9, 32), torch.randn(1, 7, 2 * tiny.TEXT)
    with pytest.raises(RuntimeError, match="given 9 tokens and no image"):
        blocks[0](x, encoder_hidden_states=text)
    with pytest.raises(RuntimeError, match=r"a part of the stage of .* was called without the rest of it"):
        blocks[-1](x, encoder_hidden_states=text)


def test_self_attention_masks_merge_with_a_stage():
    unet = tiny.small_unet()
    container = unet.down_blocks[0].attentions[0]
    tomesd.apply_patch(unet, merge_stage=True)
    x, text = torch.randn(2, 16, 4, 6), torch.randn(2, 7, tiny.TEXT)
    seen = []
    container.transformer_blocks[0].attn1.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append((args[0], kwargs["attention_mask"])), with_kwargs=True
    )
    container(x, text, attention_mask=torch.ones(2, 24))
    tokens, mask = seen[0]
    assert tokens.shape[1] == mask.shape[-1] == 12


# A sample of the keys


def test_keys_only_is_attention_of_all_tokens_to_a_sample():
    unet = tiny.small_unet()
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    seen = []
    tomesd.apply_patch(unet, 0.5, keys_only=True)
    attn.register_forward_hook(lambda m, args, y: seen.append((args[0], y)))
    tiny.CASES["sd"](unet, 6, 10)
    ((x, y),) = seen
    keep = unet._tomesd.layouts[0].keys.keep
    assert keep.shape == (1, 15)
    at = torch.stack((keep[0] // 10 // 2, keep[0] % 10 // 2), 1)
    assert len(at.unique(dim=0)) == 15  # one in each cell
    heads = attn.heads
    q, k, v = (
        layer(z).unflatten(2, (heads, -1)).transpose(1, 2)
        for layer, z in ((attn.to_q, x), (attn.to_k, x[:, keep[0]]), (attn.to_v, x[:, keep[0]]))
    )
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    want = attn.to_out[0]((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-4)


def test_samples_of_keys_are_even_new_in_each_step_and_the_same_for_all_blocks():
    unet = tiny.small_unet()
    tomesd.apply_patch(unet, 0.5, keys_only=True)
    samples = []
    for t in (5, 5, 6):
        tiny.CASES["sd"](unet, 16, 16, t=t)
        samples.append(unet._tomesd.layouts[0].keys.keep)
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])
    tomesd.apply_patch(unet, 0.5, keys_only=True, use_rand=False)
    fixed = []
    for t in (5, 6):
        tiny.CASES["sd"](unet, 16, 16, t=t)
        fixed.append(unet._tomesd.layouts[0].keys.keep)
    assert torch.equal(*fixed)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.25, 0.5, 0.6, 0.75, 0.9])
@pytest.mark.parametrize(("h", "w"), [(16, 16), (17, 23), (8, 24), (1, 7), (3, 3)])
def test_a_sample_leaves_the_products_that_merging_leaves(h, w, ratio):
    unet = tiny.small_unet()
    tomesd.apply_patch(unet, ratio, keys_only=True)
    config = unet._tomesd.config
    token_map = Layout.of(torch.zeros(1, 4, h, w), config, 3).keys
    merged = h * w - int(ratio * h * w)
    assert token_map.groups == max(1, round(merged**2 / (h * w)))
    assert torch.equal(token_map.index.gather(1, token_map.keep)[0], torch.arange(token_map.groups))


@pytest.mark.parametrize(("h", "w", "ratio"), [(16, 16, 0.6), (31, 31, 0.9), (17, 23, 0.75), (34, 60, 0.75)])
def test_samples_are_as_dense_everywhere(h, w, ratio):
    config = MergeConfig(ratio, keys_only=True)
    count = torch.zeros(h * w)
    for t in range(200):
        keep = Layout.of(torch.zeros(1, 4, h, w), config, t).keys.keep
        count.index_add_(0, keep[0], torch.ones(keep.shape[1]))
    count = count.view(h, w) / count.mean()
    for part in (count[: h // 2, : w // 2], count[h - h // 2 :, w - w // 2 :], count[:, -4:], count[-4:]):
        assert 0.8 < part.mean() < 1.25


def test_any_token_may_stay():
    counts = torch.zeros(64)
    for seed in range(400):
        src, dst = thin_out(Grid(8, 8), 40, seed)
        kept = torch.ones(64).index_fill(0, src[0], 0)
        assert src[0].unique().numel() == 40
        assert kept[dst[0]].all()
        counts += kept
    assert counts.min() > 400 * 24 / 64 * 0.75
    assert counts.max() < 400 * 24 / 64 * 1.25


def test_keys_only_goes_with_merging_other_parts():
    unet = tiny.small_unet()
    plain = tiny.CASES["sd"](unet)
    outputs = [
        tiny.CASES["sd"](tomesd.apply_patch(unet, 0.5, **options))
        for options in ({"keys_only": True}, {"keys_only": True, "merge_mlp": True}, {"merge_mlp": True})
    ]
    tomesd.apply_patch(unet, 0.5, keys_only=True, merge_mlp=True)
    shapes = []
    ff = unet.down_blocks[0].attentions[0].transformer_blocks[0].ff
    ff.register_forward_hook(lambda m, args, y: shapes.append(args[0].shape[1]))
    tiny.CASES["sd"](unet)
    assert shapes == [128]
    for one, other in itertools.combinations([plain, *outputs], 2):
        assert not torch.equal(one, other)
    with pytest.raises(ValueError, match=r"ratio 0\.9 is above 0\.75"):
        tomesd.apply_patch(unet, 0.9, keys_only=True, merge_mlp=True)


def test_proportional_attention_is_exact_where_equal_tokens_merge():
    torch.manual_seed(0)
    unet = tiny.small_unet()
    container = unet.down_blocks[0].attentions[0]
    index = torch.randint(16, (1, 64))  # groups of very different sizes
    image = torch.randn(2, 16, 16)[:, :, index[0]].unflatten(2, (8, 8))
    text = torch.randn(2, 7, tiny.TEXT)
    plain = container(image, text).sample
    for options in (
        {},
        {"prop_attn": True},
        {"merge_stage": True, "prop_attn": True},
    ):
        tomesd.apply_patch(unet, **options)
        unet._tomesd.plan = lambda x, layout: TokenMap.from_index(index, 16)
        error = (container(image, text).sample - plain).abs().max()
        assert error < 1e-5 if options else error > 1e-3


def test_attention_that_takes_no_bias_is_refused():
    model = tiny.ldm()
    with pytest.raises(ValueError, match=r"diffusion_model \(CompVis LDM\) takes no bias"):
        tomesd.apply_patch(model, prop_attn=True)
    assert not hasattr(model.model.diffusion_model, "_tomesd")


def test_keys_only_saves_what_explain_says():
    from torch.utils.flop_counter import FlopCounterMode

    unet = tiny.small_unet()
    unet.set_attn_processor(D.models.attention_processor.AttnProcessor())  # its products are counted on CPU
    call = tiny.CASES["sd"]

    def count():
        with FlopCounterMode(display=False) as counter:
            call(unet, b=1)
        return counter.get_total_flops()

    plain = count()
    tomesd.apply_patch(unet, 0.5, keys_only=True)
    table = tomesd.explain(unet, 128)
    saved = sum(row.flops * row.saved for row in table.rows)
    assert [row.after for row in table.rows if row.left_alone is None] == [64, 64, 64]
    assert plain - count() == pytest.approx(saved, rel=1e-6)  # and nothing is matched


def test_keys_only_stays_nearer_than_merging_all():
    """At the same number of products of queries and keys."""
    pipe = D.StableDiffusionPipeline.from_pretrained("examples/emoji-model", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    call = dict(num_inference_steps=3, guidance_scale=3.0, output_type="latent")
    draw = lambda: pipe("red apple", generator=torch.Generator().manual_seed(0), **call).images  # noqa: E731
    plain = draw()
    tomesd.apply_patch(pipe, 0.5)
    all_merged = draw()
    tomesd.apply_patch(pipe, 0.5, keys_only=True)
    keys_merged = draw()
    assert 0 < (keys_merged - plain).norm() < 0.9 * (all_merged - plain).norm()


def test_what_keys_only_cannot_do_is_said():
    pipe = tiny.sd()
    pipe.fuse_qkv_projections(vae=False)
    tomesd.apply_patch(pipe, keys_only=True)
    with pytest.raises(ValueError, match=r"call unfuse_qkv_projections\(\) first"):
        tiny.generate(pipe)
    pipe.unfuse_qkv_projections(vae=False)
    assert torch.isfinite(tiny.generate(pipe)).all()
    unet = tiny.small_unet(only_cross_attention=True)
    tomesd.apply_patch(unet, keys_only=True)  # the middle of the network has self-attention all the same
    reasons = [row.left_alone for row in tomesd.explain(unet).rows]
    assert set(reasons) == {None, "has the keys of the text in attn1"}
    for site in find_sites(unet, FAMILIES[0]):
        site.block.attn1.is_cross_attention = True
    with pytest.raises(ValueError, match="each of its transformer blocks has the keys of the text in attn1"):
        tomesd.apply_patch(unet, keys_only=True)
    tomesd.apply_patch(unet, keys_only=True, merge_mlp=True)
    for wrong in ({"merge_stage": True}, {"merge_attn": False, "merge_mlp": True}):
        with pytest.raises(ValueError, match="keys_only=True is about keys and values of self-attention"):
            tomesd.apply_patch(unet, keys_only=True, **wrong)


# Plans that last


def test_reuse_1_makes_one_plan_for_each_size(monkeypatch):
    made = count_plans(monkeypatch)
    unet = tiny.unet()
    call = tiny.CASES["sd"]
    levels = {row.downsample: 0 for row in tomesd.explain(unet).rows}
    for reuse, plans in ((0, len(tomesd.explain(unet).rows)), (1, len(levels)), (5, len(levels))):
        tomesd.apply_patch(unet, max_downsample=8, reuse=reuse)
        made.clear()
        call(unet)
        assert len(made) == plans
        call(unet)  # a lone timestep does not tell that a loop goes on
        assert len(made) == 2 * plans


def loop(pipe, prompt="a cat", steps=6, **call):
    return tiny.generate(pipe, prompt, num_inference_steps=steps, **call)


def test_plans_last_for_k_steps_of_a_loop(monkeypatch):
    made = count_plans(monkeypatch)
    pipe = tiny.sd(unet=tiny.small_unet())
    for reuse, refreshed in ((1, 7), (2, 4), (3, 3), (99, 1)):
        tomesd.apply_patch(pipe, reuse=reuse)
        made.clear()
        loop(pipe, steps=7)
        assert len(made) == refreshed


def test_a_plan_is_never_that_of_another_loop():
    pipe = tiny.sd(unet=tiny.small_unet())
    tomesd.apply_patch(pipe, reuse=3)
    alone = loop(pipe)

    def interrupt(pipe, step, timestep, kwargs):
        if step == 3:
            raise KeyboardInterrupt
        return kwargs

    with pytest.raises(KeyboardInterrupt):
        loop(pipe, "a dog", callback_on_step_end=interrupt)
    assert torch.equal(loop(pipe), alone)
    loop(pipe, ["a cat", "two"], height=64)
    loop(pipe, steps=4)
    assert torch.equal(loop(pipe), alone)
    twin = copy.deepcopy(pipe.unet)
    pipe.unet = twin
    assert torch.equal(loop(pipe), alone)


def test_a_manual_loop_that_runs_again_plans_again():
    unet = tiny.small_unet()
    tomesd.apply_patch(unet, reuse=10)
    x, text = tiny.inputs(16, 16, 2)
    timesteps = torch.arange(900, 0, -100)

    def run(x, steps):
        for t in steps:
            x = x - 0.1 * unet(x, t, text).sample
        return x

    alone = run(x, timesteps)
    run(-x, timesteps[:4])  # interrupted
    assert torch.equal(run(x, timesteps), alone)
    fresh = run(x, timesteps.clone()[3:])  # begins in the middle, as img2img does
    run(-x, timesteps.clone()[:3])  # ends where the next one begins, in another tensor
    assert torch.equal(run(x, timesteps.clone()[3:]), fresh)


def test_images_in_lockstep_and_networks_called_twice_plan_for_themselves():
    unet = tiny.small_unet()
    x, text = tiny.inputs(16, 16, 2)
    text = text[:1]
    timesteps = torch.arange(900, 0, -100)
    tomesd.apply_patch(unet, reuse=1)
    want = [unet(image, t, text).sample for t in timesteps for image in (x[:1], x[1:])]
    tomesd.apply_patch(unet, reuse=3)
    got = [unet(image, t, text).sample for t in timesteps for image in (x[:1], x[1:])]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_steps_left_out_and_texts_that_are_gone_plan_anew(monkeypatch):
    made = count_plans(monkeypatch)
    unet = tiny.small_unet()
    tomesd.apply_patch(unet, reuse=100)
    x, text = tiny.inputs(16, 16, 2)
    timesteps = torch.arange(900, 0, -100)
    for t in (timesteps[0], timesteps[1], timesteps[3], timesteps[4]):
        unet(x, t, text)
    assert len(made) == 2
    unet(x, timesteps[5], text.clone())
    unet(x, timesteps[6], text.clone())
    assert len(made) == 4
    assert len(unet._tomesd.memory.halves) <= 2


def test_reuse_inside_of_torch_func():
    unet = tiny.small_unet()
    x, text = tiny.inputs(16, 16, 2)
    timesteps = torch.arange(900, 0, -100)
    tomesd.apply_patch(unet, reuse=3)
    grad = torch.func.grad(lambda x: unet(x, timesteps[0], text).sample.square().mean())(x)
    assert torch.isfinite(grad).all()


def test_guidance_halves_apart_have_the_plans_of_halves_together():
    unet = tiny.small_unet()
    tomesd.apply_patch(unet, reuse=3)
    x, text = tiny.inputs(16, 16, 2)
    timesteps = torch.arange(900, 0, -150)
    halves = text[:1].clone(), text[1:].clone()
    for t in timesteps:
        together = unet(x, t, text).sample
        apart = [unet(x[i : i + 1], t, half).sample for i, half in enumerate(halves)]
        torch.testing.assert_close(torch.cat(apart), together, atol=1e-5, rtol=1e-4)
        x = x - 0.1 * together


def test_a_plan_for_another_size_is_not_used():
    unet = tiny.small_unet()
    x, text = tiny.inputs(16, 16, 2)
    timesteps = torch.arange(900, 0, -150)
    for reuse in (1, 4):
        tomesd.apply_patch(unet, reuse=reuse)
        unet(x, timesteps[0], text)
        small = [unet(x[..., :8], timesteps[1], text).sample, unet(x[:, :, :8], timesteps[2], text).sample]
        if reuse == 1:
            want = small
    assert all(torch.equal(a, b) for a, b in zip(small, want, strict=True))


@pytest.mark.parametrize("options", [{}, {"reuse": 2}, {"merge_stage": True}])
def test_pipelines_in_threads_of_their_own(options):
    pipes = [tiny.sd(unet=tiny.small_unet()) for _ in range(3)]
    for i, pipe in enumerate(pipes):
        tomesd.apply_patch(pipe, (0.25, 0.5, 0.75)[i], **options)
    alone = [loop(pipe) for pipe in pipes]
    assert not torch.equal(alone[0], alone[1])
    together = [None] * 3

    def draw(i):
        together[i] = loop(pipes[i])

    threads = [threading.Thread(target=draw, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_img2img_and_controlnet_loops_reuse():
    from PIL import Image

    picture = Image.new("RGB", (128, 128), "teal")
    pipe = tiny.sd(D.StableDiffusionImg2ImgPipeline, unet=tiny.small_unet())
    tomesd.apply_patch(pipe, reuse=2)
    first = loop(pipe, image=picture, strength=0.6)
    assert torch.equal(loop(pipe, image=picture, strength=0.6), first)
    pipe = tiny.sd(D.StableDiffusionControlNetPipeline, unet=tiny.unet(), controlnet=tiny.controlnet())
    tomesd.apply_patch(pipe, reuse=2)
    first = loop(pipe, image=picture, steps=3)
    assert torch.equal(loop(pipe, image=picture, steps=3), first)


# Merging only where it pays


def test_auto_leaves_alone_what_would_be_slower_and_explain_says_so(monkeypatch):
    unet = tiny.unet()
    call = tiny.CASES["sd"]
    plain = call(unet)
    tomesd.apply_patch(unet, max_downsample=8)
    merged = call(unet)
    asked = []

    def slower_below(tokens):
        def trial(work, grid, *rest):
            asked.append((work, grid, *rest))
            return worth.Trial(plain=1.0, merged=2.0 if grid.h * grid.w < tokens else 0.5)

        return trial

    tomesd.apply_patch(unet, max_downsample=8, auto=True)
    for tokens, want in ((0, merged), (9999, plain)):
        monkeypatch.setattr(worth, "trial", slower_below(tokens))
        assert torch.equal(call(unet), want)
    assert {(q[1].h, *q[2:5]) for q in asked} == {(side, 0.5, "windowed", 2) for side in (16, 8, 4, 2)}
    monkeypatch.setattr(worth, "trial", slower_below(100))
    some = call(unet)
    assert not torch.equal(some, merged)
    assert not torch.equal(some, plain)
    reasons = {row.before: row.left_alone for row in tomesd.explain(unet, 128).rows}
    assert reasons[256] is None
    assert reasons[64] == "merging does not pay: measured 2e+03 ms with merging, 1e+03 ms without"


@pytest.mark.parametrize(
    "options", [{}, {"merge_mlp": True}, {"merge_stage": True}, {"matching": "exact"}, {"keys_only": True}]
)
def test_auto_really_measures(options):
    unet = tiny.small_unet()
    tomesd.apply_patch(unet, auto=True, **options)
    # For 16 tokens of 16 channels matching takes many times what there is to save.
    assert "merging does not pay: measured" in tomesd.explain(unet, 32).rows[0].left_alone
    plain = tiny.CASES["sd"](tomesd.remove_patch(copy.deepcopy(unet)), 4, 4)
    assert torch.equal(tiny.CASES["sd"](unet, 4, 4), plain)


def test_auto_measures_whatever_looks_on():
    """Fake tensors, counters of operations and the like see nothing of it, and do not spoil it."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    unet = tiny.small_unet()
    x, text = tiny.inputs(16, 16, 2)
    tomesd.apply_patch(unet, 0.6, auto=True)
    with FlopCounterMode(display=False) as counter:
        unet(x, 5, text)
    measured = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        unet(x, 5, text)
    assert counter.get_total_flops() == measured
    work = worth.Work((("merged", 64, 64),) * 4, (("merged", "merged", 1, 64),), merges=1)
    kind = tomesd.partition.Grid(64, 64), 0.74, "windowed", 1, torch.float32, torch.device("cpu")
    with FakeTensorMode():
        faked = worth.trial(work, *kind)
    assert faked.pays
    assert worth.trial(work, *kind) is faked
    unet.to("meta")
    assert unet(x.to("meta"), 5, text.to("meta")).sample.shape == x.shape


def test_attention_of_other_makes_is_merged_and_not_measured():
    class Other(torch.nn.Module):
        def forward(self, x, **kwargs):
            return x.flip(-1)

    unet = tiny.small_unet()
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    block.attn1 = Other()
    call = tiny.CASES["sd"]
    for auto in (False, True):
        tomesd.apply_patch(unet, auto=auto)
        assert torch.isfinite(call(unet)).all()
    assert tomesd.explain(unet, 128).rows[0].left_alone is None
    assert worth.pays(worth.Work((), (), 1), unet._tomesd.config, 4, 4, 1, torch.float32, torch.device("cpu"))


def test_only_what_outweighs_matching_is_not_measured(monkeypatch):
    asked = []
    monkeypatch.setattr(worth, "trial", lambda *args: asked.append(args) or worth.Trial(1, 2))
    itself = worth.Work((("merged", 8, 8),), (("merged", "merged", 1, 8),), 1)
    crossing = worth.Work((("merged", 8, 8),), (("merged", 77, 1, 8),), 1)
    kind = 2, torch.float32, torch.device("cpu")
    config = tomesd.config.MergeConfig
    assert worth.pays(itself, config(), 128, 128, *kind)
    assert not asked
    for work, options in ((crossing, {}), (itself, {"matching": "exact"}), (itself, {"ratio": 0.1})):
        assert not worth.pays(work, config(**options), 128, 128, *kind)
    assert len(asked) == 3


def test_auto_merges_where_attention_outweighs_matching():
    work = worth.Work((("merged", 64, 64),) * 4, (("merged", "merged", 1, 64),), merges=1)
    grid = tomesd.partition.Grid(64, 64)
    trial = worth.trial(work, grid, 0.75, "windowed", 1, torch.float32, torch.device("cpu"))
    assert trial.pays
    assert 0 < trial.merged < trial.plain


def test_auto_compiles_to_the_answer_for_each_size(monkeypatch):
    torch.compiler.reset()
    unet = tiny.small_unet()
    call = tiny.CASES["sd"]
    tomesd.apply_patch(unet, auto=True)
    answer = lambda work, grid, *rest: worth.Trial(1.0, 2.0 if grid.h * grid.w < 100 else 0.5)  # noqa: E731
    monkeypatch.setattr(worth, "trial", answer)
    sizes = ((16, 16), (8, 8), (16, 24), (16, 16))
    want = [call(unet, *size) for size in sizes]
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    for size, expected in zip(sizes, want, strict=True):
        torch.testing.assert_close(call(compiled, *size), expected)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"reuse": -1}, ValueError, "reuse must be at least 0, the number of steps a plan lasts, got -1"),
        ({"reuse": True}, TypeError, r"reuse must be an integer, got True \(bool\)"),
        ({"merge_stage": 1}, TypeError, r"merge_stage must be a bool, got 1 \(int\)"),
        ({"keys_only": None}, TypeError, r"keys_only must be a bool, got None \(NoneType\)"),
        ({"auto": "yes"}, TypeError, r"auto must be a bool, got 'yes' \(str\)"),
    ],
)
def test_bad_options_are_named(options, error, says):
    with pytest.raises(error, match=says):
        tomesd.apply_patch(tiny.small_unet(), **options)
