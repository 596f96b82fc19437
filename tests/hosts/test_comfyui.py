"""The node of ComfyUI, on a stand-in of what ComfyUI does in a block: a UNet and a patcher of a few lines."""

import copy
import runpy
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tomesd
from tomesd import Merge, MergeKeys, Recipe, SampleKeys
from tomesd.tools import comfyui
from tomesd.tools.patcher import Patches, patch

WIDTH = 16


class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = 2
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(WIDTH, WIDTH))

    def forward(self, x, context=None, value=None, transformer_options=None):
        context = x if context is None else context
        value = context if value is None else value
        given = self.to_q(x), self.to_k(context), self.to_v(value)
        other = (transformer_options or {}).get("optimized_attention_override")
        attend = attention if other is None else lambda *args: other(attention, *args)
        return self.to_out(attend(*given, self.heads))


def attention(q, k, v, heads):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class BasicTransformerBlock(nn.Module):
    def __init__(self):
        super().__init__()
        # The node plans from what comes after it, apply_patch from what comes before.
        self.norm1 = nn.Identity()
        self.attn1 = CrossAttention()

    def forward(self, x, transformer_options=None):
        options = dict(transformer_options or {})
        patches, replaced = options.pop("patches", {}), options.pop("patches_replace", {})
        n, k, v = self.norm1(x), None, None
        for enter in patches.get("attn1_patch", []):
            k, v = (n, n) if k is None else (k, v)
            n, k, v = enter(n, k, v, options)
        if replaced:
            k, v = (n, n) if k is None else (k, v)
            n = self.attn1.to_out(replaced["attn1"](self.attn1.to_q(n), None, self.attn1.to_v(v), options))
        else:
            n = self.attn1(n, context=k, value=v, transformer_options=transformer_options)
        for leave in patches.get("attn1_output_patch", []):
            n = leave(n, options)
        return x + n


class SpatialTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock() for _ in range(2)])

    def forward(self, x, transformer_options=None):
        options = {} if transformer_options is None else transformer_options
        options["activations_shape"] = list(x.shape)
        tokens = x.flatten(2).mT
        for i, block in enumerate(self.transformer_blocks):
            options["block_index"] = i
            tokens = block(tokens, options)
        return tokens.mT.unflatten(2, x.shape[-2:])


class Downsample(nn.AvgPool2d):
    pass


class Upsample(nn.Module):
    def forward(self, x):
        return F.interpolate(x, scale_factor=2.0)


def stage(*extra):
    return nn.Sequential(nn.Identity(), SpatialTransformer(), *extra)


class UNetModel(nn.Module):
    """Two levels, one residual block each, in CompVis' layout. Latents are as wide as its tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.num_res_blocks = [1, 1]
        down = nn.Sequential(Downsample(2))
        self.input_blocks = nn.ModuleList([nn.Sequential(nn.Identity()), stage(), down, stage()])
        self.middle_block = stage()
        self.output_blocks = nn.ModuleList([stage(), stage(Upsample()), stage(), stage()])
        self.requires_grad_(False)

    def forward(self, x, timesteps, transformer_options=None):
        options = {} if transformer_options is None else transformer_options
        options["original_shape"] = list(x.shape)
        named = [(("input", i), module) for i, module in enumerate(self.input_blocks)]
        named += [(("middle", 0), self.middle_block)]
        named += [(("output", i), module) for i, module in enumerate(self.output_blocks)]
        for place, module in named:
            options["block"] = place
            for layer in module:
                x = layer(x, options) if isinstance(layer, SpatialTransformer) else layer(x)
        return x


class Patcher:
    def __init__(self, unet, options=None):
        self.model = types.SimpleNamespace(diffusion_model=unet)
        self.model_options = {"transformer_options": {}} if options is None else options

    def clone(self):
        clone = copy.copy(self)
        clone.model_options = copy.deepcopy(self.model_options)
        return clone

    def add(self, name, function):
        patches = self.model_options["transformer_options"].setdefault("patches", {})
        patches[name] = [*patches.get(name, []), function]

    def set_model_attn1_patch(self, function):
        self.add("attn1_patch", function)

    def set_model_attn1_output_patch(self, function):
        self.add("attn1_output_patch", function)

    def get_model_object(self, name):
        assert name == "model_sampling"
        return types.SimpleNamespace(percent_to_sigma=lambda share: 10.0 - 10 * share)

    def __call__(self, sigmas=5.0, h=8, w=8, b=2, **more):
        x = torch.randn(b, WIDTH, h, w, generator=torch.Generator().manual_seed(0))
        sigmas = sigmas if isinstance(sigmas, torch.Tensor) else torch.full((b,), sigmas)
        options = {**self.model_options["transformer_options"], "sigmas": sigmas, **more}
        return self.model.diffusion_model(x, sigmas, transformer_options=options)


@pytest.fixture
def plain(no_grad):
    return Patcher(UNetModel())


METHODS = [SampleKeys, Merge, MergeKeys]


@pytest.mark.parametrize("method", METHODS)
def test_ratio_0_is_plain_to_the_bit_and_the_network_stays_so(plain, method):
    expected = plain()
    assert torch.equal(patch(plain, method(0.0), 2, weighs=True)(), expected)
    assert not torch.equal(patch(plain, method(0.5), 2, weighs=True)(), expected)
    assert torch.equal(plain(), expected)


@pytest.mark.parametrize("size", [{"h": 8, "w": 8}, {"h": 6, "w": 10}, {"h": 8, "w": 8, "b": 1}])
@pytest.mark.parametrize(
    "method",
    [
        SampleKeys(0.5, probes=0),
        SampleKeys(0.7, seed=3),
        Merge(0.5, prop_attn=False),
        Merge(0.6, ("attn",), 3, 2, None, "exact", False, "copy"),
    ],
)
def test_it_draws_what_apply_patch_draws(plain, method, size):
    got = patch(plain, method, 2, weighs=True)(**size)
    with tomesd.patched(plain.model.diffusion_model, method, max_downsample=2):
        expected = plain(**size)
    torch.testing.assert_close(got, expected)
    assert not torch.allclose(got, plain(**size))


def test_sampled_keys_are_slices_of_all_to_the_bit(plain):
    sampled = patch(plain, SampleKeys(0.5, probes=0))
    sliced = plain.clone()

    def slices(n, k, v, options):
        if n.shape[1] != 64:
            return n, k, v
        image = tomesd.hosts.image.Image(8, 8, options["sigmas"][:1], n.device)
        keep = SampleKeys(0.5).plan(n, image).keep[0]
        return n, k[:, keep], v[:, keep]

    sliced.set_model_attn1_patch(slices)
    assert torch.equal(sampled(), sliced())


def test_merged_keys_count_as_often_as_they_merged(plain):
    repeats = []

    def spy(attend, q, k, v, heads):
        (bias,) = patches.bias.get()
        sizes = bias.exp().round().long()[0, 0, 0]
        repeats.append(sizes.sum())
        assert sizes.max() > 1
        got = patches.attend(attend, q, k, v, heads)
        of_all = attend(q[:1], *(x[:1].repeat_interleave(sizes, 1) for x in (k, v)), heads)
        torch.testing.assert_close(got[:1], of_all)
        return got

    clone = patch(plain, MergeKeys(0.5), weighs=True)
    patches = clone.model_options["transformer_options"]["optimized_attention_override"].__self__
    out = clone(b=1)
    clone.model_options["transformer_options"]["optimized_attention_override"] = lambda attend, *args: (
        spy(attend, *args) if patches.bias.get() else patches.attend(attend, *args)
    )
    assert torch.equal(clone(b=1), out)
    # Three transformers of two blocks at the finest level, and again for their probes.
    assert repeats == [64] * 12


def test_what_other_nodes_make_of_attention_stays(plain):
    other = plain.clone()
    other.set_model_attn1_output_patch(lambda n, options: n + 3)
    want = other()
    missed = (patch(other, SampleKeys(0.5))() - want).norm()
    assert missed < 0.1 * (want - plain()).norm()


def test_clones_share_nothing_and_two_samplers_may_take_turns(plain):
    first = patch(plain, Merge(0.5), 2, weighs=True)
    second = patch(plain, SampleKeys(0.75, seed=5))
    copied = first.clone()
    expected = [first(), second()]
    assert not torch.allclose(*expected)
    for _ in range(2):
        assert torch.equal(second(), expected[1])
        assert torch.equal(copied(), expected[0])
        assert torch.equal(first(), expected[0])
    owners = [
        {
            function.__self__
            for functions in (*options["patches"].values(), [options["optimized_attention_override"]])
            for function in functions
        }
        for options in (clone.model_options["transformer_options"] for clone in (first, copied))
    ]
    assert [len(one) for one in owners] == [1, 1]
    assert owners[0] != owners[1]
    assert not plain.model_options["transformer_options"]


def test_blocks_share_the_sample_of_a_step_and_steps_share_no_key(plain):
    clone = patch(plain, SampleKeys(0.5))
    keys = []
    clone.set_model_attn1_patch(lambda n, k, v, options: keys.append(k) or (n, k, v))
    schedule = torch.tensor([8.0, 6.0, 4.0, 2.0, 0.0])
    x = torch.arange(64.0).repeat(WIDTH, 1).view(1, WIDTH, 8, 8)
    kept = []
    for sigma in schedule[:4]:
        keys.clear()
        options = dict(clone.model_options["transformer_options"], sample_sigmas=schedule)
        clone.model.diffusion_model(x, sigma, transformer_options={**options, "sigmas": sigma[None]})
        kept.append(keys[0][0, :, 0])  # of the first block, whose tokens are the latent image
    assert torch.equal(torch.cat(kept).sort().values, torch.arange(64.0))

    patches = clone.model_options["transformer_options"]["patches"]["attn1_patch"][0].__self__
    sigmas = torch.tensor([5.0, 5.0])
    clone(sigmas)
    step = patches.step
    clone(sigmas, h=4)
    assert patches.step is step
    assert len(step.images) == 2
    clone(sigmas.clone())
    assert patches.step is not step


@pytest.mark.parametrize("method", METHODS)
def test_conds_apart_draw_what_they_draw_together(plain, method):
    clone = patch(plain, method(0.5), 2, weighs=True)
    sigmas = torch.tensor([5.0, 5.0])  # of two images, whatever number of conds runs at once
    together = clone(sigmas, b=4)
    torch.testing.assert_close(clone(sigmas, b=2), together[:2])


def tiles(n, k, v, options):
    return n.unflatten(1, (2, -1)).flatten(0, 1), *(x.unflatten(1, (2, -1)).flatten(0, 1) for x in (k, v))


def untiles(n, options):
    return n.unflatten(0, (-1, 2)).flatten(1, 2)


def more_keys(n, k, v, options):
    return n, torch.cat([k, k], 1), torch.cat([v, 2 * v], 1)


def doubles(n, k, v, options):
    return tuple(torch.cat([x, x]) for x in (n, k, v))


OTHERS = [(tiles, untiles), (more_keys, lambda n, options: n), (doubles, lambda n, options: n.chunk(2)[0])]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("enter", "leave"), OTHERS)
def test_what_other_nodes_have_tiled_or_added_to_is_left_alone(plain, method, enter, leave):
    other = plain.clone()
    other.set_model_attn1_patch(enter)
    other.set_model_attn1_output_patch(leave)
    assert torch.equal(patch(other, method(0.5), 2, weighs=True)(), other())


@pytest.mark.parametrize("method", METHODS)
def test_keys_and_values_of_other_nodes_are_given_on(plain, method):
    other = plain.clone()
    other.set_model_attn1_patch(lambda n, k, v, options: (n, k, torch.zeros_like(v)))
    clone = patch(other, method(0.5), 2, weighs=True)
    biases = []
    clone.set_model_attn1_output_patch(lambda n, options: biases.append(n) or n)
    clone()
    for given, module in zip(
        biases[:2], plain.model.diffusion_model.input_blocks[1][1].transformer_blocks, strict=True
    ):
        torch.testing.assert_close(given, module.attn1.to_out[0].bias.expand_as(given))


@pytest.mark.parametrize("method", METHODS)
def test_where_a_node_returns_the_values_each_token_has_those_of_its_group(plain, method):
    clone = patch(plain, method(0.5), 2, weighs=True)
    out = clone(patches_replace={"attn1": lambda q, k, v, options: v})
    assert out.shape == plain().shape
    assert not torch.equal(out, plain())
    patches = clone.model_options["transformer_options"]["optimized_attention_override"].__self__
    assert not patches.bias.get()  # which no attention has taken


def test_attention_of_another_node_still_attends(plain):
    other = plain.clone()
    other.model_options["transformer_options"]["optimized_attention_override"] = lambda attend, *args: (
        2 * attend(*args)
    )
    assert not torch.equal(other(), plain())
    assert torch.equal(patch(other, Merge(0.0), weighs=True).clone()(), other())
    out = patch(other, SampleKeys(0.5, probes=0), weighs=True)()
    expected = other.clone()
    expected.set_model_attn1_patch(
        patch(plain, SampleKeys(0.5, probes=0)).model_options["transformer_options"]["patches"][
            "attn1_patch"
        ][0]
    )
    assert torch.equal(out, expected())


def test_steps_outside_of_start_and_end_are_plain(plain, monkeypatch):
    module = types.ModuleType("attention")
    package = types.ModuleType("comfy.ldm.modules")
    package.attention = module
    monkeypatch.setitem(sys.modules, "comfy.ldm.modules", package)
    node = comfyui.TokenMerging()
    clone = node.patch(plain, "Merge", 0.5, "2", 0, 0.3, 0.6)[0]
    for sigma, works in ((8.0, False), (6.0, True), (4.1, True), (3.0, False)):
        assert torch.equal(clone(sigma), plain(sigma)) != works
    with pytest.raises(ValueError, match=r"MergeKeys.* takes none from patches"):
        node.patch(plain, "MergeKeys", 0.5, "finest", 0, 0.0, 1.0)
    module.wrap_attn = None
    assert not torch.equal(node.patch(plain, "MergeKeys", 0.5, "finest", 0, 0.0, 1.0)[0](), plain())
    with pytest.raises(ValueError, match=r"start_percent must be below end_percent, got 0\.5 and 0\.5"):
        node.patch(plain, "Merge", 0.5, "2", 0, 0.5, 0.5)


def test_a_recipe_names_blocks_as_compvis_or_diffusers_do(plain, tmp_path, monkeypatch):
    folders = types.SimpleNamespace(get_input_directory=lambda: str(tmp_path))
    monkeypatch.setitem(sys.modules, "folder_paths", folders)
    package = types.ModuleType("comfy.ldm.modules")
    package.attention = types.SimpleNamespace(wrap_attn=None)
    monkeypatch.setitem(sys.modules, "comfy.ldm.modules", package)
    block = "transformer_blocks.1"
    names = {
        f"input_blocks.1.1.{block}": f"down_blocks.0.attentions.0.{block}",
        f"input_blocks.3.1.{block}": f"down_blocks.1.attentions.0.{block}",
        f"middle_block.1.{block}": f"mid_block.attentions.0.{block}",
        f"output_blocks.1.1.{block}": f"up_blocks.0.attentions.1.{block}",
        f"output_blocks.3.1.{block}": f"up_blocks.1.attentions.1.{block}",
    }
    outs = []
    for name, in_diffusers in names.items():
        for title in (name, f"model.diffusion_model.{name}", f"unet.{in_diffusers}"):
            Recipe({title: SampleKeys(0.75)}).save(tmp_path / "recipe.json")
            outs.append(comfyui.TokenMergingRecipe().patch(plain, "recipe.json", 0.0, 1.0)[0]())
        assert torch.equal(outs[-1], outs[-2])
        assert torch.equal(outs[-1], outs[-3])
    assert len({out.sum().item() for out in outs}) == len(names)
    with pytest.raises(ValueError, match=r"nothing to merge at 'down_blocks\.7"):
        patch(plain, Recipe({"unet.down_blocks.7.attentions.0.transformer_blocks.0": SampleKeys(0.5)}))
    node = comfyui.TokenMergingRecipe
    assert node.IS_CHANGED(plain, "recipe.json") == (tmp_path / "recipe.json").stat().st_mtime
    assert node.IS_CHANGED(plain, "none.json") != node.IS_CHANGED(plain, "none.json")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (tomesd.MergeStage(0.5), "MergeStage.* is not possible here, where tomesd reaches self-attention"),
        (Merge(0.5, ("attn", "mlp")), "parts=.* is not possible here"),
        (Merge(0.5, prop_attn=True), "prop_attn=True.* gives keys weights"),
    ],
)
def test_what_patches_cannot_do_is_said(plain, method, message):
    with pytest.raises(ValueError, match=message):
        patch(plain, method)
    assert not plain.model_options["transformer_options"]


def test_other_networks_are_named(plain):
    with pytest.raises(ValueError, match="Linear has no transformer blocks of a Stable Diffusion UNet"):
        patch(Patcher(nn.Linear(2, 2)), Merge(0.5))


def test_the_folder_to_copy_has_the_nodes_of_the_package():
    copied = runpy.run_path(str(Path(__file__).parents[2] / "examples/comfyui/__init__.py"))
    for name in ("NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"):
        assert copied[name] is getattr(comfyui, name)


def test_inputs_of_nodes_are_parameters_of_their_functions():
    for name, node in comfyui.NODE_CLASS_MAPPINGS.items():
        assert name in comfyui.NODE_DISPLAY_NAME_MAPPINGS
        names = node.patch.__code__.co_varnames[1 : node.patch.__code__.co_argcount]
        assert tuple(node.INPUT_TYPES()["required"]) == names
    assert isinstance(copy.deepcopy(Patches({})), Patches)
