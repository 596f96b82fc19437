"""A model, not a measurement, of a step of a UNet on a GPU: no GPU, no weights, a minute on one core.

    python scripts/bench roofline
    python scripts/bench roofline --models sdxl --sizes 1024 --ways windowed stage-4

Each operation that torch dispatches takes what is longest: its FLOPs at the card's peak, its bytes at the
card's bandwidth, by data sheets, or a launch. Real kernels reach a part of peak and bandwidth, and where
launches count the host decides: the table ranks, it predicts no seconds. Attention is fused, so reads its
queries, keys and values once; sorting goes over its keys several times.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import count
import rivals
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tomesd.commands.bench import MULTIPLE
from tomesd.commands.common import Parser, aligned, check_multiple, guarded, ratio, size, view
from tomesd.commands.models import MODELS, Setting, build, inputs

PROGRAM = "python scripts/bench roofline"
SHOWN = ["tomesd-0.1.3", "windowed", "copy", "keys", "merge-keys", "stage"]
SIZES = {"sd15": [(512, 512), (1024, 1024), (2048, 2048)], "sdxl": [(1024, 1024)]}
LAUNCH = 5e-6  # seconds from one small kernel to the next, in eager mode
TOP = 5  # operations that are listed
SORTS, PASSES = ("sort", "argsort", "topk"), 8  # over the keys
FREE = ("empty", "new_empty", "empty_like", "_unsafe_view", "detach", "lift_fresh")


class Card(NamedTuple):
    """A GPU by its data sheet: FLOPs a second in half and in single precision, and bytes of its memory."""

    half: float
    single: float
    bandwidth: float


CARDS = {"RTX 4090": Card(165e12, 83e12, 1.008e12), "A100 80GB": Card(312e12, 19.5e12, 2.039e12)}


class Call(NamedTuple):
    """One operation."""

    flops: float
    bytes: int
    half: bool

    def seconds(self, card: Card) -> float:
        peak = card.half if self.half else card.single
        return max(LAUNCH, self.flops / peak, self.bytes / card.bandwidth)


def moved(tensors: Any) -> int:
    """Bytes of all tensors; of what is expanded those that are there."""
    found = [leaf for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor)]
    return sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in found)


class Operations(TorchDispatchMode):
    """Notes each operation that makes a tensor, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[Call]] = defaultdict(list)

    def note(self, name: str, flops: float, tensors: Any, result: Any) -> None:
        half = all(leaf.itemsize == 2 for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        passes = PASSES if name in SORTS else 1
        self.calls[name].append(Call(flops, passes * moved((tensors, result)), half))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        kind = function._overloadpacket
        if not function.is_view and kind.__name__ not in FREE:
            formula = flop_registry.get(kind, lambda *_, **__: 0)
            self.note(kind.__name__, formula(*args, **(kwargs or {}), out_val=result), (args, kwargs), result)
        return result

    def seconds(self, card: Card) -> dict[str, float]:
        """Of all operations of a name, the longest first."""
        each = {name: sum(call.seconds(card) for call in calls) for name, calls in self.calls.items()}
        return dict(sorted(each.items(), key=lambda item: -item[1]))


class Attention(count.Attention):
    """Notes fused attention as one operation."""

    def __init__(self, operations: Operations) -> None:
        super().__init__()
        self.operations = operations

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.flops
        result = super().__torch_function__(function, types, args, kwargs)
        if self.flops > before:
            self.operations.note("attention", self.flops - before, (args, kwargs), result)
        return result


@torch.no_grad()
def operations_of(network: nn.Module, name: str, setting: Setting) -> Operations:
    """What one way does in a step, but for the first one."""
    own = view(network)
    rivals.ALL[name].patch(own, setting)
    (latents, _), kwargs = inputs(setting)
    noted, table = Operations(), torch.arange(20.0, device="meta")
    for timestep in table[:2]:  # as in a loop, whose first step makes what depends on the size alone
        noted.calls.clear()
        with Attention(noted), noted:
            own(latents, timestep, **kwargs)
    return noted


def print_model(setting: Setting, ways: Sequence[str]) -> None:
    """How many times as fast as plain each way would be, and what it would spend its time on."""
    network, plain = build(setting), dict[str, float]()
    rows = [("", "operations", *CARDS, "most of it on the last")]
    for name in dict.fromkeys(["plain", *ways]):
        done = operations_of(network, name, setting)
        cells = [name, str(sum(map(len, done.calls.values())))]
        for card, sheet in CARDS.items():
            seconds = done.seconds(sheet)
            total = sum(seconds.values())
            cells.append(f"{1e3 * total:.1f} ms, {plain.setdefault(card, total) / total:.2f}x")
        most = [f"{kind} {each / total:.0%}" for kind, each in seconds.items()]
        rows.append((*cells, ", ".join(most[:TOP])))
    title = f"{setting.model}, {setting.width}x{setting.height}, ratio {setting.ratio:g}"
    print(f"{title}: a model, not measured\n{aligned(rows)}\n", flush=True)


def run(arguments: Sequence[str] | None) -> int:
    parser = Parser(PROGRAM, __doc__)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(SIZES), help="(sd15 sdxl)")
    add("--sizes", type=size, nargs="+", help="pixels (512 1024 2048; of sdxl 1024)")
    add("--ratio", type=ratio, default=0.5, help="(0.5)")
    add("--ways", nargs="+", choices=rivals.ALL, default=SHOWN, metavar="WAY", help="and plain")
    args = parser.parse_args(arguments)
    for model in args.models:
        for pixels in args.sizes or SIZES.get(model, [(512, 512)]):
            check_multiple(pixels, MULTIPLE)
            setting = Setting("unet", model, "float16", *pixels, args.ratio, 2, "meta")
            print_model(setting, args.ways)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded(PROGRAM, lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
