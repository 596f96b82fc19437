"""What a method saves: FLOPs, and whether it pays."""

import copy

import diffusers as D
import pytest
import tiny
import torch

import tomesd
from tomesd.hosts.family import Block, Part, Site
from tomesd.methods import cost

pytestmark = pytest.mark.usefixtures("no_grad")


def test_sampling_saves_what_explain_says():
    from torch.utils.flop_counter import FlopCounterMode

    unet = tiny.small_unet()
    unet.set_attn_processor(D.models.attention_processor.AttnProcessor())  # its products are counted on CPU
    call = tiny.CASES["sd"]

    def count():
        with FlopCounterMode(display=False) as counter:
            call(unet, b=1)
        return counter.get_total_flops()

    plain = count()
    for probes in (0, 8):
        tomesd.apply_patch(unet, tomesd.SampleKeys(0.5, probes=probes))
        table = tomesd.explain(unet, 128)
        saved = sum(row.flops * row.saved for row in table.rows)
        after = [row.after for row in table.rows if row.left_alone is None]
        assert after == [64, 64, 64]
        # Nothing is matched; and what is learned from probes is no layer.
        learning = 3 * 4 * 256 * probes * unet.config.block_out_channels[0]
        assert plain - count() == pytest.approx(saved - learning, rel=1e-6)


def test_auto_leaves_alone_what_would_be_slower_and_explain_says_so(monkeypatch):
    unet = tiny.unet()
    call = tiny.CASES["sd"]
    plain = call(unet)
    tomesd.apply_patch(unet, max_downsample=8)
    merged = call(unet)
    asked = []

    def slower_below(tokens):
        def timing(work, method, h, w, batch, *rest):
            asked.append((method, h, batch))
            return cost.Timing(plain=1.0, merged=2.0 if h * w < tokens else 0.5)

        return timing

    tomesd.apply_patch(unet, max_downsample=8, auto=True)
    for tokens, want in ((0, merged), (9999, plain)):
        monkeypatch.setattr(cost, "timing", slower_below(tokens))
        assert torch.equal(call(unet), want)
    assert set(asked) == {(tomesd.Merge(0.5), side, 2) for side in (16, 8, 4, 2)}
    monkeypatch.setattr(cost, "timing", slower_below(100))
    some = call(unet)
    assert not torch.equal(some, merged)
    assert not torch.equal(some, plain)
    reasons = {row.before: row.left_alone for row in tomesd.explain(unet, 128).rows}
    assert reasons[256] is None
    assert reasons[64] == "it would be slower: measured 2e+03 ms with merging, 1e+03 ms without"


@pytest.mark.parametrize(
    "method",
    [
        tomesd.Merge(),
        tomesd.Merge(parts=("attn", "mlp")),
        tomesd.Merge(matching="exact"),
        tomesd.MergeStage(),
    ],
    ids=str,
)
def test_auto_really_measures(method):
    unet = tiny.small_unet()
    tomesd.apply_patch(unet, method, auto=True)
    # For 16 tokens of 16 channels matching takes many times what there is to save.
    assert "it would be slower: measured" in tomesd.explain(unet, 32).rows[0].left_alone
    plain = tiny.CASES["sd"](tomesd.remove_patch(copy.deepcopy(unet)), 4, 4)
    assert torch.equal(tiny.CASES["sd"](unet, 4, 4), plain)


def test_auto_measures_whatever_looks_on():
    """Fake tensors, counters of operations and the like see nothing of it, and do not spoil it."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    unet = tiny.small_unet()
    x, text = tiny.inputs(16, 16, 2)
    tomesd.apply_patch(unet, 0.6, auto=True)
    with FlopCounterMode(display=False) as counter:
        unet(x, 5, text)
    measured = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        unet(x, 5, text)
    assert counter.get_total_flops() == measured
    work = cost.Work((("left", 64, 64),) * 4, (("left", "left", 1, 64),), merges=1)
    kind = tomesd.Merge(0.74), 64, 64, 1, torch.float32, torch.device("cpu")
    with FakeTensorMode():
        faked = cost.timing(work, *kind)
    assert faked.pays
    assert cost.timing(work, *kind) is faked
    unet.to("meta")
    assert unet(x.to("meta"), 5, text.to("meta")).sample.shape == x.shape


def test_attention_of_other_makes_is_merged_and_not_measured():
    class Other(torch.nn.Module):
        def forward(self, x, **kwargs):
            return x.flip(-1)

    unet = tiny.small_unet()
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    block.attn1 = Other()
    call = tiny.CASES["sd"]
    for auto in (False, True):
        tomesd.apply_patch(unet, auto=auto)
        assert torch.isfinite(call(unet)).all()
    assert tomesd.explain(unet, 128).rows[0].left_alone is None
    assert cost.pays(cost.Work(), tomesd.Merge(), 4, 4, 1, torch.float32, torch.device("cpu"))


def test_only_what_outweighs_matching_is_not_measured(monkeypatch):
    asked = []
    monkeypatch.setattr(cost, "timing", lambda *args: asked.append(args) or cost.Timing(1, 2))
    itself = cost.Work((("left", 8, 8),), (("left", "left", 1, 8),), 1)
    crossing = cost.Work((("left", 8, 8),), (("left", 77, 1, 8),), 1)
    kind = 2, torch.float32, torch.device("cpu")
    assert cost.pays(itself, tomesd.Merge(), 128, 128, *kind)
    assert not asked
    for work, options in ((crossing, {}), (itself, {"matching": "exact"}), (itself, {"ratio": 0.1})):
        assert not cost.pays(work, tomesd.Merge(**options), 128, 128, *kind)
    assert len(asked) == 3


def test_auto_merges_where_attention_outweighs_matching():
    work = cost.Work((("left", 64, 64),) * 4, (("left", "left", 1, 64),), merges=1)
    timing = cost.timing(work, tomesd.Merge(0.75), 64, 64, 1, torch.float32, torch.device("cpu"))
    assert timing.pays
    assert 0 < timing.merged < timing.plain


def test_auto_compiles_to_the_answer_for_each_size(monkeypatch):
    torch.compiler.reset()
    unet = tiny.small_unet()
    call = tiny.CASES["sd"]
    tomesd.apply_patch(unet, auto=True)
    answer = lambda work, method, h, w, *rest: cost.Timing(1.0, 2.0 if h * w < 100 else 0.5)  # noqa: E731
    monkeypatch.setattr(cost, "timing", answer)
    sizes = ((16, 16), (8, 8), (16, 24), (16, 16))
    want = [call(unet, *size) for size in sizes]
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    for size, expected in zip(sizes, want, strict=True):
        torch.testing.assert_close(call(compiled, *size), expected)
    torch.compiler.reset()


@pytest.mark.parametrize("layers", [("qkv", "out"), ("q", "kv", "out")], ids=str)
def test_a_layer_that_makes_several_of_queries_keys_and_values_costs_as_much_as_these(layers):
    def flops(layers, **wide):
        attn = torch.nn.ModuleDict({name: torch.nn.Linear(16, wide.get(name, 16)) for name in layers})
        attn.heads = 4
        block = Block("norm", Part("attn", layers=layers))
        return cost.work_of([Site("", torch.nn.ModuleDict({"attn": attn}), block, attn)], ["attn"]).flops(
            64, 32
        )

    assert flops(layers, qkv=48, kv=32) == flops(("q", "k", "v", "out"))
