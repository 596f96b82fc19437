"""What merged while a model ran, and pictures of it."""

import copy
import pickle

import diffusers
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import tomesd

LEVEL_1 = [
    "unet.down_blocks.0.attentions.0",
    "unet.up_blocks.3.attentions.0",
    "unet.up_blocks.3.attentions.1",
]


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd()


@pytest.fixture(autouse=True)
def _unpatched(pipe):
    yield
    tomesd.remove_patch(pipe)


def shape(plans):
    """Everything but which tokens merged."""
    return [(p.block, p.downsample, p.step, p.timestep, p.h, p.w, p.map.tokens, p.map.groups) for p in plans]


@pytest.mark.parametrize(
    "method",
    [
        tomesd.Merge(0.25),
        tomesd.MergeStage(0.25),
        tomesd.SampleKeys(0.25),
        tomesd.Merge(0.25, matching="exact"),
    ],
    ids=str,
)
def test_one_plan_for_each_block_and_step(pipe, method):
    tomesd.apply_patch(pipe, method)
    untraced = tiny.generate(pipe, height=64, width=128)
    with tomesd.trace(pipe) as plans:
        assert torch.equal(tiny.generate(pipe, height=64, width=128), untraced)
    times = pipe.scheduler.timesteps.tolist()
    left = 72 if isinstance(method, tomesd.SampleKeys) else 96  # 96 x 96 = 128 x 72
    assert shape(plans) == [
        (f"{name}.transformer_blocks.0", 1, step, time, 8, 16, 128, left)
        for step, time in enumerate(times)
        for name in LEVEL_1
    ]
    for plan in plans:
        assert plan.map.index.shape == (2, 128)  # both guidance halves
        assert plan.map.index.amax() == left - 1
    assert f"step 1, timestep 1: 128 -> {left} of 8 x 16 tokens" in repr(plans[-1])
    first, last = plans[0].map, plans[-1].map
    assert not torch.equal(first.index, last.index)


def test_plans_are_those_that_the_blocks_use(pipe):
    tomesd.apply_patch(pipe, tomesd.MergeStage(0.5), max_downsample=2)
    seen = []
    block = pipe.unet.down_blocks[1].attentions[0].transformer_blocks[0]
    handle = block.register_forward_pre_hook(lambda block, args: seen.append(args[0].shape[1]))
    with tomesd.trace(pipe, steps=[1]) as plans:
        tiny.generate(pipe)
    handle.remove()
    here = [plan for plan in plans if plan.block.startswith("unet.down_blocks.1.")]
    assert seen == [32, 32]
    assert [(p.downsample, p.step, p.h, p.w, p.map.groups) for p in here] == [(2, 1, 8, 8, 32)]
    assert {plan.downsample for plan in plans} == {1, 2}
    assert {plan.step for plan in plans} == {1}


def test_a_stage_of_several_blocks_is_one_plan():
    unet = tiny.sdxl_unet()
    tomesd.apply_patch(unet, tomesd.MergeStage())
    with tomesd.trace(unet) as plans:
        tiny.CASES["sdxl"](unet, h=16, w=17)
    count = sum(type(module).__name__ == "Transformer2DModel" for module in unet.down_blocks[1].modules())
    assert count == len([plan for plan in plans if plan.block.startswith("down_blocks.1.")])
    assert {(plan.h, plan.w, plan.map.tokens) for plan in plans} == {(8, 9, 72)}


def test_compvis_too():
    model = tiny.ldm()
    tomesd.apply_patch(model)
    with tomesd.trace(model) as plans:
        tiny.CASES["ldm"](model, t=7)
    assert plans
    assert {(plan.timestep, plan.step, plan.downsample) for plan in plans} == {(7.0, 0, 1)}


def test_each_network_counts_its_own_calls():
    control = tiny.sd(diffusers.StableDiffusionControlNetPipeline, controlnet=tiny.controlnet())
    tomesd.apply_patch(control)
    with tomesd.trace(control) as plans:
        tiny.generate(control, image=torch.zeros(1, 3, 128, 128))
    steps = {}
    for plan in plans:
        steps.setdefault(plan.block.split(".")[0], []).append(plan.step)
    assert steps == {"controlnet": [0, 1], "unet": [0, 0, 0, 1, 1, 1]}


def test_what_auto_leaves_alone_is_an_identity(pipe, monkeypatch):
    monkeypatch.setattr("tomesd.methods.cost.pays", lambda *question: False)
    tomesd.apply_patch(pipe, auto=True)
    with tomesd.trace(pipe, steps=[0]) as plans:
        tiny.generate(pipe)
    assert [plan.map.is_identity for plan in plans] == [True] * 3
    assert plans[0].map.index.shape == (2, 256)


def test_nothing_is_left_behind_even_after_an_error(pipe):
    tomesd.apply_patch(pipe)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in pipe.unet.modules()]
    block = pipe.unet.up_blocks[3].attentions[1].transformer_blocks[0]
    handle = block.ff.register_forward_pre_hook(lambda ff, args: [][0])
    with pytest.raises(IndexError), tomesd.trace(pipe) as plans, tomesd.trace(pipe, steps=[]) as none:
        tiny.generate(pipe)
    handle.remove()
    assert len(plans) == 3
    assert none == []
    tiny.generate(pipe)
    assert len(plans) == 3
    now = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in pipe.unet.modules()]
    assert now == hooks


def test_copies_made_meanwhile_are_not_traced(pipe):
    tomesd.apply_patch(pipe)
    with tomesd.trace(pipe) as plans:
        for twin in (copy.deepcopy(pipe.unet), pickle.loads(pickle.dumps(pipe.unet))):
            tiny.CASES["sd"](twin)
    assert plans == []


def test_compiled_code_is_run_uncompiled_and_kept():
    unet = tiny.small_unet()
    tomesd.apply_patch(unet)
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    fast = torch.compile(unet, backend=backend, fullgraph=True)
    case = tiny.CASES["sd"]
    with torch.no_grad():
        want = case(fast)
        graphs = len(compiled)
        with tomesd.trace(fast) as plans:
            torch.testing.assert_close(case(fast), want)
        torch.testing.assert_close(case(fast), want)
    assert len(compiled) == graphs > 0
    assert len(plans) == 3
    assert plans[0].map.groups == 128


def test_mistakes_are_named(pipe):
    with pytest.raises(ValueError, match="nothing merges in UNet2DConditionModel: apply_patch comes first"):
        tomesd.trace(pipe).__enter__()
    tomesd.apply_patch(pipe)
    with pytest.raises(ValueError, match="each of steps must be at least 0, got -1"):
        tomesd.trace(pipe, steps=[2, -1]).__enter__()
    for steps in (3, 1.5, np.int64(3), "3"):
        with pytest.raises(TypeError, match=r"steps must be several integers, such as \[0, 9\], got "):
            tomesd.trace(pipe, steps=steps).__enter__()
    with pytest.raises(TypeError, match=r"each of steps must be an integer, got 0\.5"):
        tomesd.trace(pipe, steps=[0, 0.5]).__enter__()
    with tomesd.trace(pipe, steps=[np.int64(1)]) as plans:
        tiny.generate(pipe)
    assert {plan.step for plan in plans} == {1}
    with pytest.raises(TypeError, match="expected a pipeline or a torch module"):
        tomesd.trace("pipe").__enter__()


def plan(index, h=2, w=4):
    """Of rows of group numbers, a sample each."""
    index = torch.tensor(index)
    return tomesd.Plan("block", 1, 0, 0.0, h, w, tomesd.TokenMap.from_index(index, int(index.max()) + 1))


# Two groups of two tokens, of which one is in two places; the rest alone.
MERGED = plan([[0, 0, 1, 2, 3, 4, 2, 5]])


def checks():
    """4 x 2 tokens of 10 pixels, each of a colour of its own."""
    colours = np.array([[0, 30, 60, 90], [120, 150, 180, 210]], dtype=np.uint8)
    grey = colours.repeat(10, 0).repeat(10, 1)
    return Image.fromarray(np.stack([grey] * 3, -1))


def test_groups_are_painted_in_their_mean_colour():
    image = checks()
    picture = tomesd.make_visualization(image, MERGED)
    assert picture.size == image.size
    assert [picture.getpixel(place) for place in ((3, 3), (13, 3))] == [(15, 15, 15)] * 2
    # Apart, but one group.
    assert [picture.getpixel(place) for place in ((33, 3), (23, 13))] == [(135, 135, 135)] * 2
    # Tokens alone show the picture, to the edge.
    pixels, painted = np.array(image), np.array(picture)
    for y, x in ((0, 2), (1, 0), (1, 1), (1, 3)):
        token = np.s_[10 * y : 10 * y + 10, 10 * x : 10 * x + 10]
        assert np.array_equal(painted[token], pixels[token])
    border, dot = picture.getpixel((30, 5)), picture.getpixel((35, 5))
    assert border == dot == picture.getpixel((29, 15))
    assert len(set(border)) > 1  # a colour
    assert picture.getpixel((25, 15)) == (135, 135, 135)  # no dot where a token left
    assert picture.getpixel((5, 9)) != border  # another group's
    assert picture.getpixel((10, 5)) == (15, 15, 15)  # no border within a group


def test_size_and_sample():
    small = checks().resize((8, 4))
    assert tomesd.make_visualization(small, MERGED).size == (32, 16)  # at least 8 pixels for each token
    assert tomesd.make_visualization(small, MERGED, pixels=12).size == (48, 24)
    both = plan([[0, 0, 1, 2, 3, 4, 2, 5], [5, 0, 1, 2, 3, 4, 2, 0]])
    first, last = (tomesd.make_visualization(checks(), both, sample=i).tobytes() for i in (0, 1))
    assert first == tomesd.make_visualization(checks(), MERGED).tobytes()
    assert last == tomesd.make_visualization(checks(), both).tobytes() != first
    nothing = plan([list(range(8))])
    assert tomesd.make_visualization(checks(), nothing).tobytes() == checks().tobytes()


def test_a_picture_of_something_else_is_an_error():
    image = checks()
    with pytest.raises(TypeError, match="img must be a PIL image, got Tensor"):
        tomesd.make_visualization(torch.ones(3, 20, 40), MERGED)
    with pytest.raises(TypeError, match="plan must be one of those that trace lists, got TokenMap"):
        tomesd.make_visualization(image, MERGED.map)
    with pytest.raises(ValueError, match="4 x 2 tokens are not of an image of 20 x 40 pixels"):
        tomesd.make_visualization(image.rotate(90, expand=True), MERGED)
    with pytest.raises(ValueError, match=r"sample must be in \[-1, 1\), got 1"):
        tomesd.make_visualization(image, MERGED, sample=1)
    with pytest.raises(ValueError, match="pixels must be at least 1, got 0"):
        tomesd.make_visualization(image, MERGED, pixels=0)


def test_a_pipeline_from_trace_to_picture(pipe):
    tomesd.apply_patch(pipe, 0.5, max_downsample=2)
    with tomesd.trace(pipe) as plans:
        image = tiny.generate(pipe, output_type="pil", width=128, height=72)[0]
    sizes = {plan.downsample: tomesd.make_visualization(image, plan).size for plan in plans}
    assert image.size == (128, 72)
    # The last row of level 2 reaches past the image.
    assert sizes == {1: (128, 72), 2: (128, 80)}
