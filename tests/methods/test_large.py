"""Sizes at which 32-bit numbers could overflow: 7680 x 4320 pixels are 518,400 tokens."""

import pytest
import torch

import tomesd
from tomesd.hosts.image import Image


@pytest.mark.parametrize("method", [tomesd.Merge(0.6), tomesd.SampleKeys(0.75)], ids=str)
def test_maps_are_right_at_8k(method):
    h, w = 540, 960
    x = torch.randn(1, h * w, 2)
    token_map = method.plan(x, Image(h, w, torch.tensor(500.0)))
    groups = token_map.groups
    assert groups == method.left(h, w)
    index, keep = token_map.index[0], token_map.keep[0]
    assert torch.equal(index[keep], torch.arange(groups))
    sizes = torch.bincount(index, minlength=groups)
    assert torch.equal(token_map.sizes[0], sizes)
    wanted = torch.zeros(groups, 2).index_add(0, index, x[0]) / sizes[:, None]
    torch.testing.assert_close(token_map.merge(x)[0], wanted)
    near = keep[index].view(h, w) // w - torch.arange(h)[:, None]
    assert near.abs().max() < 32  # the last rows as the first: groups do not reach across the image
