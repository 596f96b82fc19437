"""apply_patch, remove_patch and patched: arguments, methods, errors, all or nothing."""

import copy
import inspect
import json
import pickle
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import diffusers as D
import numpy as np
import pytest
import tiny
import torch
from torch import nn

import tomesd
from tomesd import Merge, MergeKeys, MergeStage, Recipe, SampleKeys

pytestmark = pytest.mark.usefixtures("no_grad")


def methods_of(model):
    """The method of each block that has one."""
    return {row.name: row.method for row in tomesd.explain(model).rows if row.method is not None}


@pytest.mark.parametrize("verb", [tomesd.apply_patch, tomesd.patched])
def test_the_signature_is_that_of_tomesd_0_1_3(verb):
    parameters = inspect.signature(verb).parameters
    assert list(parameters)[:9] == [
        *("model", "ratio", "max_downsample", "sx", "sy"),
        *("use_rand", "merge_attn", "merge_crossattn", "merge_mlp"),
    ]
    assert {p.kind for p in list(parameters.values())[9:]} == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize(
    ("args", "options", "method"),
    [
        ((), {}, Merge(0.5)),
        ((0.25,), {}, Merge(0.25)),
        ((0.6, 2, 3, 4, False, True, True, True), {}, Merge(0.6, ("attn", "cross", "mlp"), 3, 4, None)),
        ((), {"merge_attn": False, "merge_mlp": True}, Merge(parts=("mlp",))),
        ((np.float32(0.5),), {"sx": np.int64(4)}, Merge(0.5, sx=4)),
        ((SampleKeys(0.9),), {}, SampleKeys(0.9)),
        ((MergeStage(0.3),), {"sx": 2, "merge_attn": True}, MergeStage(0.3)),
    ],
    ids=str,
)
def test_arguments_name_a_method(args, options, method):
    unet = tiny.unet()
    tomesd.apply_patch(unet, *args, **options)
    assert set(methods_of(unet).values()) == {method}


def test_methods_are_values():
    method = Merge(0.25, parts=["mlp", "attn"], prop_attn=True, seed=None)
    assert repr(method) == "Merge(0.25, parts=('attn', 'mlp'), seed=None, prop_attn=True)"
    assert eval(repr(method)) == method
    assert {method: 1}[copy.deepcopy(method)] == 1
    assert pickle.loads(pickle.dumps(method)) == method
    for one in (method, SampleKeys(0.9, seed=3), MergeStage(0.5, sx=4, matching="exact")):
        assert tomesd.Method.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    assert tomesd.Method.from_dict({"method": "SampleKeys"}) == SampleKeys()
    with pytest.raises(AttributeError):
        method.ratio = 0.5


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        ([], TypeError, "a method is described by a dict, got list"),
        ({"ratio": 0.5}, ValueError, "the method must be one of Merge, .*SampleKeys.*, got None"),
        ({"method": "Drop"}, ValueError, "got 'Drop'"),
        ({"method": ["Merge"]}, ValueError, r"got \['Merge'\]"),
        ({"method": "Merge", 1: 2}, ValueError, "Merge has no option 1, only"),
        ({"method": "SampleKeys", "sx": 2}, ValueError, "SampleKeys has no option 'sx', only ratio, seed"),
        ({"method": "Merge", "ratio": "x"}, TypeError, "ratio must be a number, got 'x'"),
    ],
)
def test_wrong_descriptions_of_methods_are_named(data, error, says):
    with pytest.raises(error, match=says):
        tomesd.Method.from_dict(data)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (dict(ratio=2), ValueError, r"ratio must be in \[0, 1\], .* got 2"),
        (dict(ratio=None), TypeError, "ratio must be a number, a method such as .*, got None"),
        (dict(ratio="SampleKeys"), TypeError, r"a dict or Recipe of methods, got 'SampleKeys' \(str\)"),
        (dict(ratio=Merge), TypeError, "ratio must be a number or a method, got the class Merge: make one"),
        (dict(sx=0), ValueError, "sx must be at least 1, got 0"),
        (dict(max_downsample=3), ValueError, r"max_downsample must be None .* or one of 1, 2, 4, 8, got 3"),
        (dict(max_downsample="1"), TypeError, "max_downsample must be an integer or None"),
        (dict(use_rand=1), TypeError, r"use_rand must be a bool, got 1 \(int\)"),
        (dict(merge_attn=False), ValueError, "merge_attn, merge_crossattn, merge_mlp are all False"),
        (dict(auto="yes"), TypeError, r"auto must be a bool, got 'yes' \(str\)"),
        (dict(ratio=Merge(), sx=4), TypeError, "sx=4 goes with a ratio that is a number, not with a Merge"),
        (dict(ratio=SampleKeys(), use_rand=False), TypeError, "use_rand=False goes with a ratio"),
        (dict(ratio={1: 0.5}, merge_mlp=True), TypeError, "merge_mlp=True goes with .* not with a dict"),
        (dict(ratio={1: 0.5}, max_downsample=2), TypeError, "max_downsample=2 goes with one method"),
        (dict(ratio={}), ValueError, "the dict of methods is empty"),
        (dict(ratio={3: 0.5}), ValueError, r"downsample \(1, 2, 4, 8\) or by the name of a block, got 3"),
        (
            dict(ratio={"a": 0.5}),
            ValueError,
            r"nothing to merge at 'a', for which Merge\(0.5\) was given",
        ),
        (dict(ratio={1: "x"}), TypeError, "what is given for 1 must be a ratio or a method, got 'x'"),
        (dict(ratio={8: Merge()}), ValueError, r"downsample 8, for which Merge\(0.5\) .* at downsample 1, 2"),
        (
            dict(ratio=Recipe({"x": Merge()})),
            ValueError,
            "nothing to merge at 'x', for which Merge",
        ),
        (dict(keys_only=True), TypeError, "unexpected keyword argument 'keys_only'"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_touched(options, error, says):
    unet, call = tiny.small_unet(), tiny.CASES["sd"]
    tomesd.apply_patch(unet, 0.25)
    merged = call(unet)
    with pytest.raises(error, match=says):
        tomesd.apply_patch(unet, **options)
    assert torch.equal(call(unet), merged)


@pytest.mark.parametrize(("ratio", "stride", "most"), [(0.9, 2, 0.75), (1.0, 2, 0.75), (0.95, 4, 0.9375)])
def test_a_ratio_above_what_cells_allow_is_cut_with_one_warning(ratio, stride, most):
    unet = tiny.small_unet()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tomesd.apply_patch(unet, ratio, sx=stride, sy=stride)
    (warning,) = caught
    assert issubclass(warning.category, UserWarning)
    assert str(warning.message).startswith(
        f"ratio {ratio:g} is above {most:g}, the most that one dst in each"
    )
    assert {method.ratio for method in methods_of(unet).values()} == {most}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tomesd.apply_patch(unet, SampleKeys(0.95))


@pytest.mark.parametrize(
    "make", [Merge, MergeStage, lambda ratio: Merge.from_dict({"method": "Merge", "ratio": ratio})]
)
def test_the_warning_is_of_the_line_that_asks_for_too_much(make):
    with pytest.warns(UserWarning, match="0.75 of the tokens merge") as caught:
        make(0.9)
    assert [warning.filename for warning in caught] == [__file__]


def test_a_dict_chooses_by_downsample():
    unet, call = tiny.unet(), tiny.CASES["sd"]
    tomesd.apply_patch(unet, {1: SampleKeys(0.5), 4: 0.25})
    rows = tomesd.explain(unet).rows
    assert {row.downsample: row.method for row in rows} == {
        1: SampleKeys(0.5),
        2: None,
        4: Merge(0.25),
        8: None,
    }
    assert {row.left_alone for row in rows} == {
        None,
        "no method was given for it or for downsample 2",
        "no method was given for it or for downsample 8",
    }
    both = call(unet)
    for one in ({1: SampleKeys(0.5)}, {4: Merge(0.25)}):
        tomesd.apply_patch(unet, one)
        assert not torch.equal(call(unet), both)


def test_a_recipe_chooses_by_name():
    pipe = tiny.sd()
    names = [row.name for row in tomesd.explain(pipe).rows]
    recipe = Recipe({names[0]: Merge(0.25), names[3]: SampleKeys(0.75), names[-1]: MergeStage()})
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    known = Recipe(recipe, given := {"left": [8, 4]})
    known.about["left"].append(given["left"].append(2))
    assert pickle.loads(pickle.dumps(known)).about == {"left": [8, 4]}  # it cannot be changed
    assert tomesd.apply_patch(pipe, recipe) is pipe
    assert methods_of(pipe) == dict(recipe)
    assert torch.isfinite(tiny.generate(pipe)).all()


def test_blocks_of_one_transformer_may_have_methods_of_their_own():
    unet = tiny.sdxl_unet()
    names = [row.name for row in tomesd.explain(unet).rows if row.name.startswith("mid_block")]
    tomesd.apply_patch(unet, Recipe({names[0]: Merge(0.25), names[2]: SampleKeys(0.75)}))
    with tomesd.trace(unet) as plans:
        tiny.CASES["sdxl"](unet)
    assert [(plan.block, plan.map.groups) for plan in plans] == [(names[0], 12), (names[2], 1)]


def test_patched_is_undone_even_after_an_error():
    unet, call = tiny.unet(), tiny.CASES["sd"]
    plain = call(unet)
    with tomesd.patched(unet, Merge(0.5, seed=1)) as same:
        assert same is unet
        assert not torch.equal(call(unet), plain)
    assert torch.equal(call(unet), plain)
    with pytest.raises(KeyError), tomesd.patched(model=unet):
        raise KeyError
    assert torch.equal(call(unet), plain)


def test_patched_puts_back_what_was_there():
    unet, call = tiny.unet(), tiny.CASES["sd"]
    tomesd.apply_patch(unet, {1: SampleKeys(0.5), 2: Merge(0.25)})
    want = call(unet)
    with tomesd.patched(unet, 0.75), tomesd.patched(unet, MergeStage()):
        assert not torch.equal(call(unet), want)
    assert torch.equal(call(unet), want)


def test_patched_ends_on_the_networks_that_it_began_with():
    pipe, other = tiny.sd(unet=tiny.small_unet()), tiny.small_unet()
    first = pipe.unet
    with tomesd.patched(pipe, 0.5):
        pipe.unet = other
        tomesd.apply_patch(other, 0.25)
    assert methods_of(first) == {}
    assert set(methods_of(other).values()) == {Merge(0.25)}
    with pytest.raises(AttributeError, match="on_purpose"), tomesd.patched(pipe, 0.5):
        pipe.__dict__.pop("unet").on_purpose  # noqa: B018
    assert methods_of(other) == {row: Merge(0.25) for row in methods_of(other)}
    with pytest.raises(TypeError, match="model"), tomesd.patched(ratio=0.5):
        pass


def test_a_trace_goes_on_when_a_model_is_patched_anew():
    unet, call = tiny.small_unet(), tiny.CASES["sd"]
    tomesd.apply_patch(unet, Merge(0.5))
    with tomesd.trace(unet) as plans:
        call(unet)
        with tomesd.patched(unet, Merge(0.25)):
            call(unet)
        call(unet)
    left = [(plan.step, plan.map.groups) for plan in plans]
    assert left == [(step, groups) for step, groups in enumerate((128, 192, 128)) for _ in left[::3]]
    before = len(plans)
    call(unet)
    assert len(plans) == before


def test_what_holds_a_pipeline_is_looked_into_twice():
    pipe = tiny.sd(unet=tiny.small_unet())
    app = SimpleNamespace(engine=SimpleNamespace(pipe=pipe, of=tiny), table={"unet": tiny.small_unet()})
    app.engine.app = app
    assert tomesd.apply_patch(app) is app
    assert {name.split(".")[0] for name in methods_of(app)} == {"engine", "table"}
    assert methods_of(pipe)
    assert tomesd.remove_patch(app) is app
    assert methods_of(app) == {}


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("method", [Merge(), SampleKeys(), MergeKeys(), MergeStage()], ids=str)
def test_defaults_of_torch_change_nothing(method):
    unet, (x, text), t = tiny.small_unet(), tiny.inputs(16, 16, 2), torch.tensor(500)
    want = tomesd.apply_patch(unet, method)(x, t, text).sample
    for default in (default_dtype(torch.float64), torch.device("meta")):
        tomesd.apply_patch(unet, method)
        with default:
            out = unet(x, t, text).sample
        torch.testing.assert_close(out, want)


def transformer():
    torch.manual_seed(0)
    return D.SD3Transformer2DModel(sample_size=8, num_layers=1, num_attention_heads=2, attention_head_dim=8)


@pytest.mark.parametrize("verb", [tomesd.apply_patch, tomesd.remove_patch, tomesd.explain])
@pytest.mark.parametrize(
    ("model", "error", "says"),
    [
        (lambda: 3, TypeError, r"expected a pipeline or a torch module, got 3 \(int\)"),
        (lambda: "runwayml/stable-diffusion-v1-5", TypeError, r"a pipeline or a torch module, got 'runwayml"),
        (lambda: {3, 4}, TypeError, "got set"),
        (lambda: D.StableDiffusionPipeline, TypeError, "the class StableDiffusionPipeline: make one first"),
        (lambda: None, TypeError, "got None"),
        (lambda: nn.Linear(2, 2), ValueError, "Linear holds no network that tomesd knows. Known.*UNet2DCond"),
        (tiny.vae, ValueError, "AutoencoderKL holds no network"),
        (transformer, ValueError, "SD3Transformer2DModel holds no network"),
    ],
)
def test_unknown_models_are_named(verb, model, error, says):
    if verb is tomesd.remove_patch and error is ValueError:
        model = model()
        assert verb(model) is model  # it has no patch
        return
    with pytest.raises(error, match=says):
        verb(model())


def test_nothing_to_merge_is_an_error():
    bare = tiny.unet(
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type=None,
    )
    with pytest.raises(ValueError, match=r"no transformer blocks that tomesd knows in UNet2DConditionModel$"):
        tomesd.apply_patch(bare)
    pipe = tiny.sdxl()
    with pytest.raises(ValueError, match=r"in unet with max_downsample=1: .* at downsample 2, 4"):
        tomesd.apply_patch(pipe, max_downsample=1)
    assert methods_of(tomesd.apply_patch(pipe))


@pytest.mark.parametrize(
    ("down", "up"),
    [
        (("SimpleCrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "SimpleCrossAttnUpBlock2D")),
        (("KDownBlock2D", "KCrossAttnDownBlock2D"), ("KCrossAttnUpBlock2D", "KUpBlock2D")),
    ],
)
def test_attention_without_transformers_is_refused_with_the_reason(down, up):
    blocks = dict(down_block_types=down, mid_block_type=None, up_block_types=up, block_out_channels=(32, 32))
    with pytest.raises(ValueError, match="tomesd knows in UNet2DConditionModel: attention is given an image"):
        tomesd.apply_patch(tiny.unet(**blocks))


def test_every_network_of_a_pipeline_must_have_something_to_merge():
    pipe = tiny.sd(D.StableDiffusionControlNetPipeline, unet=tiny.sdxl_unet(), controlnet=tiny.controlnet())
    with pytest.raises(ValueError, match="nothing to merge in unet with max_downsample=1"):
        tomesd.apply_patch(pipe, max_downsample=1)
    assert methods_of(pipe) == {}


def test_blocks_of_other_makes_are_left_alone_and_explained():
    unet = tiny.small_unet()
    del unet.down_blocks[0].attentions[0].transformer_blocks[0].norm1
    tomesd.apply_patch(unet)
    reasons = {row.name: row.left_alone for row in tomesd.explain(unet).rows}
    assert reasons["down_blocks.0.attentions.0.transformer_blocks.0"] == "has no norm1 and attn1 to plan at"
    assert reasons["up_blocks.1.attentions.0.transformer_blocks.0"] is None


def test_importing_loads_torch_only():
    code = (
        "import sys, tomesd.vit;"
        "heavy = {'diffusers', 'transformers', 'timm', 'PIL', 'triton', 'torch._dynamo'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pipelines_in_threads_of_their_own():
    pipes = [tiny.sd(unet=tiny.small_unet()) for _ in range(3)]
    for pipe, method in zip(pipes, (Merge(0.25), SampleKeys(), MergeStage()), strict=True):
        tomesd.apply_patch(pipe, method)
    alone = [tiny.generate(pipe, num_inference_steps=6) for pipe in pipes]
    assert not torch.equal(alone[0], alone[1])
    together = [None] * 3

    def draw(i):
        together[i] = tiny.generate(pipes[i], num_inference_steps=6)

    threads = [threading.Thread(target=draw, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
