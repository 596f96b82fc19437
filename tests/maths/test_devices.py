"""Devices that lack an operation: refused here, as MPS refuses some, the plain way gives the same."""

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tomesd
from tomesd.maths import devices
from tomesd.maths.linear import unmerge_linear

pytestmark = pytest.mark.usefixtures("no_grad")


class Lacking(TorchDispatchMode):
    def __init__(self, *names):
        super().__init__()
        self.names, self.refused = names, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in self.names):
            self.refused += 1
            raise NotImplementedError(f"{function} is not implemented for this device")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def asked_anew():
    devices._tried.cache_clear()
    yield
    devices._tried.cache_clear()


METHODS = [tomesd.Merge(unmerge="copy", parts=("attn", "mlp")), tomesd.MergeKeys(), tomesd.MergeStage()]


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize("missing", ["embedding_bag", "searchsorted", "sort.stable"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_device_without_a_fast_operation_merges_by_a_plain_one(method, missing):
    unet, case = tiny.small_unet(), tiny.CASES["sd"]
    tomesd.apply_patch(unet, method)
    want = case(unet)
    devices._tried.cache_clear()
    with Lacking(missing) as mode:
        got = case(unet)
        assert mode.refused == 1  # asked once
        case(unet)
        assert mode.refused == 1
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("asked_anew")
def test_a_device_that_cannot_solve_copies():
    token_map = tomesd.TokenMap.from_index(torch.arange(12)[None] // 2, 6)
    x, y = torch.randn(1, 12, 4), torch.randn(1, 6, 4)
    with Lacking("linalg_cholesky_ex") as mode:
        for _ in range(2):
            assert torch.equal(unmerge_linear(token_map, x, token_map.merge(x), y), token_map.unmerge(y))
        assert mode.refused == 1
