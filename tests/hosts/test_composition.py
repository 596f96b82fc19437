"""Each method beside what else people put on a UNet: `ROWS` is the table in docs/composition.md.

A network with the feature alone is the reference. Where a method goes with it, the method costs as much
beside the feature as it does alone, whichever came first, and leaves the feature alone when it is removed.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace

import diffusers as D
import features as on
import pytest
import test_pipelines
import tiny
import torch
import torch.nn.functional as F
from table import EXPECTED, METHODS, NO, ROWS, UNUSED, WARNED, Row

import tomesd

pytestmark = pytest.mark.usefixtures("no_grad")
PAGE = Path(__file__).parents[2] / "docs" / "composition.md"


def errors(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]


@cache
def alone(method: tomesd.Method | None, pixart: bool) -> list[torch.Tensor]:
    """The steps of a network with a method and nothing else."""
    made = on.network(pixart)
    if method is not None:
        tomesd.apply_patch(made, method)
    return on.steps(made, pixart)


def run(row: Row, method: tomesd.Method, before: bool) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    """A fresh network with a row's feature and a method that came before or after it, and its steps."""
    made = on.network(row.pixart)
    if before:
        tomesd.apply_patch(made, method)
    row.put(made)
    if not before:
        tomesd.apply_patch(made, method)
    return made, on.steps(made, row.pixart)


@cache
def reference(row: Row) -> list[torch.Tensor]:
    made = on.network(row.pixart)
    row.put(made)
    return on.steps(made, row.pixart)


def without(method: tomesd.Method, bare: tuple[str, ...]) -> tomesd.Method:
    """A method without sizes of keys or without probes."""
    off, given = {"prop_attn": False, "probes": 0}, method.to_dict()
    return type(method).from_dict({**given, **{name: off[name] for name in bare if name in given}})


def check(row: Row, method: tomesd.Method) -> None:
    plain = alone(None, row.pixart)
    method_alone = alone(without(method, row.bare), row.pixart)
    wanted = reference(row)
    assert row.same == (max(errors(wanted, plain)) < 1e-3)
    made, both = run(row, method, before=True)
    _, other_order = run(row, method, before=False)
    for a, b in zip(both, other_order, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    if row.same or row.cell(method) == UNUSED:
        assert max(errors(both, method_alone)) < 1e-3
    else:
        for beside, by_itself in zip(errors(both, wanted), errors(method_alone, plain), strict=True):
            assert 0 < beside < 1.6 * by_itself + 0.004
    tomesd.remove_patch(made)
    assert max(errors(on.steps(made, row.pixart), wanted)) < 1e-5


def cases():
    for row in ROWS:
        for method in METHODS if row.put else ():
            yield pytest.param(row, method, id=f"{row.name}-{method}")


@pytest.mark.parametrize(("row", "method"), cases())
def test_each_cell_of_the_table(row, method, monkeypatch):
    if row.name == "xformers":
        monkeypatch.setattr("diffusers.models.attention_processor.xformers", XFORMERS)
    if row.cell(method) in (NO, WARNED):
        reference(row)
        for before in (True, False):
            if row.cell(method) == WARNED:
                with pytest.warns(UserWarning, match=f"tomesd.*({row.says})"), pytest.raises(RuntimeError):
                    run(row, method, before)
                continue
            with pytest.raises(ValueError, match=f"tomesd.*({row.says})"):
                run(row, method, before)
    else:
        check(row, method)


def test_the_page_has_this_table():
    page = PAGE.read_text()
    table = [line for line in page.splitlines() if line.startswith("| ") and line.count(" | ") == 5]
    assert table[1:] == [row.line for row in ROWS]  # without its head
    for row in ROWS:
        assert row.put or row.tests or row.cells == (EXPECTED,)
        for name in row.tests:
            file, _, test = name.partition("::")
            assert f"def {test}(" in (PAGE.parents[1] / "tests" / file).read_text()


def attend(query, key, value, attn_bias=None, op=None, scale=None):
    return F.scaled_dot_product_attention(query, key, value, attn_bias, scale=scale)


XFORMERS = SimpleNamespace(ops=SimpleNamespace(memory_efficient_attention=attend))


@pytest.mark.parametrize(
    "method",
    [tomesd.Merge(prop_attn=False), tomesd.SampleKeys(), tomesd.MergeStage(prop_attn=False)],
    ids=str,
)
def test_what_needs_no_bias_gives_none(method, monkeypatch):
    """So kernels that take none, as those of xformers, SageAttention and flash, are enough."""
    masks = []

    def attention(*args, original=F.scaled_dot_product_attention, attn_mask=None, **options):
        masks.append(attn_mask)
        return original(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    alone.__wrapped__(method, False)
    assert masks
    assert not [mask for mask in masks if mask is not None]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_guidance_may_end_early(method):
    """In the middle of a loop the batch becomes one half of what it was."""

    def cut(pipe, step, timestep, tensors):
        if step == 1:
            pipe._guidance_scale = 0.0
            return {"prompt_embeds": tensors["prompt_embeds"][-1:]}
        return {}

    options = dict(callback_on_step_end=cut, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    pipe = tiny.sd()
    whole = tiny.generate(pipe, num_inference_steps=4)
    plain = tiny.generate(pipe, num_inference_steps=4, **options)
    tomesd.apply_patch(pipe, method)
    with tomesd.trace(pipe) as plans:
        merged = tiny.generate(pipe, num_inference_steps=4, **options)
    assert [len(plan.map.index) for plan in plans[:: len(plans) // 4]] == [2, 2, 1, 1]
    assert not torch.equal(whole, plain)
    assert 0 < errors([merged], [plain])[0] < 0.1


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_ip_adapter(method):
    pipe = tiny.sd()
    tomesd.apply_patch(pipe, method, 8)
    pipe.unet._load_ip_adapter_weights([test_pipelines.ip_adapter_state(pipe.unet)])
    call = dict(ip_adapter_image_embeds=[torch.randn(2, 1, tiny.TEXT)])
    mask = torch.ones(1, 1, 128, 128)
    mask[..., :64] = 0
    masked = {**call, "cross_attention_kwargs": {"ip_adapter_masks": [mask]}}
    with tomesd.patched(pipe, 0.0):
        plain, plain_masked = tiny.generate(pipe, **call), tiny.generate(pipe, **masked)
    assert not torch.equal(plain, plain_masked)
    assert 0 < errors([tiny.generate(pipe, **call)], [plain])[0] < 0.3
    if method == tomesd.MergeStage():
        with pytest.raises(ValueError, match="ip_adapter_masks belong to all tokens"):
            tiny.generate(pipe, **masked)
    else:
        assert 0 < errors([tiny.generate(pipe, **masked)], [plain_masked])[0] < 0.1


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_controlnet_union(method):
    unet = tiny.sdxl_unet()
    control = D.ControlNetUnionModel(
        block_out_channels=(16, 32, 32),
        down_block_types=unet.config.down_block_types,
        layers_per_block=1,
        attention_head_dim=4,
        transformer_layers_per_block=(1, 2, 3),
        use_linear_projection=True,
        cross_attention_dim=2 * tiny.TEXT,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + tiny.TEXT,
        num_control_type=2,
        num_trans_channel=16,
        num_trans_head=2,
        num_proj_channel=16,
        conditioning_embedding_out_channels=(8, 8, 8, 8),
    )
    parts = dict(unet=unet, controlnet=tiny._awake(control.eval()))
    pipe = tiny.sdxl(D.StableDiffusionXLControlNetUnionPipeline, **parts)
    call = dict(control_image=[test_pipelines.picture()], control_mode=[0], height=128, width=128)
    plain = tiny.generate(pipe, **call)
    tomesd.apply_patch(pipe, method)
    assert {row.name.split(".")[0] for row in tomesd.explain(pipe).rows} == {"unet", "controlnet"}
    assert 0 < errors([tiny.generate(pipe, **call)], [plain])[0] < 0.3


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_training_after_inference(method):
    model = tiny.small_unet()
    tomesd.apply_patch(model, method)
    case = tiny.CASES["sd"]
    with torch.inference_mode():
        seen = case(model)
    with torch.no_grad():
        torch.testing.assert_close(case(model), seen.clone())
    with torch.enable_grad():
        out = case(model)
        out.square().mean().backward()
    torch.testing.assert_close(out.detach(), seen.clone(), atol=1e-5, rtol=1e-4)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.weight.grad.abs().sum() > 0


def test_which_caches_of_diffusers_fit_unets():
    model = tiny.small_unet()
    assert not hasattr(model, "enable_cache")
    with pytest.raises(IndexError, match="pop from empty list"):
        on.first_block_cache(model)
    plain = on.steps(model, False)
    for switch in (on.mag_cache, on.taylor("^blocks.*attn")):
        other = tiny.small_unet()
        switch(other)
        assert max(errors(on.steps(other, False), plain)) == 0
