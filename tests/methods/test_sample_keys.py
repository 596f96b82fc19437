"""SampleKeys: all queries, and a random sample of the keys."""

import diffusers as D
import pytest
import tiny
import torch

import tomesd

pytestmark = pytest.mark.usefixtures("no_grad")


def test_it_is_attention_of_all_tokens_to_a_sample():
    unet = tiny.small_unet()
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    seen = []
    tomesd.apply_patch(unet, tomesd.SampleKeys(0.5))
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


def test_it_stays_nearer_than_merging():
    """At the same number of products of queries and keys."""
    pipe = D.StableDiffusionPipeline.from_pretrained("examples/emoji-model", safety_checker=None)
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
    pipe.fuse_qkv_projections(vae=False)
    tomesd.apply_patch(pipe, tomesd.SampleKeys())
    with pytest.raises(ValueError, match=r"call unfuse_qkv_projections\(\) first"):
        tiny.generate(pipe)
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
