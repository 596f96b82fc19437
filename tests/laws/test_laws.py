"""The laws of a patch, on a tiny real model of every family: those that draw, and vision transformers."""

import copy
import io
import itertools
import json
import threading
from functools import partial

import pytest
import tiny
import torch
from subjects import METHODS, QUICK, SUBJECTS, Subject, gradients, traces
from torch.utils.checkpoint import checkpoint

import tomesd

pytestmark = pytest.mark.usefixtures("no_grad")
DRAWING = [subject for subject in SUBJECTS.values() if set(subject.options) <= set(METHODS)]
# Laws that take long run on these: one for each way in which families differ.
FEW = [
    SUBJECTS[name]
    for name in ("sd", "svd", "pixart", "timm ViT", "timm EVA02", "transformers DINOv2")
    if name in SUBJECTS
]

# Options that compile to code of another kind.
COMPILED = (*QUICK, "layers", "as ToMe")

subjects = pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
drawing = pytest.mark.parametrize("subject", DRAWING, ids=lambda subject: subject.name)
each_option = pytest.mark.parametrize(
    ("subject", "option"),
    [pytest.param(s, o, id=f"{s.name}-{o}") for s in SUBJECTS.values() for o in s.options],
)
each_method = pytest.mark.parametrize(
    ("subject", "option"), [pytest.param(s, o, id=f"{s.name}-{o}") for s in DRAWING for o in s.options]
)
some_options = pytest.mark.parametrize(
    ("subject", "option"),
    [
        pytest.param(s, o, id=f"{s.name}-{o}")
        for s in SUBJECTS.values()
        for o in s.options
        if o in (*QUICK, "layers")
    ],
)


same = torch.equal


def close(got, want):
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@each_option
def test_a_patch_changes_the_output_and_removal_restores_it(subject: Subject, option):
    model = subject.build()
    plain = subject.call(model)
    subject.patch(model, subject.options[option])
    patched = subject.call(model)
    assert patched.shape == plain.shape
    assert 0 < (patched - plain).norm() < plain.norm()
    assert subject.remove(model) is model
    assert same(subject.call(model), plain)
    assert traces(model) == []


@each_option
def test_where_nothing_merges_the_output_is_plain_to_the_bit(subject: Subject, option):
    model = subject.build()
    plain = subject.call(model)
    subject.patch(model, subject.options[option], strength=0)
    assert same(subject.call(model), plain)


@subjects
def test_patching_anew_replaces_the_patch(subject: Subject):
    model = subject.build()
    one, other = list(subject.options.values())[:2]
    subject.patch(model, one)
    first = subject.call(model)
    hooks = len(traces(model))
    subject.patch(model, other)
    assert not same(subject.call(model), first)
    subject.patch(model, one)
    assert same(subject.call(model), first)
    assert len(traces(model)) == hooks
    subject.remove(model)
    assert traces(model) == []


@subjects
def test_a_patch_that_fails_half_way_leaves_the_model_as_it_was(subject: Subject, monkeypatch):
    """The last hook cannot be registered."""
    model = subject.build()
    option, *_ = subject.options.values()
    for before in (False, True):
        if before:
            subject.patch(model, option)
        want, found = subject.call(model), len(traces(model))
        count = 0

        def register(module, *args, original=torch.nn.Module.register_forward_hook, **kwargs):
            nonlocal count
            count += 1
            if count == 3:
                raise OSError("on purpose")
            return original(module, *args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(torch.nn.Module, "register_forward_hook", register)
            with pytest.raises(OSError, match="on purpose"):
                subject.patch(model, list(subject.options.values())[-1])
        assert len(traces(model)) == found
        assert same(subject.call(model), want)


@some_options
def test_samples_do_not_depend_on_their_batch(subject: Subject, option):
    model = subject.build()
    subject.patch(model, subject.options[option])
    torch.testing.assert_close(subject.call(model, b=1)[0], subject.call(model, b=3)[0], atol=1e-4, rtol=1e-3)


@some_options
@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_copies_are_patched_and_can_be_restored(subject: Subject, option, copied):
    model = subject.build()
    plain = subject.call(model)
    subject.patch(model, subject.options[option])
    patched = subject.call(model)
    if copied == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert same(subject.call(twin), patched)
    subject.remove(twin)
    assert traces(twin) == []
    assert same(subject.call(twin), plain)
    assert same(subject.call(model), patched)


@subjects
def test_the_state_dict_is_untouched_and_loads(subject: Subject):
    model = subject.build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    subject.patch(model, next(iter(subject.options.values())))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(map(torch.equal, after.values(), before.values()))
    model.load_state_dict(before)


@subjects
def test_autocast(subject: Subject):
    model = subject.build()
    for option in subject.options.values():
        subject.patch(model, option)
        want = subject.call(model)
        with torch.autocast("cpu", torch.bfloat16):
            got = subject.call(model).float()
        assert torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 0.7


@some_options
def test_checkpointing_gives_the_same_gradients(subject: Subject, option):
    model = subject.build().train()
    subject.patch(model, subject.options[option])
    with torch.enable_grad():
        subject.checkpoint(model, False)
        plain = gradients(subject, model)
        assert any(g is not None and g.abs().sum() > 0 for g in plain)
        subject.checkpoint(model, True)
        close(gradients(subject, model), plain)
    copy.deepcopy(model)  # nothing with a history is left on it


@drawing
def test_checkpointing_recomputes_each_of_several_forwards_as_it_was(subject: Subject):
    if not subject.travels:
        pytest.skip("passes nothing on to its blocks")
    model = subject.build().train()
    calls = ({"t": 500}, {"h": 8, "w": 32, "t": 100}, {"h": 8, "w": 8, "t": torch.tensor([7, 900])})
    for option in (o for o in subject.options if o in QUICK or o.startswith("stage")):
        subject.patch(model, subject.options[option])
        with torch.enable_grad():
            plain = gradients(subject, model, *calls)
            subject.checkpoint(model, True)
            close(gradients(subject, model, *calls), plain)
            subject.checkpoint(model, False)


@drawing
def test_parts_that_are_checkpointed_whole_give_the_same_gradients(subject: Subject):
    """As FSDP and the like wrap them: containers are called again in the backward pass."""
    model = subject.build()
    stages = [*getattr(model, "down_blocks", []), *getattr(model, "up_blocks", [])]
    if not stages:
        pytest.skip("has no such parts")

    def both():
        with torch.enable_grad():
            plain = gradients(subject, model, {"t": 300})
            try:
                for stage in stages:
                    stage.forward = partial(checkpoint, stage.forward, use_reentrant=False)
                return gradients(subject, model, {"t": 300}), plain
            finally:
                for stage in stages:
                    vars(stage).pop("forward", None)

    if not all(torch.equal(a, b) for a, b in zip(*both(), strict=True) if a is not None):
        pytest.skip("the network itself cannot")
    for option in (o for o in subject.options if o in QUICK):
        subject.patch(model, subject.options[option], max_downsample=8)
        close(*both())


@some_options
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_an_exception_inside_a_forward_leaves_the_model_usable(subject: Subject, option, before):
    model = subject.build()
    plain = subject.call(model)
    subject.patch(model, subject.options[option])
    patched = subject.call(model)

    def fail(*_):
        raise KeyError("on purpose")

    inside = subject.inside(model)
    handle = (inside.register_forward_pre_hook if before else inside.register_forward_hook)(fail)
    with torch.enable_grad(), pytest.raises(KeyError, match="on purpose"):
        subject.call(model)
    handle.remove()
    assert same(subject.call(copy.deepcopy(model)), patched)
    assert same(subject.call(model), patched)
    subject.remove(model)
    assert same(subject.call(model), plain)


def wrong_in_threads(subject: Subject, model, calls, want, times):
    """What four threads on one model got wrong."""
    wrong: list[object] = []

    def run(call, expected):
        try:
            with torch.no_grad():
                for _ in range(times):
                    got = subject.call(model, **call)
                    if got.shape != expected.shape or not torch.allclose(got, expected, atol=1e-4):
                        wrong.append(call)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=each) for each in zip(calls, want, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


@some_options
def test_threads_on_one_model_do_not_meet(subject: Subject, option):
    model = subject.build()
    subject.patch(model, subject.options[option])
    calls = [{"b": 1 + i % 2} for i in range(4)]
    if subject in DRAWING:
        calls = [{**call, "t": 900 - 200 * i, "h": 8 + 8 * (i % 2)} for i, call in enumerate(calls)]
    want = [subject.call(model, **call) for call in calls]
    assert wrong_in_threads(subject, model, calls, want, times=4) == []


@pytest.mark.parametrize(
    ("subject", "option"),
    [pytest.param(s, o, id=f"{s.name}-{o}") for s in FEW for o in s.options if o in COMPILED],
)
def test_compiles_to_one_graph_and_not_again_from_call_to_call(subject: Subject, option):
    torch.compiler.reset()
    model = subject.build()
    subject.patch(model, subject.options[option])
    calls = [{"t": t} for t in (500, 400, 1, 7)] if subject in DRAWING else [{}] * 4
    want = [subject.call(model, **call) for call in calls]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(subject.call(compiled, **calls[0]), want[0], atol=1e-4, rtol=1e-4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for call, expected in zip(calls[1:], want[1:], strict=True):
            torch.testing.assert_close(subject.call(compiled, **call), expected, atol=1e-4, rtol=1e-4)
    assert wrong_in_threads(subject, compiled, calls, want, times=4) == []
    torch.compiler.reset()


@pytest.mark.parametrize("name", sorted({"sd", "pixart", "timm ViT", "transformers DINOv2"} & set(SUBJECTS)))
def test_compiled_models_of_a_class_keep_apart(name):
    """By default torch.compile does not look at hooks, and would run one's code for the other."""
    subject = SUBJECTS[name]
    models = [subject.build(), subject.build()]
    subject.patch(models[1], next(iter(subject.options.values())))
    want = [subject.call(model) for model in models]
    assert not torch.equal(*want)
    compiled = [torch.compile(model, backend="eager") for model in models]
    for i in (0, 1, 0, 1):
        torch.testing.assert_close(subject.call(compiled[i]), want[i], atol=1e-5, rtol=1e-4)
    torch.compiler.reset()


# What holds for networks that draw alone: they know steps and sizes.


@each_method
def test_same_seed_same_result_whatever_ran_before(subject: Subject, option):
    model, method = subject.build(), subject.options[option]
    subject.patch(model, method)
    first = subject.call(model)
    state = torch.get_rng_state()
    subject.call(model, h=8, w=24, t=9)
    subject.call(model, t=400)
    assert same(subject.call(model), first)
    assert same(torch.get_rng_state(), state)
    if hasattr(method, "seed"):
        subject.patch(model, type(method).from_dict({**method.to_dict(), "seed": 4}))
        assert not same(subject.call(model), first)


@drawing
def test_the_timestep_moves_the_partition_unless_there_is_no_seed(subject: Subject):
    model = subject.build()
    for seed in (0, None):
        tomesd.apply_patch(model, tomesd.Merge(0.75, seed=seed))
        with tomesd.trace(model) as plans:
            for t in (500, 400):
                subject.call(model, t=t)
        first, second = plans[0], plans[len(plans) // 2]
        assert (first.timestep, second.timestep) == (500, 400)
        # Everything merges, so what stays is the partition's dst.
        assert same(first.map.keep, second.map.keep) == (seed is None)


@drawing
def test_explain_knows_the_tokens_of_each_block(subject: Subject):
    """Of a row with a wrong `down`, `up` or `stages` this is what shows."""
    model = subject.build()
    tomesd.apply_patch(model, max_downsample=8)
    h, w = 16, 24
    with tomesd.trace(model) as plans:
        subject.call(model, h, w, b=1)
    seen = {plan.block: (plan.downsample, plan.h * plan.w) for plan in plans}
    rows = tomesd.explain(model, 8 * h, 8 * w).rows
    assert seen == {row.name: (row.downsample, row.before) for row in rows if row.left_alone is None}
    assert seen


@each_method
def test_methods_are_plain_json_that_says_all_and_auto_and_explain_know_them(subject: Subject, option):
    model, method = subject.build(), subject.options[option]
    assert tomesd.Method.from_dict(json.loads(json.dumps(method.to_dict()))) == method
    subject.patch(model, method, max_downsample=8, auto=True)
    assert torch.isfinite(subject.call(model)).all()
    subject.patch(model, method, max_downsample=8)
    explanation = tomesd.explain(model, 512, 512)
    assert explanation.saved > 0
    assert str(method) in str(explanation)
    for wrong, error in ((-0.1, ValueError), (1.1, ValueError), ("0.5", TypeError), (True, TypeError)):
        with pytest.raises(error, match="ratio"):
            type(method)(wrong)


@drawing
@pytest.mark.parametrize("size", [(17, 23), (8, 24), (8, 8)], ids=str)
def test_odd_sizes(subject: Subject, size):
    model = subject.build()
    try:
        subject.call(model, *size, b=1)
    except (RuntimeError, ValueError) as error:
        pytest.skip(f"the network itself cannot: {error}")
    for method, max_downsample in itertools.product(subject.options.values(), (None, 8)):
        tomesd.apply_patch(model, method, max_downsample)
        assert torch.isfinite(subject.call(model, *size, b=1)).all()


@drawing
def test_levels_without_blocks_are_an_error_that_leaves_the_model_alone(subject: Subject):
    model = subject.build()
    finest = min(row.downsample for row in tomesd.explain(model).rows)
    for downsample in (1, 2, 4, 8):
        if downsample < finest:
            with pytest.raises(ValueError, match="nothing to merge"):
                tomesd.apply_patch(model, max_downsample=downsample)
            assert traces(model) == []
        else:
            tomesd.apply_patch(model, max_downsample=downsample)
            tomesd.remove_patch(model)


@drawing
def test_runs_in_bfloat16(subject: Subject):
    if not subject.plain:
        pytest.skip("the network itself cannot")
    model = subject.build()
    half = copy.deepcopy(model).to(torch.bfloat16)
    try:
        subject.call.call(half, *half_inputs(), torch.tensor(500))
    except RuntimeError as error:
        pytest.skip(f"the network itself cannot: {error}")
    tomesd.apply_patch(model)
    tomesd.apply_patch(half)
    want = subject.call(model)
    got = subject.call.call(half, *half_inputs(), torch.tensor(500))
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() < 0.2 * want.norm()


def half_inputs():
    import tiny

    return (part.to(torch.bfloat16) for part in tiny.inputs(16, 16, 2))


@pytest.mark.skipif("sdxl" not in SUBJECTS, reason="of diffusers")
def test_each_size_has_a_compiled_program_of_its_own():
    """With an open size planning would take minutes to compile. The first module that sees it fixes it."""
    model, programs = tiny.CASES["sdxl"].build(), []
    tomesd.apply_patch(model)

    def backend(graph, inputs):
        programs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(model.conv_in, backend=backend)
    for i, size in enumerate([(16, 16), (24, 32), (32, 24)]):
        x = torch.randn(2, 4, *size)
        torch.testing.assert_close(compiled(x), model.conv_in(x))
        assert len(programs) == i + 1
    torch.compiler.reset()


@pytest.mark.skipif("sdxl" not in SUBJECTS, reason="of diffusers")
@pytest.mark.parametrize("method", [tomesd.Merge(unmerge="copy"), tomesd.SampleKeys(probes=0)], ids=str)
def test_blocks_that_are_compiled_alone_share_a_program_for_each_number_of_tokens(method):
    """None is for the first block of a level alone; sizes are fixed at once, not by a guard of each use."""
    model, programs = tomesd.apply_patch(tiny.small_unet(mid_block_type=None), method), []

    def backend(graph, inputs):
        programs.append(len(torch._guards.TracingContext.get().fake_mode.shape_env.guards))
        return graph

    torch.compiler.reset()
    call, heights = tiny.CASES["sd"], (8, 12)
    wanted = [call(model, h, 8) for h in heights]
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    for i, h in enumerate(heights):
        torch.testing.assert_close(call(model, h, 8), wanted[i])
        assert len(programs) == i + 1
    torch.compiler.reset()
    assert max(programs) <= 2  # of the side that changed, and of the number of tokens
