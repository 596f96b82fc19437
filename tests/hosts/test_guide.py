"""CONTRIBUTING.md's guides to new families and methods: their code, as it stands there."""

import re
from dataclasses import replace
from functools import wraps
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

import tomesd
import tomesd.vit as tome
from tomesd.hosts import family, unets, vits
from tomesd.methods import merge, sample_keys
from tomesd.methods.cost import TEXT_TOKENS

pytestmark = pytest.mark.usefixtures("no_grad")
GUIDE = Path(__file__).parents[2] / "CONTRIBUTING.md"
WIDTH = 16


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.n_heads = 2

    def forward(self, x, keys_from=None, bias=None):
        source = x if keys_from is None else keys_from
        q, k, v = (
            layer(tokens).unflatten(2, (2, -1)).transpose(1, 2)
            for layer, tokens in ((self.query, x), (self.key, source), (self.value, source))
        )
        mask = bias[:, None] if bias is not None and bias.dim() == 3 else bias
        return self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


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


def code(start):
    """The block of code in the guide that holds something."""
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    (found,) = (block for block in blocks if start in block)
    return found


@pytest.fixture
def acme(monkeypatch):
    names = {**vars(family), **vars(unets)}
    exec(code("ImageFamily"), names)
    monkeypatch.setattr(unets, "FAMILIES", (*unets.FAMILIES, names["ACME"]))
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
    rows = tomesd.explain(acme, 64, 96).rows
    assert [row.downsample for row in rows] == [1, 1, 2, 2, 1, 1]
    linears, products = 9 * 2 * 96 * WIDTH**2, 4 * 96 * (96 + TEXT_TOKENS) * WIDTH
    assert rows[0].flops == linears - 2 * 2 * (96 - TEXT_TOKENS) * WIDTH**2 + products
    tomesd.apply_patch(acme, method, max_downsample=2)
    with tomesd.trace(acme) as plans:
        assert not torch.equal(call(acme), plain)
    assert {(plan.h, plan.w, plan.timestep) for plan in plans} == {(8, 12, 500.0), (4, 6, 500.0)}
    assert not torch.equal(call(acme, t=400.0), call(acme))
    tomesd.remove_patch(acme)
    assert torch.equal(call(acme), plain)


def test_the_method_of_the_guide_is_all_that_a_method_takes():
    names = {**vars(sample_keys), **vars(merge)}
    exec(code("class Forget"), names)
    method = names["Forget"]
    try:
        for name in ("sd", "svd", "ldm"):
            case = tiny.CASES[name]
            model = case.build()
            plain = case(model)
            tomesd.apply_patch(model, method(0))
            assert torch.equal(case(model), plain)
            tomesd.apply_patch(model, method(0.5), auto=True)
            case(model)
            tomesd.apply_patch(model, method(0.5))
            assert not torch.equal(case(model), plain)
            assert "Forget(0.5)" in str(tomesd.explain(model))
            tomesd.remove_patch(model)
            assert torch.equal(case(model), plain)
        assert tomesd.Method.from_dict(method(0.25).to_dict()) == method(0.25)
    finally:
        del tomesd.Method.known["Forget"]


class AcmeLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.feed = Attention(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.feed(self.norm_2(x))


class AcmeViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([AcmeLayer(), AcmeLayer()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_the_vision_transformer_of_the_guide(monkeypatch):
    row = eval(code("VisionFamily"), {**vars(family), **vars(vits)})
    monkeypatch.setattr(vits, "FAMILIES", (*vits.FAMILIES, row))
    torch.manual_seed(0)
    model, x = AcmeViT().eval(), torch.randn(2, 65, WIDTH)
    plain = model(x)
    tome.apply_patch(model, trace_source=True)
    assert torch.equal(model(x), plain)
    model.r = 8
    assert not torch.equal(model(x), plain)
    assert tome.source(model).groups == 65 - 16
    with pytest.raises(
        ValueError, match=r"keys of layers\.0\.attention cannot be seen: Attention has no layer of keys"
    ):
        tome.apply_patch(model, metric="keys")
    assert torch.equal(tome.remove_patch(model)(x), plain)
    with pytest.raises(ValueError, match="the row of AcmeLayer in Acme ViT lacks middle"):
        replace(row, blocks={"AcmeLayer": replace(row.blocks["AcmeLayer"], middle=None)})


def return_more(monkeypatch):
    """Has attention return a tuple."""
    attend = Attention.forward

    def forward(self, x, prompt):
        x = x + self.attention(self.norm(x))[0]
        x = x + self.cross(x, prompt)[0]
        return x + self.feed(x)

    monkeypatch.setattr(
        Attention, "forward", wraps(attend)(lambda *given, **named: (attend(*given, **named), 0))
    )
    monkeypatch.setattr(AcmeBlock, "forward", forward)


@pytest.mark.parametrize("method", [*METHODS, tomesd.MergeKeys(0.5)], ids=str)
def test_attention_may_return_a_tuple(acme, method, monkeypatch):
    merged = call(tomesd.apply_patch(acme, method))
    return_more(monkeypatch)
    (*_, row) = unets.FAMILIES
    block = row.blocks["AcmeBlock"]
    block = replace(block, attn=replace(block.attn, output=0), cross=replace(block.cross, output=0))
    monkeypatch.setattr(unets, "FAMILIES", (replace(row, blocks={"AcmeBlock": block}),))
    assert torch.equal(call(tomesd.apply_patch(acme, method)), merged)


@pytest.mark.parametrize("method", [tomesd.Merge(0.5), tomesd.SampleKeys(0.5)], ids=str)
def test_a_part_that_does_not_return_tokens_is_named(acme, method, monkeypatch):
    return_more(monkeypatch)
    tomesd.apply_patch(acme, method)
    with pytest.raises(TypeError, match=r"attention gave a tuple, no tokens: its Part says output=None"):
        call(acme)


def test_a_row_that_names_no_class_that_halves_the_image_is_refused(acme, monkeypatch):
    monkeypatch.setattr(unets, "FAMILIES", (replace(unets.FAMILIES[-1], down=("Downsample",)),))
    with pytest.raises(ValueError, match=r"larger than its input after up\.0: `down` and `up` of its row"):
        tomesd.apply_patch(acme)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_ratio_of_0_is_plain(acme, method):
    plain = call(acme)
    tomesd.apply_patch(acme, type(method)(0), max_downsample=2)
    assert torch.equal(call(acme), plain)
