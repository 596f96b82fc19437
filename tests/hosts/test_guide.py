"""CONTRIBUTING.md's guide to a new family: its row, as it stands there, on a network that it describes."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tomesd
from tomesd.hosts import family, unets

pytestmark = pytest.mark.usefixtures("no_grad")
GUIDE = Path(__file__).parents[2] / "CONTRIBUTING.md"
WIDTH = 16


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.heads = 2

    def forward(self, x, keys_from=None, bias=None):
        source = x if keys_from is None else keys_from
        q, k, v = (
            layer(tokens).unflatten(2, (2, -1)).transpose(1, 2)
            for layer, tokens in ((self.to_q, x), (self.to_k, source), (self.to_v, source))
        )
        mask = None if bias is None else bias[:, None]
        return self.to_out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class AcmeBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention, self.cross = Attention(), Attention()
        self.feed = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())

    def forward(self, x, prompt):
        x = x + self.attention(self.norm(x))
        x = x + self.cross(x, prompt)
        return x + self.feed(x)


class AcmeTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([AcmeBlock(), AcmeBlock()])

    def forward(self, image, prompt):
        tokens = image.flatten(2).mT
        for block in self.blocks:
            tokens = block(tokens, prompt)
        return image + tokens.mT.unflatten(2, image.shape[2:])


class AcmeDownsample(nn.Module):
    def forward(self, image):
        return F.avg_pool2d(image, 2)


class AcmeUpsample(nn.Module):
    def forward(self, image):
        return F.interpolate(image, scale_factor=2)


class AcmeUNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([nn.ModuleList([AcmeTransformer(), AcmeDownsample()])])
        self.middle = AcmeTransformer()
        self.up = nn.ModuleList([nn.ModuleList([AcmeUpsample()]), nn.ModuleList([AcmeTransformer()])])

    def forward(self, latent, t, prompt):
        (transformer, downsample), (upsample,), (last,) = self.down[0], self.up[0], self.up[1]
        image = self.middle(downsample(transformer(latent, prompt)) + t / 1000, prompt)
        return last(upsample(image), prompt)


@pytest.fixture
def acme(monkeypatch):
    (text,) = re.findall(r"```python\n(ImageFamily\(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    row = eval(text, {**vars(family), **vars(unets)})
    monkeypatch.setattr(unets, "FAMILIES", (*unets.FAMILIES, row))
    torch.manual_seed(0)
    return AcmeUNet().eval()


def call(model, h=8, w=12, t=500.0):
    generator = torch.Generator().manual_seed(0)
    latent, prompt = (torch.randn(2, *shape, generator=generator) for shape in ((WIDTH, h, w), (5, WIDTH)))
    return model(latent, torch.tensor(t), prompt)


METHODS = [
    tomesd.Merge(0.5, parts=("attn", "cross", "mlp"), prop_attn=True),
    tomesd.SampleKeys(0.5),
    tomesd.MergeStage(0.5, prop_attn=True),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_row_of_the_guide_is_all_that_a_family_takes(acme, method):
    plain = call(acme)
    levels = [row.downsample for row in tomesd.explain(acme).rows]
    assert levels == [1, 1, 2, 2, 1, 1]
    tomesd.apply_patch(acme, method, max_downsample=2)
    with tomesd.trace(acme) as plans:
        assert not torch.equal(call(acme), plain)
    assert {(plan.h, plan.w, plan.timestep) for plan in plans} == {(8, 12, 500.0), (4, 6, 500.0)}
    assert not torch.equal(call(acme, t=400.0), call(acme))
    tomesd.remove_patch(acme)
    assert torch.equal(call(acme), plain)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_ratio_of_0_is_plain(acme, method):
    plain = call(acme)
    tomesd.apply_patch(acme, type(method)(0), max_downsample=2)
    assert torch.equal(call(acme), plain)
