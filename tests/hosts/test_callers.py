"""Hosts that call attention in their own way: all of it works, is left as it is, or is refused by name."""

import functools
import types
import warnings

import acting
import diffusers as D
import pytest
import tiny
import torch
from acting import call, network
from diffusers.hooks import layer_skip
from diffusers.hooks import smoothed_energy_guidance_utils as smoothed
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.pipelines.deprecated.text_to_video_synthesis.pipeline_text_to_video_zero import (
    CrossFrameAttnProcessor2_0,
)
from subjects import traces

import tomesd
from tomesd import Merge, MergeKeys, MergeStage, SampleKeys
from tomesd.hosts.unets import FAMILIES

pytestmark = pytest.mark.usefixtures("no_grad")
N, HALF, SAMPLED = 192, 96, 48
ALL = Merge(parts=("attn", "cross", "mlp"))


@pytest.mark.parametrize(
    ("how", "method", "seen", "changes"),
    [
        ("keys and values", Merge(), [(HALF, HALF)], True),
        ("keys and values", SampleKeys(probes=0), [(N, SAMPLED)], True),
        ("keys by position", Merge(), [(HALF, HALF)], True),
        ("keys by position", SampleKeys(probes=0), [(N, SAMPLED)], True),
        ("values of others", Merge(), [(HALF, HALF)], True),
        ("values of others", SampleKeys(probes=0), [(N, SAMPLED)], True),
        ("keys of others", Merge(), [(HALF, N)], True),
        ("keys of others", SampleKeys(probes=0), [(N, SAMPLED)], True),
        ("more keys", Merge(), [(HALF, 2 * N)], True),
        ("more keys", SampleKeys(probes=0), [(N, 2 * N)], False),
        ("twice", Merge(), [(HALF, HALF)] * 2, True),
        ("twice", SampleKeys(probes=0), [(N, SAMPLED)] * 2, True),
        ("a half again", Merge(), [(HALF, HALF), (N, N)], True),
        ("a half again", SampleKeys(probes=0), [(N, SAMPLED), (N, N)], True),
        ("as one sequence", Merge(), [(2 * N, 2 * N)], False),
        ("as one sequence", SampleKeys(probes=0), [(2 * N, 2 * N)], False),
        ("windows", Merge(), [(N // 2, N // 2)], False),
        ("windows", SampleKeys(probes=0), [(N // 2, N // 2)], False),
        ("never", ALL, [], True),
        ("without its norm", Merge(), [(HALF, HALF)], True),
        ("without its norm", SampleKeys(probes=0), [(N, SAMPLED)], True),
    ],
    ids=str,
)
def test_a_call_is_merged_where_it_is_about_the_tokens_and_else_left_as_it_is(how, method, seen, changes):
    net = network(how)
    plain, attn = call(net), net.blocks()[0].attn1
    attn.seen.clear()
    tomesd.apply_patch(net, method)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = call(net)
    assert attn.seen == seen
    assert ((out - plain).norm() > 0) == changes
    assert (out - plain).norm() < 0.1 * plain.norm()
    says = "attn1 was given keys of its own" if how == "more keys" else "attn1 was called with"
    left = how in ("a half again", "as one sequence", "windows") or not changes
    assert [says in str(warning.message) for warning in caught] == [True] * left


def test_attention_in_windows_of_merged_tokens_is_named():
    net = tomesd.apply_patch(network("windows"), MergeStage())
    with pytest.warns(
        UserWarning, match=r"attn1 was called with \[4, 48\] tokens, not with the 96 of each image"
    ):
        call(net)


@pytest.mark.parametrize(
    "method", [ALL, Merge(unmerge="copy"), SampleKeys(), SampleKeys(probes=8), MergeStage()], ids=str
)
def test_how_the_tokens_are_handed_over_makes_no_difference(method):
    outputs = []
    for how in ("plain", "keys and values", "keys by position", "twice", "in place"):
        net = network(how)
        tomesd.apply_patch(net, method)
        outputs.append(call(net))
    for output in outputs:
        torch.testing.assert_close(output, outputs[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", [ALL, SampleKeys(), MergeStage()], ids=str)
@pytest.mark.parametrize("part", ["network", "container", "block", "attention"])
def test_a_forward_may_be_replaced_by_one_that_names_nothing(part, method, monkeypatch):
    """AUTOMATIC1111 does so at the class; others at the module."""
    if part == "attention" and method == SampleKeys():  # it may need all queries: there are no probes
        method = SampleKeys(probes=0)
    net = network()
    plain = call(net)
    tomesd.apply_patch(net, method)
    want = call(net)
    tomesd.remove_patch(net)
    attn = net.blocks()[0].attn1
    module = {"network": net, "container": net.input_blocks[0], "block": net.blocks()[0], "attention": attn}[
        part
    ]
    kind = type(module)
    with monkeypatch.context() as patched:
        forward = kind.forward
        patched.setattr(kind, "forward", lambda *args, **kwargs: forward(*args, **kwargs))
        tomesd.apply_patch(net, method)
        assert torch.equal(call(net), want)
        tomesd.remove_patch(net)
    module.forward = lambda *args, **kwargs: forward(module, *args, **kwargs)
    tomesd.apply_patch(net, method)
    assert torch.equal(call(net), want)
    tomesd.remove_patch(net)
    assert torch.equal(call(net), plain)


@pytest.mark.parametrize(
    ("build", "more"), [(tiny.small_unet, ()), (tiny.controlnet_xs, (torch.ones(2, 3, 32, 32),))]
)
def test_a_network_may_be_called_by_its_forward(build, more):
    """Also after a call that has failed half way, of another step."""
    net, (x, text) = build(), tiny.inputs(16, 16, 2)
    tomesd.apply_patch(net, max_downsample=8)
    want = [net(x, t, text, *more).sample for t in (500, 100)]
    assert not torch.equal(*want)
    with pytest.raises(RuntimeError):
        net.forward(x, 900, text[..., :1], *more)
    for t, expected in zip((500, 100), want, strict=True):
        assert torch.equal(net.forward(x, t, text, *more).sample, expected)


def test_blocks_on_tokens_of_another_kind_are_left_alone():
    """In the time stacks of video networks they are of a class of the same name."""
    net = network()
    container = net.input_blocks[0]
    container.time_stack = torch.nn.ModuleList([acting.BasicTransformerBlock()])
    call(net)
    assert all("time_stack" not in row.name for row in tomesd.explain(net).rows)
    plain = call(net)
    tomesd.apply_patch(net, ALL)
    assert 0 < (call(net) - plain).norm() < 0.2 * plain.norm()


# Attention processors of diffusers.


def follows(unet):
    """How far the second frame moves when the first one does."""
    x, text = tiny.inputs(16, 16, 3)
    other = x.clone()
    other[0] = -other[0]
    return (unet(x, 500, text).sample - unet(other, 500, text).sample)[1].abs().max()


def test_cross_frame_attention_stays_that():
    unet = tiny.small_unet()
    unet.set_attn_processor(CrossFrameAttnProcessor2_0(batch_size=1))
    plain, case = follows(unet), tiny.CASES["sd"]
    assert plain > 0
    alone = case(unet, b=3)
    for method in (Merge(), SampleKeys(), MergeStage()):
        tomesd.apply_patch(unet, method)
        assert 0.2 * plain < follows(unet) < 5 * plain
        assert not torch.equal(case(unet, b=3), alone)
    unknown = unet.attn_processors
    for method in (MergeKeys(), Merge(prop_attn=True), MergeStage(prop_attn=True)):
        with pytest.raises(ValueError, match=r"attn1 has the processor CrossFrameAttnProcessor2_0, of which"):
            tomesd.apply_patch(unet, method)
        unet.set_attn_processor(AttnProcessor2_0())
        tomesd.apply_patch(unet, method)
        unet.set_attn_processor(dict(unknown))
        with pytest.raises(ValueError, match=r"attn1 has the processor CrossFrameAttnProcessor2_0, of which"):
            case(unet, b=3)


def test_perturbed_attention_guidance_takes_fewer_keys_where_it_attends():
    pipe = tiny.sd(D.StableDiffusionPAGPipeline, pag_applied_layers=["down_blocks.0", "up_blocks.3"])
    plain = tiny.generate(pipe, height=128, width=128)
    errors = {}
    for method in (Merge(), SampleKeys(0.5), SampleKeys(0.2)):
        tomesd.apply_patch(pipe, method)
        errors[method] = (tiny.generate(pipe, height=128, width=128) - plain).norm()
    assert 0 < errors[SampleKeys(0.2)] < errors[SampleKeys(0.5)] < plain.norm()


FIRST = "down_blocks.0.attentions.0.transformer_blocks"


@pytest.mark.parametrize("method", [Merge(), SampleKeys(), MergeKeys(), MergeStage()], ids=str)
def test_guiders_of_diffusers_still_guide(method):
    """Modular pipelines put them on a block for one of the calls of a step."""
    net, case = tiny.small_unet(), tiny.CASES["sd"]
    free = case(net)
    layer_skip._apply_layer_skip_hook(
        net,
        layer_skip.LayerSkipConfig(
            [0], FIRST, skip_attention=False, skip_attention_scores=True, skip_ff=False
        ),
    )
    plain = case(net)
    tomesd.apply_patch(net, method)
    assert 0 < (case(net) - plain).norm() < 0.6 * (plain - free).norm()
    net = tiny.small_unet()
    smoothed._apply_smoothed_energy_guidance_hook(net, smoothed.SmoothedEnergyGuidanceConfig([0], FIRST), 1e7)
    plain = case(net)
    if isinstance(method, Merge | MergeStage):
        with pytest.raises(ValueError, match="attn1 is under diffusers' smoothed energy guidance"):
            tomesd.apply_patch(net, method)
    else:
        tomesd.apply_patch(net, method)
        assert 0 < (case(net) - plain).norm() < 0.6 * (plain - free).norm()


def test_attend_and_excite_draws():
    pipe = tiny.sd(D.StableDiffusionAttendAndExcitePipeline)
    call = dict(token_indices=[2], num_inference_steps=2, output_type="latent", attn_res=(16, 16))
    says = "attn2 has the processor AttendExciteAttnProcessor, which keeps"
    with torch.enable_grad():
        tomesd.apply_patch(pipe, MergeStage())
        with pytest.raises(ValueError, match=says):
            pipe("a cat", height=128, width=128, **call)
        for method in (Merge(), SampleKeys()):
            tomesd.apply_patch(pipe, method)
            assert torch.isfinite(pipe("a cat", height=128, width=128, **call).images).all()
    with pytest.raises(ValueError, match=says):  # the pipeline leaves its processors there
        tomesd.apply_patch(pipe, MergeStage())


def test_self_attention_guidance_reads_the_map_of_one_block():
    pipe = tiny.sd(D.StableDiffusionSAGPipeline)
    for method, max_downsample in (
        (Merge(), 4),
        (SampleKeys(), 4),
        (MergeStage(), 4),
        (Merge(), 8),
        (SampleKeys(), 8),
    ):
        pipe.unet.set_attn_processor(AttnProcessor2_0())
        tomesd.apply_patch(pipe, method, max_downsample)
        if max_downsample == 8:
            with pytest.raises(
                ValueError, match=r"mid_block.*attn1 has the processor CrossAttnStoreProcessor"
            ):
                tiny.generate(pipe, sag_scale=0.5, output_type="latent")
        else:
            assert torch.isfinite(tiny.generate(pipe, sag_scale=0.5)).all()


def test_processors_of_which_no_sample_can_be_taken_are_refused():
    class Elsewhere(AttnProcessor2_0):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return hidden_states

    unet, case = tiny.small_unet(), tiny.CASES["sd"]
    tomesd.apply_patch(unet, SampleKeys())
    unet.set_attn_processor(Elsewhere())
    with pytest.raises(
        ValueError,
        match="processor Elsewhere, of which SampleKeys could take no keys: it did not call to_k and then",
    ):
        case(unet)


class Blurred(AttnProcessor2_0):
    """Needs the square of the image's tokens, as smoothed energy guidance and masks of regions do."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        side = int(hidden_states.shape[1] ** 0.5)
        square = hidden_states.unflatten(1, (side, side)).mT
        hidden_states = hidden_states + torch.nn.functional.avg_pool2d(square, 3, 1, 1).mT.flatten(1, 2)
        return super().__call__(attn, hidden_states, *args, **kwargs)


@pytest.mark.parametrize("method", [Merge(0.75), MergeStage(0.75), SampleKeys(), MergeKeys()], ids=str)
def test_what_may_need_the_places_of_tokens_is_named_where_it_has_merged_ones(method):
    unet, case = tiny.small_unet(), tiny.CASES["sd"]
    unet.set_attn_processor(Blurred())
    plain = case(unet)
    if method == MergeKeys():
        with pytest.raises(ValueError, match="processor Blurred, of which it is not known"):
            tomesd.apply_patch(unet, method)
    elif method == SampleKeys():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tomesd.apply_patch(unet, method)
            assert 0 < (case(unet) - plain).norm() < 0.1 * plain.norm()
    else:
        with pytest.warns(UserWarning, match="attn1 has the processor Blurred, and Merge"):
            tomesd.apply_patch(unet, method)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            case(unet)  # it has been said
        unet.set_attn_processor(AttnProcessor2_0())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tomesd.apply_patch(unet, method)
        unet.set_attn_processor(Blurred())
        with pytest.warns(UserWarning, match="attn1 has the processor Blurred, and Merge"):
            case(unet)


def test_a_forward_that_somebody_has_put_on_attention_is_given_no_weights_of_keys():
    """prompt-to-prompt and MasaCtrl put one there, to look at maps of attention."""
    unet, case = tiny.small_unet(), tiny.CASES["sd"]
    plain = case(unet)

    def forward(hidden_states, encoder_hidden_states=None, attention_mask=None, *, attn, **others):
        if attention_mask is not None:
            raise RuntimeError("of a mask it knows nothing")
        return type(attn).forward(attn, hidden_states, encoder_hidden_states)

    for block in unet.modules():
        if isinstance(block, BasicTransformerBlock):
            block.attn1.forward = functools.partial(forward, attn=block.attn1)
    says = "attn1 has a forward that somebody has put on it"
    for method in (Merge(), MergeStage()):
        with pytest.warns(UserWarning, match=says):
            tomesd.apply_patch(unet, method)
        assert 0 < (case(unet) - plain).norm() < 0.2 * plain.norm()
    with pytest.warns(UserWarning, match=says + ".*MergeKeys: use SampleKeys"):
        tomesd.apply_patch(unet, MergeKeys())
    with pytest.raises(RuntimeError, match="knows nothing"):
        case(unet)


def test_what_was_patched_before_comes_back_whatever_is_on_it_by_then():
    unet = tiny.small_unet()
    tomesd.apply_patch(unet, MergeKeys())
    with tomesd.patched(unet, SampleKeys()):
        unet.set_attn_processor(Blurred())
    with pytest.raises(ValueError, match="processor Blurred, of which it is not known"):
        tiny.CASES["sd"](unet)


def on_attention(unet, hang):
    for block in unet.modules():
        if isinstance(block, BasicTransformerBlock):
            hang(block.attn1)


@pytest.mark.parametrize("method", [Merge(), SampleKeys(), MergeKeys()], ids=str)
def test_hooks_of_others_on_attention_act_as_without_a_patch(method):
    """Whichever came first: they are given all tokens, and may change what comes in and what goes out."""
    outputs, seen, case = [], [], tiny.CASES["sd"]

    def change(attn):
        attn.register_forward_pre_hook(lambda m, args: (args[0] + args[0].flip(0), *args[1:]))
        attn.register_forward_hook(lambda m, args, y: seen.append((args[0].shape[1], y.shape[1])))
        attn.register_forward_hook(lambda m, args, y: 2 * y, prepend=True)

    plain = tiny.small_unet()
    on_attention(plain, change)
    want = case(plain)
    for before in (True, False):
        unet = tiny.small_unet()
        if before:
            on_attention(unet, change)
        tomesd.apply_patch(unet, method)
        if not before:
            on_attention(unet, change)
        seen.clear()
        outputs.append(case(unet))
        assert [tokens for _, tokens in seen] == [256, 64, 256, 256]
    assert torch.equal(*outputs)
    assert 0 < (outputs[0] - want).norm() < 0.2 * want.norm()


@pytest.mark.parametrize("method", [SampleKeys(), MergeKeys()], ids=str)
def test_probes_are_not_where_others_watch_the_layers_of_attention(method):
    """A hook may keep what it has seen, or give back what it has kept: it sees each call of a layer once."""
    unet, case, seen = tiny.small_unet(), tiny.CASES["sd"], []
    tomesd.apply_patch(unet, type(method)(probes=0))
    want = case(unet)
    tomesd.apply_patch(unet, method)
    assert not torch.equal(case(unet), want)
    on_attention(unet, lambda attn: attn.to_q.register_forward_hook(lambda m, a, y: seen.append(y.shape[1])))
    assert torch.equal(case(unet), want)
    assert seen == [256, 64, 256, 256]


@pytest.mark.parametrize(
    ("method", "watched"),
    [
        (Merge(), lambda block: block.attn1.to_q),
        (ALL, lambda block: block.ff.net[0]),
        (MergeStage(), lambda block: block.attn1),
        (MergeStage(), lambda block: block.ff.net[0]),
    ],
    ids=["to_q", "ff", "stage attn1", "stage ff"],
)
@pytest.mark.parametrize("before", [True, False])
def test_hooks_of_others_that_are_given_merged_tokens_are_named(method, watched, before):
    unet, seen = tiny.small_unet(), []
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    if before:
        watched(block).register_forward_hook(lambda m, args, y: seen.append(y.shape[1]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tomesd.apply_patch(unet, method)
        if not before:
            watched(block).register_forward_hook(lambda m, args, y: seen.append(y.shape[1]))
        for _ in range(2):
            tiny.CASES["sd"](unet)
    assert seen[0] == 128
    says = "has hooks that somebody has put on it, and Merge"
    assert [says in str(warning.message) for warning in caught] == [True]


@pytest.mark.parametrize(
    ("share", "names"),
    [
        (lambda one, other: setattr(other, "attn1", one.attn1), r"down.*\.attn1 and .*up.*\.attn1"),
        (lambda one, other: setattr(one, "attn2", one.attn1), r"down.*\.attn1 and .*down.*\.attn2"),
    ],
)
def test_parts_that_are_in_two_places_are_named(share, names):
    unet = tiny.small_unet(mid_block_type=None)
    blocks = [block for block in unet.modules() if isinstance(block, BasicTransformerBlock)]
    share(blocks[0], blocks[-1])
    for method in (Merge(), SampleKeys(), MergeStage()):
        with pytest.raises(ValueError, match=names + " of UNet2DConditionModel are one and the same module"):
            tomesd.apply_patch(unet, method)
    assert traces(unet) == []


@pytest.mark.parametrize("method", [Merge(), SampleKeys(), MergeKeys(), MergeStage()], ids=str)
def test_layers_may_be_swapped_for_quantized_ones(method):
    """torch's own way copies the hooks of a layer that it swaps, and forgets what they are to be given."""
    one, other, case = tiny.small_unet(), tiny.small_unet(), tiny.CASES["sd"]
    torch.ao.quantization.quantize_dynamic(one, {torch.nn.Linear}, inplace=True)
    plain = case(one)
    tomesd.apply_patch(one, method)
    tomesd.apply_patch(other, method)
    torch.ao.quantization.quantize_dynamic(other, {torch.nn.Linear}, inplace=True)
    assert torch.equal(case(other), case(one))
    tomesd.remove_patch(other)
    assert torch.equal(case(other), plain)
    assert traces(other) == []


def test_an_adapter_that_comes_later_is_seen_where_it_matters():
    class Unknown(AttnProcessor2_0):
        pass

    unet, case = tiny.small_unet(), tiny.CASES["sd"]
    tomesd.apply_patch(unet, SampleKeys(probes=0))
    for attn in (module.attn1 for module in unet.modules() if hasattr(module, "attn1")):
        attn.to_k = torch.nn.Sequential(attn.to_k)
    plain = case(unet)
    unet.set_attn_processor(Unknown())
    with pytest.raises(ValueError, match=r"to_k of .*attn1 was replaced after apply_patch, .* patch again"):
        case(unet)
    tomesd.apply_patch(unet, SampleKeys(probes=0))
    torch.testing.assert_close(case(unet), plain, atol=1e-5, rtol=1e-4)


def reference_only(self, hidden_states, attention_mask=None, encoder_hidden_states=None, **others):
    kwargs, n = others.get("cross_attention_kwargs") or {}, self.norm1(hidden_states)
    attended = self.attn1(n, **kwargs)
    attended[:1] = self.attn1(n[:1], **kwargs)  # the unconditional half by itself
    h = attended + hidden_states
    h = self.attn2(self.norm2(h), encoder_hidden_states=encoder_hidden_states, **kwargs) + h
    return self.ff(self.norm3(h)) + h


def of_its_own(self, hidden_states, attention_mask=None, encoder_hidden_states=None, **others):
    """Many hosts do not hand on what a container gives to attention."""
    h = self.attn1(self.norm1(hidden_states)) + hidden_states
    h = self.attn2(self.norm2(h), encoder_hidden_states=encoder_hidden_states) + h
    return self.ff(self.norm3(h)) + h


@pytest.mark.parametrize("method", [ALL, SampleKeys(), MergeKeys(), MergeStage()], ids=str)
def test_a_block_need_not_hand_on_what_it_is_given(method):
    unet, case = tiny.unet(), tiny.CASES["sd"]
    tomesd.apply_patch(unet, method)
    want = case(unet)
    for block in unet.modules():
        if isinstance(block, BasicTransformerBlock):
            block.forward = types.MethodType(of_its_own, block)
    torch.testing.assert_close(case(unet), want)


@pytest.mark.parametrize("method", [ALL, SampleKeys(), MergeKeys(), MergeStage()], ids=str)
def test_a_block_of_diffusers_may_have_a_forward_of_its_own(method):
    unet, case = tiny.unet(), tiny.CASES["sd"]
    for block in unet.modules():
        if isinstance(block, BasicTransformerBlock):
            block.forward = types.MethodType(reference_only, block)
    plain = case(unet)
    tomesd.apply_patch(unet, method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = case(unet)
    assert 0 < (out - plain).norm() < 0.5 * plain.norm()


@pytest.mark.parametrize("name", acting.IN_NO_PACKAGE)
def test_networks_that_are_in_no_package_keep_the_laws_of_a_patch(name):
    net = acting.IN_NO_PACKAGE[name]()
    plain = call(net)
    for kind in (Merge, SampleKeys, MergeStage):
        tomesd.apply_patch(net, kind(0))
        assert torch.equal(call(net), plain)
        tomesd.apply_patch(net, kind(0.5))
        assert 0 < (call(net) - plain).norm() < plain.norm()
        tomesd.remove_patch(net)
        assert torch.equal(call(net), plain)
        assert traces(net) == []


def test_each_network_of_a_row_has_a_case():
    known = set(acting.IN_NO_PACKAGE)
    for case in tiny.CASES.values():
        known |= {kind.__name__ for module in case.build().modules() for kind in type(module).__mro__}
    assert {name for row in FAMILIES for name in row.networks} <= known


@pytest.mark.parametrize("method", [ALL, SampleKeys(probes=0), MergeStage()], ids=str)
def test_networks_of_one_name_are_told_apart_by_how_they_are_called(method):
    net = acting.kohya()
    plain, attn = call(net), net.down_blocks[0].transformer_blocks[0].attn1
    tomesd.apply_patch(net, method)
    attn.seen.clear()
    out = call(net)
    assert attn.seen == [(N, SAMPLED) if method == SampleKeys(probes=0) else (HALF, HALF)]
    assert 0 < (out - plain).norm() < 0.5 * plain.norm()
    tomesd.remove_patch(net)
    assert torch.equal(call(net), plain)


def test_a_network_that_is_only_named_as_one_is_refused_before_it_is_touched():
    class Other(acting.UNet2DConditionModel):
        def forward(self, latent, when, encoder_hidden_states):
            return super().forward(latent, when, encoder_hidden_states)

    net = Other()
    says = r"is a Other as of diffusers UNet or kohya.*, but not one that .*: the forward of Other has no"
    with pytest.raises(ValueError, match=says):
        tomesd.apply_patch(net)
    assert not [hook for module in net.modules() for hook in module._forward_pre_hooks]
