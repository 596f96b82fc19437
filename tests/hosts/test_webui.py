"""The extension of the web UIs, and how they themselves call tomesd, on stand-ins of what they are to it."""

import runpy
import sys
import types
from pathlib import Path

import pytest
import tiny
import torch
from test_comfyui import Patcher, UNetModel

import tomesd

FOLDER = Path(__file__).parents[2] / "examples"


class Part:
    """A part of a page of gradio, which is its value here."""

    def __init__(self, label=None, value=None, **options):
        self.value = value

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@pytest.fixture
def script(monkeypatch):
    names = ("Accordion", "Checkbox", "Radio", "Slider", "Dropdown", "Number")
    monkeypatch.setitem(sys.modules, "gradio", types.SimpleNamespace(**dict.fromkeys(names, Part)))
    scripts = types.SimpleNamespace(Script=object, AlwaysVisible=object())
    monkeypatch.setitem(sys.modules, "modules", types.SimpleNamespace(scripts=scripts))
    return runpy.run_path(str(FOLDER / "webui/scripts/tomesd_methods.py"))["Script"]()


def inputs(script, *changed):
    """What the page gives a script that is on, with the first values changed."""
    values = [part.value for part in script.ui(False)]
    assert values == [False, "SampleKeys", 0.5, "finest", 0]
    return [True, *changed, *values[1 + len(changed) :]]


def processing(model):
    return types.SimpleNamespace(sd_model=model, extra_generation_params={})


@pytest.fixture
def pipe():
    """SD.Next's model is a diffusers pipeline; AUTOMATIC1111's an object of CompVis, see below."""
    return types.SimpleNamespace(unet=tiny.unet())


def draw(model):
    return tiny.CASES["sd"](model.unet)


def test_a_method_is_on_while_a_picture_is_drawn(script, pipe, no_grad):
    plain, p = draw(pipe), processing(pipe)
    script.process(p, *inputs(script, "Merge", 0.25, "2", 7.0))
    merged = draw(pipe)
    assert p.extra_generation_params == {script.title(): "Merge(0.25, seed=7) up to 2"}
    script.process_before_every_sampling(p, *inputs(script, "Merge", 0.25, "2", 7.0), x=None, noise=None)
    assert torch.equal(draw(pipe), merged)
    script.postprocess(p, None)
    assert torch.equal(draw(pipe), plain)
    with tomesd.patched(pipe.unet, tomesd.Merge(0.25, seed=7), max_downsample=2):
        assert torch.equal(draw(pipe), merged)


def test_what_an_error_left_is_taken_off_at_the_next_picture(script, pipe, no_grad):
    plain = draw(pipe)
    script.process(processing(pipe), *inputs(script))
    assert not torch.equal(draw(pipe), plain)
    other = types.SimpleNamespace(unet=pipe.unet)  # SD.Next draws with the network in another pipeline
    script.process(processing(other), False, *inputs(script)[1:])
    assert torch.equal(draw(other), plain)


def test_a_patch_of_the_host_stays_while_the_script_is_off(script, pipe, no_grad):
    tomesd.apply_patch(pipe.unet, 0.5)
    merged, p = draw(pipe), processing(pipe)
    for call in (script.process, script.process_before_every_sampling):
        call(p, False, *inputs(script)[1:])
    script.postprocess(p, None)
    assert torch.equal(draw(pipe), merged)
    assert not p.extra_generation_params


def test_forge_draws_with_a_patched_clone(script, no_grad):
    plain = Patcher(UNetModel())
    p = processing(types.SimpleNamespace(forge_objects=types.SimpleNamespace(unet=plain)))
    expected = plain()
    script.process(p, *inputs(script))
    assert p.sd_model.forge_objects.unet is plain  # Forge itself makes a new one before it samples
    script.process_before_every_sampling(p, *inputs(script))
    clone = p.sd_model.forge_objects.unet
    assert not torch.equal(clone(), expected)
    assert torch.equal(plain(), expected)
    script.postprocess(p, None)
    assert p.extra_generation_params == {script.title(): "SampleKeys(0.5)"}


@pytest.mark.usefixtures("script")
@pytest.mark.parametrize("file", ["webui/scripts/tomesd_methods.py", "comfyui/__init__.py"])
def test_an_older_tomesd_is_named(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomesd", types.ModuleType("tomesd"))
    for name in [name for name in sys.modules if name.startswith("tomesd.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"tomesd 1\.0 is needed where this program runs"):
        runpy.run_path(str(FOLDER / file))


class LatentDiffusion(torch.nn.Module):
    """AUTOMATIC1111's model: a module that is called by its parts."""

    def __init__(self):
        super().__init__()
        self.model = torch.nn.Module()
        self.model.diffusion_model = UNetModel()

    def draw(self):
        return Patcher(self.model.diffusion_model)()


@pytest.mark.parametrize("build", [LatentDiffusion, lambda: types.SimpleNamespace(unet=tiny.unet())])
def test_the_settings_of_web_uis_call_tomesd_as_ever(build, no_grad):
    """AUTOMATIC1111 and SD.Next have a setting of their own, which makes these very calls."""
    model = build()
    picture = model.draw if isinstance(model, LatentDiffusion) else lambda: draw(model)
    plain = picture()
    asked = {"use_rand": False, "merge_attn": True, "merge_crossattn": False, "merge_mlp": False}
    tomesd.apply_patch(model, ratio=0.5, **asked)
    merged = picture()
    assert not torch.equal(merged, plain)
    assert torch.equal(picture(), merged)
    tomesd.remove_patch(model)  # of another ratio for the pass at high resolution
    tomesd.apply_patch(model, ratio=0.3, **asked)
    assert not torch.equal(picture(), merged)
    tomesd.remove_patch(model)
    assert torch.equal(picture(), plain)
    tomesd.remove_patch(model)  # again, as after an error
    with pytest.warns(UserWarning, match="above 0.75"):
        tomesd.apply_patch(model, ratio=0.9, **asked)  # the end of AUTOMATIC1111's slider
    tomesd.remove_patch(model)
    assert torch.equal(picture(), plain)
