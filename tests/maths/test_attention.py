"""Proportional attention in both its forms."""

import math

import pytest
import torch
import torch.nn.functional as F

import tomesd.vit as tome
from tomesd.maths.attention import KeyBias, biased_attention, key_bias, merge_mask
from tomesd.maths.token_map import TokenMap


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_both_forms_of_proportional_attention_are_equal(dtype, scale):
    q, k, v = torch.randn(3, 2, 4, 33, 12, dtype=torch.float64)
    q = q[:, :, :20]
    size = torch.randint(1, 300, (2, 33))
    repeated = [
        torch.cat([x[b : b + 1].repeat_interleave(size[b], dim=2) for x in (k, v)], dim=-1).split(12, dim=-1)
        for b in range(2)
    ]
    want = torch.cat(
        [F.scaled_dot_product_attention(q[b : b + 1], *repeated[b], scale=scale) for b in range(2)]
    )
    q, k, v = (x.to(dtype) for x in (q, k, v))
    bias = key_bias(size, dtype)
    masked = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    by_channels = biased_attention(q, k, v, bias, scale=scale)
    tolerance = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.1, atol=0.05)
    torch.testing.assert_close(masked.double(), want, **tolerance)
    torch.testing.assert_close(by_channels.double(), want, **tolerance)
    # What the attention of a host does with the mask that it was given on CUDA.
    subclass = bias.as_subclass(KeyBias)
    assert torch.equal(F.scaled_dot_product_attention(q, k, v, attn_mask=subclass, scale=scale), by_channels)
    assert torch.equal(F.scaled_dot_product_attention(q, k, v, subclass, scale=scale), by_channels)
    logits = q @ k.mT + subclass
    assert type(logits) is torch.Tensor
    assert torch.equal(logits, q @ k.mT + bias)
    assert type(subclass.expand(2, 4, 1, 33).reshape(8, 1, 33)) is KeyBias


def test_the_form_without_a_mask_is_what_a_host_gets(monkeypatch):
    import tiny_vit

    from tomesd.methods import layers

    for name in ("timm ViT", "timm EVA02", "torchvision", "transformers DINOv2"):
        case = tiny_vit.CASES[name]
        model = tome.apply_patch(case.build())
        model.r = [7, 0, 9, 40]
        with torch.no_grad():
            want = case(model)
            with monkeypatch.context() as m:
                m.setattr(layers, "key_bias", lambda size, dtype: key_bias(size, dtype).as_subclass(KeyBias))
                got = case(model)
                assert type(got) is torch.Tensor
                torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
                compiled = torch.compile(model, backend="eager", fullgraph=True)
                torch.testing.assert_close(case(compiled), got)


def test_masks_of_merged_keys_are_what_their_tokens_count_together():
    token_map = TokenMap.from_index(torch.tensor([[0, 0, 1, 2, 2, 2, 3]]), 4)
    mask = torch.tensor([[0, -1e4, -0.5, -1e4, float("-inf"), -2e4, float("-inf")]])
    weights = merge_mask(token_map, mask, "sum").exp()
    torch.testing.assert_close(weights, torch.tensor([[1, math.exp(-0.5), 0, 0]]))
    free = merge_mask(token_map, torch.zeros(1, 7), "sum")
    torch.testing.assert_close(free, key_bias(token_map.sizes, torch.float32)[:, 0, 0])
    assert (merge_mask(token_map, torch.zeros(1, 7), "mean") == 0).all()
