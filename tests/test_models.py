"""What may be given to apply_patch: a network, a pipeline, and what holds or shares one."""

import copy
import types

import acting
import diffusers as D
import pytest
import tiny
import torch
from torch import nn

import tomesd
from tomesd import Merge, MergeKeys, MergeStage, SampleKeys

pytestmark = pytest.mark.usefixtures("no_grad")


def is_patched(network):
    return any(row.method is not None for row in tomesd.explain(network).rows)


class Wrapper:
    """A pipeline in a class of one's own."""

    def __init__(self, pipe):
        self.pipe, self.calls = pipe, 0


def manager(pipe):
    made = D.ComponentsManager()
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            made.add(name, part)
    return made


@pytest.mark.parametrize(
    "hold",
    [
        lambda pipe: pipe,
        lambda pipe: pipe.components,
        Wrapper,
        manager,
        lambda pipe: [pipe.unet, pipe.vae],
        lambda pipe: {"first": pipe},
        lambda pipe: types.SimpleNamespace(pipes=[pipe]),
        lambda pipe: nn.ModuleDict({"unet": pipe.unet}),
        lambda pipe: torch.compile(pipe.unet),
    ],
    ids=[
        "pipeline",
        "components",
        "wrapper",
        "manager",
        "list",
        "dict",
        "list of pipes",
        "module",
        "compiled",
    ],
)
def test_what_holds_a_network_is_patched_through(hold):
    pipe = tiny.sd(unet=tiny.small_unet())
    pipe.itself = Wrapper(pipe)  # a circle
    held = hold(pipe)
    assert tomesd.remove_patch(held) is held
    assert tomesd.apply_patch(held) is held
    assert is_patched(pipe.unet)
    assert is_patched(held)
    assert tomesd.remove_patch(held) is held
    assert not is_patched(pipe.unet)


def test_pipelines_that_share_a_network_share_its_patch():
    pipe = tiny.sd(unet=tiny.small_unet())
    tomesd.apply_patch(pipe)
    other = D.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert is_patched(other)
    tomesd.remove_patch(other)
    assert not is_patched(pipe)


def test_what_is_made_of_the_weights_of_a_patched_network_is_plain():
    unet = tomesd.apply_patch(tiny.unet())
    assert not is_patched(D.ControlNetModel.from_unet(unet))
    other = tiny.unet()
    other.load_state_dict(unet.state_dict())
    assert not is_patched(other)


def test_remove_patch_takes_off_what_is_there_whatever_else_there_is():
    unet, case = tiny.small_unet(), tiny.CASES["sd"]
    plain = case(unet)
    tomesd.apply_patch(unet)
    unet.__class__ = type("Renamed", (nn.Module,), {"forward": type(unet).forward})
    holder = nn.ModuleList([unet, nn.Linear(1, 1), tiny.vae()])
    assert tomesd.remove_patch(holder) is holder
    unet.__class__ = D.UNet2DConditionModel
    assert torch.equal(case(unet), plain)


@pytest.mark.parametrize("method", [Merge(), SampleKeys(), MergeStage()], ids=str)
@pytest.mark.parametrize("path", ["attentions.0", "attentions.0.transformer_blocks.0"])
def test_a_copy_of_a_part_is_plain_and_goes_when_the_patch_goes(path, method):
    """As PEFT makes copies of what it trains whole."""
    unet, case = tiny.small_unet(), tiny.CASES["sd"]
    part = unet.down_blocks[0].get_submodule(path)
    x = torch.randn(1, 16, 8, 8) if path == "attentions.0" else torch.randn(1, 9, 16)

    def run(module):
        out = module(x, encoder_hidden_states=torch.ones(1, 7, tiny.TEXT))
        return out if isinstance(out, torch.Tensor) else out.sample

    wanted, plain = run(part), case(unet)
    tomesd.apply_patch(unet, method)
    case(unet)
    twin = copy.deepcopy(copy.deepcopy(part))
    assert torch.equal(run(twin), wanted)
    unet.twin = twin
    tomesd.remove_patch(unet)
    assert torch.equal(case(unet), plain)
    assert not [hook for module in unet.modules() for hook in module._forward_pre_hooks]
    assert torch.equal(run(twin), wanted)


class Trained(nn.Module):
    """A part and a copy of it, which is called: peft's `modules_to_save`."""

    def __init__(self, part):
        super().__init__()
        self.original, self.copied = part, copy.deepcopy(part)

    def forward(self, *args, **kwargs):
        return self.copied(*args, **kwargs)


CHANGES = {
    "replaced": lambda unet, path: tiny.small_unet().get_submodule(path),
    "copied": lambda unet, path: Trained(unet.get_submodule(path)),
}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize(
    ("part", "error"),
    [
        (".transformer_blocks.0.attn1", True),
        (".transformer_blocks.0.ff", True),
        (".transformer_blocks.0", False),
        ("", False),
    ],
)
def test_a_part_that_has_been_changed_since_the_patch_is_named(part, error, how):
    unet, case, path = tiny.small_unet(), tiny.CASES["sd"], f"down_blocks.0.attentions.0{part}"
    tomesd.apply_patch(unet, Merge(parts=("attn", "mlp")))
    wanted = case(unet)
    unet.set_submodule(path, CHANGES[how](unet, path))
    says = f"{path.rsplit('.')[-1]}.* was {how} after apply_patch, by a .*: patch again"
    with pytest.raises(RuntimeError, match=says) if error else pytest.warns(UserWarning, match=says):
        case(unet)
    tomesd.apply_patch(unet, Merge(parts=("attn", "mlp")))
    assert torch.equal(case(unet), wanted)


def test_switching_in_the_middle_of_a_loop():
    """A callback may patch anew or take the patch off between two steps."""
    pipe = tiny.sd(unet=tiny.small_unet())
    plain = tiny.generate(pipe, num_inference_steps=4)
    tomesd.apply_patch(pipe)
    all_steps = tiny.generate(pipe, num_inference_steps=4)
    seen = []

    def at_half(pipe, step, timestep, tensors):
        seen.append(is_patched(pipe))
        if step == 1:
            tomesd.remove_patch(pipe)
        return tensors

    half = tiny.generate(pipe, num_inference_steps=4, callback_on_step_end=at_half)
    assert seen == [True, True, False, False]
    assert 0 < (half - plain).norm() < (all_steps - plain).norm()


def test_packed_weights_are_counted_by_the_features_of_their_layer():
    """As bitsandbytes' nf4 packs them."""
    unet = tiny.small_unet()
    rows = tomesd.explain(tomesd.apply_patch(unet)).rows
    for layer in unet.modules():
        if isinstance(layer, nn.Linear):
            packed = torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8)
            layer.weight = nn.Parameter(packed, requires_grad=False)
    assert tomesd.explain(unet).rows == rows


class First(nn.Module):
    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, x, t, text):
        return self.unet(x, t, text, return_dict=False)[0]


METHODS = [
    Merge(parts=("attn", "cross", "mlp")),
    Merge(matching="exact"),
    SampleKeys(),
    MergeKeys(),
    MergeStage(),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_of_torchscript_is_the_patched_network_at_every_step(method):
    unet = tiny.small_unet()
    tomesd.apply_patch(unet, method)
    x, text = tiny.inputs(16, 16, 2)
    traced = torch.jit.trace(First(unet).eval(), (x, torch.tensor(500), text))
    other, _ = tiny.inputs(24, 24, 2)
    with pytest.raises(RuntimeError):
        traced(other, torch.tensor(500), text)
    for t in (500, 100):
        torch.testing.assert_close(traced(x, torch.tensor(t), text), unet(x, torch.tensor(t), text).sample)


def test_an_exported_program_is_for_images_of_one_size_and_any_number():
    unet = tiny.small_unet(mid_block_type=None)
    tomesd.apply_patch(unet, MergeKeys())
    x, text = tiny.inputs(16, 16, 2)
    many, auto = torch.export.Dim("many", min=2, max=8), torch.export.Dim.AUTO
    shapes = {"x": {0: many, 2: auto, 3: auto}, "t": None, "text": {0: many}}
    program = torch.export.export(First(unet), (x, torch.tensor(500), text), dynamic_shapes=shapes).module()
    x, text = tiny.inputs(16, 16, 3)
    t = torch.tensor(100)
    torch.testing.assert_close(program(x, t, text), unet(x, t, text).sample)
    with pytest.raises(AssertionError, match="Guard failed"):
        program(tiny.inputs(24, 24, 2)[0], t, text[:2])


def test_what_onnx_cannot_have_is_said():
    unet, (x, text) = tiny.small_unet(mid_block_type=None), tiny.inputs(16, 16, 2)
    tomesd.apply_patch(unet)
    with pytest.raises(ValueError, match="ONNX has no operators for what patches of networks that draw do"):
        torch.onnx.export(First(unet), (x, torch.tensor(500), text), dynamo=False, verbose=False)
    assert torch.isfinite(unet(x, torch.tensor(500), text).sample).all()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_gradients_and_batches_of_torch_func(method):
    unet = tiny.small_unet()
    tomesd.apply_patch(unet, method)
    x, text = tiny.inputs(16, 16, 2)
    t = torch.tensor(500)
    want = torch.autograd.functional.vjp(lambda x: unet(x, t, text).sample, x, torch.ones_like(x))[1]
    _, pull = torch.func.vjp(lambda x: unet(x, t, text).sample, x)
    torch.testing.assert_close(pull(torch.ones_like(x))[0], want, atol=1e-5, rtol=1e-4)
    by_batch = torch.func.vmap(lambda x, text: unet(x[None], t, text[None]).sample[0])(x, text)
    torch.testing.assert_close(by_batch, unet(x, t, text).sample, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_training_in_half_precision(method, dtype):
    """Losses and gradients are about those of float32."""
    unet, (x, text) = tiny.small_unet(), tiny.inputs(16, 16, 2)
    tomesd.apply_patch(unet, method)
    weights = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.parameters()
    weights, found = list(weights), []
    for half in (False, True):
        with torch.enable_grad(), torch.autocast("cpu", dtype, enabled=half):
            loss = unet(x, torch.tensor(500), text).sample.float().square().mean()
        found.append(torch.cat([loss[None], *(g.flatten() for g in torch.autograd.grad(loss, weights))]))
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.95


def test_patches_leave_what_torch_compile_has_made_of_other_models():
    count = 0

    def backend(graph, inputs):
        nonlocal count
        count += 1
        return graph.forward

    unet = tiny.small_unet()
    tomesd.remove_patch(tomesd.apply_patch(unet))  # from now on torch.compile looks at hooks
    other = torch.compile(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), backend=backend)
    x = torch.randn(1, 3)
    for _ in range(3):
        with tomesd.patched(unet):
            other(x)
        other(x)
    assert count == 1
    torch.compiler.reset()


def test_a_compiled_network_takes_other_batches():
    torch.compiler.reset()
    net = acting.network()
    tomesd.apply_patch(net)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    for b in (2, 3, 4):
        torch.testing.assert_close(acting.call(compiled, b=b), acting.call(net, b=b), atol=1e-4, rtol=1e-4)
    torch.compiler.reset()


def test_a_compiled_network_may_be_patched_often():
    """Programs that were made for a kind of patch serve again, and there are never too many."""
    torch.compiler.reset()
    net = acting.network()
    with torch._dynamo.config.patch(recompile_limit=2):
        compiled = torch.compile(net, fullgraph=True, backend="eager")
        for method in (Merge(), SampleKeys(), None, Merge(0.3, parts=("mlp",)), SampleKeys()):
            if method is None:
                tomesd.remove_patch(net)
            else:
                tomesd.apply_patch(net, method)
            torch.testing.assert_close(acting.call(compiled), acting.call(net), atol=1e-4, rtol=1e-4)
    torch.compiler.reset()
