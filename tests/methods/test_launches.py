"""How many operations methods add to a step, and that none of them waits for a device.

Counts are of SD 1.5's UNet at 64 x 64 latents, batch 2, on the meta device: operations that do something on
a device, so neither views nor what only asks for types.
"""

from collections import Counter

import diffusers as D
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import tomesd
from tomesd import Merge, MergeKeys, MergeStage, SampleKeys

pytestmark = pytest.mark.usefixtures("no_grad")
FREE = ("detach", "empty_like", "promote_types", "_unsafe_view", "scalar_tensor")
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal.default")


class Count(TorchDispatchMode):
    """Attention, which the meta device takes apart, is one operation."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __enter__(self):
        attend = F.scaled_dot_product_attention

        def attend_at_once(*args, **kwargs):
            with _disable_current_modes():
                out = attend(*args, **kwargs)
            self.counts["attention"] += 1
            return out

        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(F, "scaled_dot_product_attention", attend_at_once)
        return super().__enter__()

    def __exit__(self, *exception):
        self.patch.undo()
        return super().__exit__(*exception)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if not function.is_view and not any(free in name for free in FREE):
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


class NoWait(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not any(name in str(function) for name in WAITS), function
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def added():
    """`added(method, level)`: by how many operations a method makes a step longer."""
    with torch.device("meta"):
        unet = D.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).eval()
        table = torch.arange(20.0)
        x, text = torch.empty(2, 4, 64, 64), torch.empty(2, 77, 768)

    def count():
        unet(x, table[1], text)  # what is made once for each size
        with Count() as mode:
            unet(x, table[2], text)
        return mode.counts.total()

    plain = count()

    def added(method, level):
        tomesd.apply_patch(unet, method, level)
        return count() - plain

    return added


@pytest.mark.parametrize(
    ("method", "most"),
    [
        (Merge(unmerge="copy", prop_attn=False), 105),  # tomesd 0.1.3 adds 140
        (Merge(), 200),
        (Merge(0.75), 170),
        (SampleKeys(probes=0), 10),
        (SampleKeys(), 150),
        (MergeKeys(), 225),
        (MergeStage(), 135),
    ],
    ids=str,
)
def test_a_step_takes_no_more_operations_than_its_budget(added, method, most):
    one, two = added(method, 1), added(method, 2)
    assert 0 < one <= most
    assert two <= 2 * one + 10  # ten blocks in place of five


@pytest.mark.parametrize(
    "method",
    [Merge(parts=("attn", "cross", "mlp")), Merge(matching="exact"), SampleKeys(), MergeKeys(), MergeStage()],
    ids=str,
)
def test_nothing_waits_for_the_device(method):
    unet, case = tiny.small_unet(), tiny.CASES["sd"]
    tomesd.apply_patch(unet, method)
    with NoWait():
        for t in torch.linspace(900, 100, 5):
            case(unet, t=t)
