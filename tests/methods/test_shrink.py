"""DeepShrink: deep levels see a smaller image in the first steps."""

import copy
import math

import diffusers as D
import pytest
import tiny
import torch

import tomesd
from tomesd.hosts.hooks import Argument
from tomesd.hosts.unets import find_networks

pytestmark = pytest.mark.usefixtures("no_grad")

UNETS = {name: case for name, case in tiny.CASES.items() if name != "pixart"}
EVEN = ("controlnet_xs", "ldm")  # run on sizes alone that they can halve
NONE = tomesd.Merge(0)


def sizes(network) -> list[tuple[int, tuple[int, int]]]:
    """Level and size of the image that each part of a network is given, as it runs."""
    seen: list[tuple[int, tuple[int, int]]] = []
    for site in network.sites:
        image = Argument(site.container, network.family.image, 0)
        site.container.register_forward_pre_hook(
            lambda module, args, kwargs, level=site.level, image=image: seen.append(
                (level, tuple(image.get(args, kwargs).shape[-2:]))
            ),
            with_kwargs=True,
        )
    return seen


def halved(size, times):
    for _ in range(times):
        size = tuple(math.ceil(side / 2) for side in size)
    return size


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize(("size", "factor"), [((17, 24), 3), ((16, 16), 1.5)])
def test_deep_levels_are_smaller_in_early_steps_and_in_no_others(name, size, factor):
    model = UNETS[name].build()
    networks = find_networks(model)
    h, w = size if name not in EVEN else (16, size[1])
    wanted = {t: UNETS[name](model, h, w, t=t) for t in (900, 100)}
    assert tomesd.apply_patch(model, NONE, shrink=tomesd.DeepShrink(factor)) is model
    seen = sizes(networks[0])
    assert torch.equal(UNETS[name](model, h, w, t=100), wanted[100])
    assert all(size == halved((h, w), level) for level, size in seen)
    seen.clear()
    early = UNETS[name](model, h, w, t=900)
    small = tuple(math.ceil(side / factor) for side in halved((h, w), 1))
    assert all(size == (halved(small, level - 1) if level else (h, w)) for level, size in seen)
    assert any(level for level, _ in seen)
    if "controlnet" not in name or name == "controlnet_xs":  # their outputs are those of all levels
        assert early.shape == wanted[900].shape
        assert not torch.allclose(early, wanted[900], atol=1e-3)
    tomesd.remove_patch(model)
    assert torch.equal(UNETS[name](model, h, w, t=900), wanted[900])


@pytest.mark.parametrize("method", [tomesd.Merge(0.5), tomesd.SampleKeys(0.75), tomesd.MergeStage(0.5)])
def test_methods_plan_on_the_image_that_is_there(method):
    unet = tiny.unet()
    tomesd.apply_patch(unet, method, 4, shrink=tomesd.DeepShrink(2))
    with tomesd.trace(unet) as plans:
        early = tiny.CASES["sd"](unet, 24, 40, t=900)
    assert {(plan.h, plan.w) for plan in plans} == {(24, 40), (6, 10), (3, 5)}
    twin = copy.deepcopy(unet)
    assert torch.equal(tiny.CASES["sd"](twin, 24, 40, t=900), early)
    with tomesd.patched(unet, 0.5):
        assert not torch.equal(tiny.CASES["sd"](unet, 24, 40, t=900), early)
    assert torch.equal(tiny.CASES["sd"](unet, 24, 40, t=900), early)


def test_a_loop_is_shrunk_by_its_share_with_a_controlnet_as_well():
    pipe = tiny.sd(D.StableDiffusionControlNetPipeline, controlnet=tiny.controlnet())
    image = torch.rand(1, 3, 128, 128)
    tomesd.apply_patch(pipe, NONE, shrink=tomesd.DeepShrink(2, until=0.5))
    both = [sizes(network) for network in find_networks(pipe)]
    assert len(both) == 2
    tiny.generate(pipe, image=image, num_inference_steps=5)
    for seen in both:
        assert [size for level, size in seen if level == 3] == [(1, 1)] * 3 + [(2, 2)] * 2


@pytest.mark.parametrize("downsample", [2, 4])
@pytest.mark.parametrize(("h", "w"), [(16, 16), (17, 24)])
def test_what_others_add_to_deep_levels_shrinks_with_them(h, w, downsample):
    """A T2I-Adapter adds images as large as they would be, a ControlNet that is not patched does too."""
    unet, (x, text) = tiny.unet(), tiny.inputs(h, w, 2)
    shrink = tomesd.DeepShrink(2, downsample=downsample)
    control = tiny.controlnet()
    picture = torch.rand(2, 3, 8 * h, 8 * w, generator=torch.Generator().manual_seed(0))
    lists = {}
    for name, options in (("whole", {}), ("shrunk", {"shrink": shrink})):
        tomesd.apply_patch(control, NONE, **options)
        lists[name] = control(x, 900, text, picture, return_dict=False)
    tomesd.apply_patch(unet, NONE, shrink=shrink)
    without = unet(x, 900, text).sample
    found = [
        unet(x, 900, text, down_block_additional_residuals=downs, mid_block_additional_residual=mid).sample
        for downs, mid in lists.values()
    ]
    # Those that have been shrunk themselves are left as they are, the others come near to them.
    assert 0 < (found[0] - found[1]).norm() < 0.5 * (found[1] - without).norm()
    adapted = [torch.ones(2, c, *halved((h, w), level)) for level, c in enumerate((16, 32, 32, 32))]
    for t in (900, 100):
        plain = unet(x, t, text).sample
        both = unet(x, t, text, down_intrablock_additional_residuals=list(adapted)).sample
        assert both.shape == plain.shape
        assert not torch.allclose(both, plain, atol=1e-3)


def test_all_steps_or_none():
    unet = tiny.unet()
    case = tiny.CASES["sd"]
    plain = case(unet, t=0)
    tomesd.apply_patch(unet, NONE, shrink=tomesd.DeepShrink(1))
    assert torch.equal(case(unet, t=0), plain)
    tomesd.apply_patch(unet, NONE, shrink=tomesd.DeepShrink(until=1))
    assert not torch.allclose(case(unet, t=0), plain, atol=1e-3)
    tomesd.apply_patch(unet, NONE, shrink=tomesd.DeepShrink(downsample=8))
    seen = sizes(find_networks(unet)[0])
    case(unet, t=900)
    assert dict(seen) == {0: (16, 16), 1: (8, 8), 2: (4, 4), 3: (1, 1)}


@pytest.mark.parametrize(
    ("build", "shrink", "error", "says"),
    [
        (
            tiny.unet,
            lambda: tomesd.DeepShrink(0.5),
            ValueError,
            "factor must be a number of at least 1, got 0.5",
        ),
        (tiny.unet, lambda: tomesd.DeepShrink("2"), TypeError, "factor must be a number, got '2'"),
        (tiny.unet, lambda: tomesd.DeepShrink(until=0), ValueError, "until must be above 0 and at most 1"),
        (tiny.unet, lambda: tomesd.DeepShrink(downsample=3), ValueError, "downsample must be one of 2, 4, 8"),
        (tiny.unet, lambda: 2, TypeError, "shrink must be a DeepShrink or None, got 2"),
        (tiny.pixart, tomesd.DeepShrink, ValueError, "PixArtTransformer2DModel has no such level to shrink"),
        (tiny.sdxl_unet, lambda: tomesd.DeepShrink(downsample=8), ValueError, "of 2, 4 and 8 it has 2, 4"),
    ],
)
def test_what_cannot_be_is_said(build, shrink, error, says):
    model = build()
    with pytest.raises(error, match=says):
        tomesd.apply_patch(model, NONE, shrink=shrink())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
