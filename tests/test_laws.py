"""The laws of a patch, on a tiny real network of every family."""

import copy
import io
from functools import partial

import pytest
import tiny
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tomesd

CASES = tiny.CASES
OPTIONS = {
    "default": {},
    "exact": {"matching": "exact"},
    "reuse": {"reuse": 2},
    "stage": {"merge_stage": True},
    "proportional": {"prop_attn": True, "merge_crossattn": True},
    "keys": {"keys_only": True},
    "stage, proportional": {"merge_stage": True, "prop_attn": True},
    "stage, reuse": {"merge_stage": True, "reuse": 1},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def possible(case, options):
    return case is not CASES["ldm"] or "prop_attn" not in options


@pytest.fixture(scope="module", params=CASES)
def case(request):
    case = CASES[request.param]
    return case, case.build()


@pytest.fixture(autouse=True)
def _unpatched(request):
    options = request.node.callspec.params.get("options", {}) if hasattr(request.node, "callspec") else {}
    if "case" in request.fixturenames and not possible(request.getfixturevalue("case")[0], options):
        pytest.skip("CompVis' attention takes no bias")
    yield
    if "case" in request.fixturenames:
        tomesd.remove_patch(request.getfixturevalue("case")[1])


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def traces(model):
    """Everything on a model that tomesd could have left there."""
    for module in model.modules():
        yield from (name for name in vars(module) if "tome" in name)
        yield from (hook for name, hooks in vars(module).items() if name.endswith("_hooks") for hook in hooks)
        if "tomesd" in type(module).__module__:
            yield type(module)


@options
def test_merging_changes_the_output_and_removal_restores_it(case, options):
    call, model = case
    plain = call(model)
    assert tomesd.apply_patch(model, 0.5, **options) is model
    merged = call(model)
    assert merged.shape == plain.shape
    assert 0 < (merged - plain).norm() < plain.norm()
    assert tomesd.remove_patch(model) is model
    assert torch.equal(call(model), plain)
    assert list(traces(model)) == []


@options
def test_ratio_0_is_the_unpatched_model_to_the_bit(case, options):
    call, model = case
    plain = call(model)
    tomesd.apply_patch(
        model, ratio=0, max_downsample=8, merge_mlp=True, **{"merge_crossattn": True, **options}
    )
    assert torch.equal(call(model), plain)


def test_patching_twice_is_patching_once(case):
    call, model = case
    tomesd.apply_patch(model, 0.25)
    once = call(model)
    tomesd.apply_patch(model, 0.75)
    assert not torch.equal(call(model), once)
    tomesd.apply_patch(model, 0.25)
    assert torch.equal(call(model), once)
    tomesd.remove_patch(model)
    assert list(traces(model)) == []


@options
def test_same_seed_same_result_whatever_ran_before(case, options):
    call, model = case
    tomesd.apply_patch(model, seed=3, **options)
    first = call(model)
    state = torch.get_rng_state()
    call(model, h=8, w=24, t=9)
    call(model, t=400)
    torch.randn(5)
    torch.set_rng_state(state)
    assert torch.equal(call(model), first)
    assert torch.equal(torch.get_rng_state(), state)
    tomesd.apply_patch(model, seed=4, **options)
    assert not torch.equal(call(model), first)


def test_timestep_moves_the_partition(case):
    _, model = case
    tomesd.apply_patch(model)
    with tomesd.trace(model) as plans:
        for t in (500, 400):
            case[0](model, t=t)
    half = len(plans) // 2
    assert (plans[0].timestep, plans[half].timestep) == (500, 400)
    # keep of a fully merged map is dst alone; at ratio .5 the survivors of two steps differ by partition.
    assert not torch.equal(plans[0].map.keep, plans[half].map.keep)


@options
def test_samples_do_not_depend_on_their_batch(case, options):
    call, model = case
    tomesd.apply_patch(model, **options)
    together = call(model, b=3)
    alone = call(model, b=1)
    torch.testing.assert_close(alone[0], together[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("max_downsample", [None, 1, 2, 4, 8])
@pytest.mark.parametrize("size", [(17, 23), (8, 24), (8, 8)])
def test_odd_sizes(case, size, max_downsample):
    call, model = case
    try:
        call(model, *size, b=1)
    except (RuntimeError, ValueError) as error:
        pytest.skip(f"the network itself cannot: {error}")
    levels = {row.downsample for row in tomesd.explain(model).rows}
    if max_downsample is not None and max_downsample < min(levels):
        with pytest.raises(ValueError, match="nothing to merge"):
            tomesd.apply_patch(model, max_downsample=max_downsample)
        return
    for options in (options for options in OPTIONS.values() if possible(case[0], options)):
        tomesd.apply_patch(model, 0.6, max_downsample, merge_mlp=True, **{"merge_crossattn": True, **options})
        assert torch.isfinite(call(model, *size, b=1)).all()


@options
@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_copies_stay_patched_and_can_be_restored(case, copied, options):
    call, model = case
    plain = call(model)
    tomesd.apply_patch(model, **options)
    merged = call(model)
    if copied == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert torch.equal(call(twin), merged)
    tomesd.remove_patch(twin)
    assert list(traces(twin)) == []
    assert torch.equal(call(twin), plain)
    assert torch.equal(call(model), merged)


def test_state_dict_is_untouched_and_loads(case):
    _, model = case
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tomesd.apply_patch(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    model.load_state_dict(before)


def test_runs_in_bfloat16_and_under_autocast(case):
    call, model = case
    tomesd.apply_patch(model)
    merged = call(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert (call(model).float() - merged).norm() < 0.2 * merged.norm()
    if hasattr(model, "config"):  # CompVis' timestep embedding is float32 only
        half = copy.deepcopy(model).to(torch.bfloat16)
        x, text = (part.to(torch.bfloat16) for part in tiny.inputs(16, 16, 2))
        output = call.call(half, x, text, torch.tensor(500))
        assert output.dtype == torch.bfloat16
        assert (output.float() - merged).norm() < 0.2 * merged.norm()


@options
def test_gradients_flow_and_checkpointing_gives_the_same(case, options):
    call, model = case
    model.train()
    tomesd.apply_patch(model, **options)
    torch.set_grad_enabled(True)
    parameters = [p for name, p in model.named_parameters() if "attn1.to_q" in name]

    def gradients():
        return torch.autograd.grad(call(model).square().mean(), parameters, allow_unused=True)

    toggle = [m for m in model.modules() if hasattr(m, "checkpoint") or hasattr(m, "use_checkpoint")]
    try:
        if getattr(model, "_supports_gradient_checkpointing", False):
            plain = gradients()
            model.enable_gradient_checkpointing()
            recomputed = gradients()
            model.disable_gradient_checkpointing()
        else:  # CompVis' code checkpoints by default, UNet3D never
            recomputed = gradients()
            for module in toggle:
                module.checkpoint = module.use_checkpoint = False
            plain = gradients()
    finally:
        model.eval()
        for module in toggle:
            module.checkpoint = module.use_checkpoint = True
    assert any(g is not None and g.abs().sum() > 0 for g in plain)
    for a, b in zip(plain, recomputed, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@options
def test_checkpointing_recomputes_each_forward_as_it_was(case, options):
    """Two forwards of other timesteps and sizes before one backward."""
    call, model = case
    if not getattr(model, "_supports_gradient_checkpointing", False):
        pytest.skip("this network cannot checkpoint, or as CompVis' passes nothing on to its blocks")
    model.train()
    tomesd.apply_patch(model, **options)
    torch.set_grad_enabled(True)
    parameters = [p for name, p in model.named_parameters() if "attn1.to_q" in name]

    def gradients():
        loss = call(model, t=500).square().mean() + call(model, h=8, w=32, t=100).square().mean()
        loss = loss + call(model, h=8, w=8, t=torch.tensor([7, 900])).square().mean()
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    plain = gradients()
    model.enable_gradient_checkpointing()
    recomputed = gradients()
    model.disable_gradient_checkpointing()
    model.eval()
    for a, b in zip(plain, recomputed, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@options
def test_parts_that_are_checkpointed_whole_give_the_same_gradients(case, options):
    """As FSDP and the like wrap them: containers are called again in the backward pass."""
    call, model = case
    stages = [*getattr(model, "down_blocks", []), *getattr(model, "up_blocks", [])]
    if not stages or options.get("reuse", 0) > 1:
        pytest.skip("no such parts, or plans that outlast a forward")
    tomesd.apply_patch(model, max_downsample=8, **options)
    torch.set_grad_enabled(True)
    parameters = [p for name, p in model.named_parameters() if "attn1.to_q" in name]

    def gradients():
        return torch.autograd.grad(call(model, t=300).square().mean(), parameters, allow_unused=True)

    plain = gradients()
    try:
        for stage in stages:
            stage.forward = partial(checkpoint, stage.forward, use_reentrant=False)
        recomputed = gradients()
    finally:
        for stage in stages:
            vars(stage).pop("forward", None)
    for a, b in zip(plain, recomputed, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def fail_once(call, model, register):
    """Calls a model whose first attn1 fails, before or after its own work."""
    failing = next(m for name, m in model.named_modules() if name.endswith("attn1") and "motion" not in name)

    def fail(*_):
        raise KeyError("on purpose")

    handle = register(failing, fail)
    with pytest.raises(KeyError, match="on purpose"):
        call(model)
    handle.remove()


@options
def test_a_model_can_be_copied_after_a_forward_that_failed_in_training(case, options):
    call, model = case
    tomesd.apply_patch(model, **options)
    torch.set_grad_enabled(True)
    fail_once(call, model, nn.Module.register_forward_pre_hook)
    twin = copy.deepcopy(model)
    assert torch.equal(call(twin), call(model))


@options
def test_an_exception_inside_a_forward_leaves_the_model_usable(case, options):
    call, model = case
    plain = call(model)
    tomesd.apply_patch(model, merge_mlp=True, **options)
    merged = call(model)
    fail_once(call, model, nn.Module.register_forward_hook)
    assert torch.equal(call(model), merged)
    tomesd.remove_patch(model)
    assert torch.equal(call(model), plain)


@pytest.mark.parametrize("name", ["default", "stage, reuse"])
def test_compiles_as_one_graph_and_not_again_from_step_to_step(case, name):
    call, model = case
    if not hasattr(model, "config"):
        pytest.skip("CompVis' code breaks graphs unpatched")
    torch.compiler.reset()
    tomesd.apply_patch(model, **OPTIONS[name])
    expected = [call(model, t=t) for t in (500, 400, 1)]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(call(compiled, t=500), expected[0], atol=1e-4, rtol=1e-4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for t, want in zip((400, 1), expected[1:], strict=True):
            torch.testing.assert_close(call(compiled, t=t), want, atol=1e-4, rtol=1e-4)
    torch.compiler.reset()
