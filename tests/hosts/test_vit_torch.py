"""tomesd.vit under what torch does to a model: programs of it, hooks on gradients, replicas, no samples."""

from types import SimpleNamespace

import pytest
import tiny_vit
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import tomesd.vit as tome

CASES = {**tiny_vit.CASES, **tiny_vit.ALIKE}
SCHEDULE = [7, 0, 9, 40]


def patched(name, r=SCHEDULE, **options):
    return tome.set_r(tome.apply_patch(CASES[name].build(), **options), r)


def gradients(case, model):
    model.zero_grad()
    case(model).float().square().sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_each_r_has_one_program_of_fixed_shapes():
    """Dynamo makes a symbol of a number that changes: shapes that follow from a share compile for minutes."""
    model = tome.apply_patch(tiny_vit._timm(VisionTransformer, depth=1)())
    programs = []

    def backend(program, inputs):
        programs.append(program)
        return program

    compiled, x = torch.compile(model, backend=backend, fullgraph=True), tiny_vit.images()
    with torch.no_grad():
        for r in (0.1, 0.2):
            tome.set_r(model, r)
            made = compiled(x)
            model.r = 3  # what runs plainly in between makes no program out of date
            model(x)
            tome.set_r(model, r)
            torch.testing.assert_close(made, model(x))
        known = len(programs)
        compiled(x)
    assert len(programs) == known
    targets = {node.target for program in programs for node in program.graph.nodes}
    assert torch.sym_int not in targets


def test_a_part_may_be_compiled_alone():
    """Then some hooks of a block run in a program and others do not."""
    case, model = CASES["timm ViT"], patched("timm ViT", 3)
    with torch.no_grad():
        want = case(model)
        model.blocks[1].norm2.compile(backend="eager")
        torch.testing.assert_close(case(model), want)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("timm ViT", {}),
        ("timm ViT", {"unmerge": "residual", "trace_source": True}),
        ("timm EVA02", {"mode": "mean"}),
        ("torchvision", {"metric": "keys"}),
        ("transformers CLIP", {}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_a_trace_of_one_sample_or_two_serves_any_batch(name, options, batch):
    case, model = CASES[name], patched(name, **options)

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return tiny_vit.logits(self.model(x))

    with torch.no_grad():
        traced = torch.jit.trace(Plain(), case.inputs(batch), check_trace=False)
        for size in (1, 2, 3):
            torch.testing.assert_close(traced(case.inputs(size)), case(model, size), rtol=1e-4, atol=1e-5)


def test_export_puts_others_in_the_place_of_blocks():
    model = patched("OpenAI CLIP")
    exported = torch.export.export(nn.Sequential(model), (x := tiny_vit.images(),)).module()
    torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "timm ViT",
        "timm parallel",
        "timm EVA02, post-norm",
        "torchvision",
        "transformers DINOv2",
        "transformers CLIP",
        "transformers YOLOS",
        "OpenAI CLIP",
        "DINO of torch.hub",
    ],
)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_full_backward_hooks_see_gradients_and_change_none(name):
    case, model = CASES[name], patched(name)
    want, seen = gradients(case, model), []
    for block in case.blocks(model):
        # Of blocks themselves on the original grid.
        block.register_full_backward_hook(lambda module, given, got: seen.append(got[0].shape))
        block.register_full_backward_pre_hook(lambda module, got: None)
        for part in block.children():
            part.register_full_backward_hook(lambda module, given, got: None)
    for got, plain in zip(gradients(case, model), want, strict=True):
        torch.testing.assert_close(got, plain, rtol=1e-3, atol=1e-5)
    assert len(seen) == tiny_vit.DEPTH
    assert len(set(seen)) == 1


@pytest.mark.parametrize("change", [lambda x: x[:, :-1], lambda x: x.flip(1), lambda x: x.clone()])
def test_only_plain_views_of_tokens_pass_for_them(change):
    model = patched("timm ViT", 4)
    model.blocks = nn.ModuleList(model.blocks)
    tome.set_r(tome.apply_patch(model), 4)
    x = torch.randn(2, 65, 24)
    first = model.blocks[0](x)
    with pytest.raises(RuntimeError, match="do not come straight from the block before it"):
        model.blocks[1](change(first))
    torch.testing.assert_close(model.blocks[1](first.view_as(first)), model.blocks[1](first))


def test_replicas_of_data_parallel_merge():
    case, model = CASES["timm ViT"], patched("timm ViT")
    modules = list(model.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():  # as torch.nn.parallel.replicate goes on
        for name, child in module.named_children():
            replica._modules[name] = replicas[child]
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.view_as(parameter))
    with torch.no_grad():
        assert torch.equal(replicas[model](tiny_vit.images()), case(model))


@pytest.mark.parametrize("name", ["timm ViT", "torchvision", "OpenAI CLIP", "DINO of torch.hub"])
def test_no_samples_are_no_error_where_the_plain_model_takes_them(name):
    model = patched(name)
    assert CASES[name](model, 0).shape[0] == 0
    assert CASES[name](model, 2).isfinite().all()


def test_r_may_change_between_the_blocks_of_a_forward():
    model = patched("timm ViT", 4)
    x = model._pos_embed(model.patch_embed(tiny_vit.images()))
    for block in list(model.blocks)[:2]:
        x = block(x)
    model.r, given = 0, x.clone()
    assert torch.equal(model.blocks[2](x), model.blocks[2](given))


def test_what_holds_or_wraps_a_model_is_told_what_to_pass():
    model = tiny_vit._timm(VisionTransformer, depth=1)()
    with pytest.raises(TypeError, match=r"got SimpleNamespace \(pass its \.model\)"):
        tome.apply_patch(SimpleNamespace(model=model))
    model.blocks[0] = nn.Sequential(model.blocks[0])
    with pytest.raises(ValueError, match="patch the model first, and then wrap its blocks"):
        tome.apply_patch(model)
