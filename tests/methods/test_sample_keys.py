"""SampleKeys: all queries, and a random sample of the keys."""

import diffusers as D
import pytest
import tiny
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

import tomesd
from tomesd.hosts.image import Image, Step

pytestmark = pytest.mark.usefixtures("no_grad")


def test_it_is_attention_of_all_tokens_to_a_sample():
    unet = tiny.small_unet()
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    seen = []
    tomesd.apply_patch(unet, tomesd.SampleKeys(0.5, probes=0))
    attn.register_forward_hook(lambda m, args, y: seen.append((args[0], y)))
    with tomesd.trace(unet) as plans:
        tiny.CASES["sd"](unet, 6, 10, b=1)
    ((x, y),) = seen
    keep = plans[0].map.keep
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
    for method, moves in ((tomesd.SampleKeys(0.5), True), (tomesd.SampleKeys(0.5, seed=None), False)):
        tomesd.apply_patch(unet, method)
        samples = []
        for t in (5, 5, 6):
            with tomesd.trace(unet) as plans:
                tiny.CASES["sd"](unet, 16, 16, t=t)
            by_size = {plan.map.tokens: plan.map.keep for plan in plans}
            assert all(torch.equal(plan.map.keep, by_size[plan.map.tokens]) for plan in plans)
            samples.append(by_size[256])
        assert torch.equal(samples[0], samples[1])
        assert torch.equal(samples[0], samples[2]) != moves


def test_steps_of_a_loop_draw_each_token_once_before_any_twice():
    unet = tiny.small_unet()
    table = torch.linspace(900, 100, 9)
    for replacement, others in ((False, 256), (True, 0)):
        tomesd.apply_patch(unet, tomesd.SampleKeys(0.5, replacement=replacement))
        with tomesd.trace(unet) as plans:
            for t in (*table, *(t.clone() for t in table)):
                tiny.CASES["sd"](unet, 16, 16, t=t)
        kept = [plan.map.keep[0] for plan in plans if plan.map.tokens == 256][::3]
        for i in range(0, 6):
            assert len(torch.cat(kept[i : i + 4]).unique()) >= others
        assert not torch.equal(kept[0], kept[4]) or not replacement
        # A timestep that is no part of a table is of no known number: samples are drawn anew.
        assert len(torch.cat(kept[9:13]).unique()) < 256


def test_the_number_of_a_step_is_read_where_there_is_one():
    table = torch.arange(12.0).view(3, 4)
    assert [Step.at(t).number for t in table[1]] == [4, 5, 6, 7]
    assert Step.at(table[2, 1].expand(3)).number == 9
    for t in (
        table[0, 3][None],
        table[0][3:4],
        torch.tensor(5),
        torch.tensor([5]),
        torch.tensor([5, 5]),
        table[0],
        5,
        5.0,
        None,
    ):
        assert Step.at(t).number is None
    scheduler = D.EulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    assert [Step.at(t).number for t in scheduler.timesteps] == [0, 1, 2, 3, 4]
    assert [Step.at(t).number for t in scheduler.timesteps[2:]] == [2, 3, 4]


@pytest.mark.parametrize("method", [tomesd.SampleKeys, tomesd.MergeKeys])
def test_probes_teach_where_attention_is_known_to_do_nothing_else(method):
    unet, case = tiny.small_unet(), tiny.CASES["sd"]
    plain = case(unet)
    errors = {}
    for probes in (0, 8, 128):
        tomesd.apply_patch(unet, method(0.5, probes=probes))
        errors[probes] = (case(unet) - plain).norm()
    assert errors[128] < 0.8 * errors[8] < 0.8 * errors[0]

    class Odd(AttnProcessor2_0):
        pass

    unet.set_attn_processor(Odd())
    outputs = []
    for probes in (0, 128):
        if method is tomesd.MergeKeys:
            with pytest.raises(ValueError, match=r"processor Odd, .* which MergeKeys needs"):
                tomesd.apply_patch(unet, method(0.5, probes=probes))
        else:
            outputs.append(case(tomesd.apply_patch(unet, method(0.5, probes=probes))))
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_probes_are_other_tokens_in_each_step_and_no_hook_of_others_sees_them():
    unet, case = tiny.small_unet(), tiny.CASES["sd"]
    method = tomesd.SampleKeys(0.5)
    tomesd.apply_patch(unet, method)
    calls = []
    for block in (m for m in unet.modules() if hasattr(m, "attn1")):
        block.attn1.register_forward_hook(
            lambda m, args, kwargs, output: calls.append(output), with_kwargs=True
        )
    case(unet)
    assert len(calls) == sum(hasattr(m, "attn1") for m in unet.modules())
    drawn = [method.probes_of(Image(16, 16, timestep)) for timestep in (900.0, 800.0)]
    assert not torch.equal(*drawn)
    assert all(len(set(each[0].tolist())) == 16 for each in drawn)  # a sixteenth of all


def test_it_stays_nearer_than_merging():
    """At the same number of products of queries and keys."""
    pipe = D.StableDiffusionPipeline.from_pretrained("tomesd/emoji-model", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    call = dict(num_inference_steps=3, guidance_scale=3.0, output_type="latent")
    draw = lambda: pipe("red apple", generator=torch.Generator().manual_seed(0), **call).images  # noqa: E731
    plain = draw()
    tomesd.apply_patch(pipe, 0.5)
    all_merged = draw()
    tomesd.apply_patch(pipe, tomesd.SampleKeys(0.5))
    keys_merged = draw()
    assert 0 < (keys_merged - plain).norm() < 0.9 * (all_merged - plain).norm()


def test_what_it_cannot_do_is_said():
    pipe = tiny.sd()
    tomesd.apply_patch(pipe, tomesd.SampleKeys())
    pipe.fuse_qkv_projections(vae=False)
    for verb in (tiny.generate, lambda pipe: tomesd.apply_patch(pipe, tomesd.SampleKeys())):
        with pytest.raises(ValueError, match=r"call unfuse_qkv_projections\(\) first"):
            verb(pipe)
    pipe.unfuse_qkv_projections(vae=False)
    assert torch.isfinite(tiny.generate(pipe)).all()
    unet = tiny.small_unet(only_cross_attention=True)
    tomesd.apply_patch(unet, tomesd.SampleKeys())  # the middle of the network has self-attention all the same
    reasons = [row.left_alone for row in tomesd.explain(unet).rows]
    text = "has the keys of the text in its self-attention"
    assert set(reasons) == {None, text}
    for module in unet.modules():
        if hasattr(module, "attn1"):
            module.attn1.is_cross_attention = True
    with pytest.raises(ValueError, match=f"each of its transformer blocks {text}"):
        tomesd.apply_patch(unet, tomesd.SampleKeys())
