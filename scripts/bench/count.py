"""Counts what a step of a UNet costs, without computing it: no GPU, no weights, seconds on one core.

    python scripts/bench count
    python scripts/bench count --model sdxl --size 4096 --ways 4k stage-4 --spare

TFLOPs of both guidance halves, attention, convolutions and matrices apart; and the GiB of all tensors that
are alive at once beside the weights, in bfloat16. Attention is taken to be fused, so to keep no more than its
output. What an allocator wastes and what kernels need for themselves is not in it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import rivals
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tomesd.commands.bench import MULTIPLE
from tomesd.commands.common import Parser, check_multiple, guarded, ratio, reason, size, view
from tomesd.commands.models import MODELS, Setting, build, inputs
from tomesd.commands.pipelines import chunk_feed_forward

PROGRAM = "python scripts/bench count"
SHOWN = ["plain", "windowed", "4k", "4k-stage"]


class Attention(TorchFunctionMode):
    """Takes the place of fused attention, whose part on the meta device would make all its products."""

    flops = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        query, key, value = args[:3]
        pairs = query.shape[:-1].numel() * key.shape[-2]
        self.flops += 2 * pairs * (query.shape[-1] + value.shape[-1])
        return query.new_empty(*query.shape[:-1], value.shape[-1])


class Alive(TorchDispatchMode):
    """Bytes of the storages that were made inside of it and still live."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        held = {id_of(tensor) for tensor in torch.utils._pytree.tree_leaves((args, kwargs or {}))}
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            number = id_of(tensor)
            if number is None or number in held or number in self.sizes:
                continue
            self.sizes[number] = tensor.untyped_storage().nbytes()
            self.now += self.sizes[number]
            weakref.finalize(tensor.untyped_storage(), self.forget, number)
        self.peak = max(self.peak, self.now)
        return result

    def forget(self, number: int) -> None:
        self.now -= self.sizes.pop(number)


def id_of(thing: object) -> int | None:
    """The number of a tensor's storage."""
    return thing.untyped_storage()._cdata if isinstance(thing, torch.Tensor) else None


@dataclass(frozen=True)
class Cost:
    """FLOPs of a step, and bytes beside the weights."""

    attention: int
    conv: int
    matrices: int
    memory: int

    def __str__(self) -> str:
        flops = (self.attention, self.conv, self.matrices, self.attention + self.conv + self.matrices)
        return "".join(f"{f / 1e12:10.1f}" for f in flops) + f"{self.memory / 2**30:8.2f}"


@torch.no_grad()
def count(network: nn.Module, name: str, setting: Setting, spare: bool = False) -> Cost:
    """What a step costs in one way; `spare`: feed-forward layers take one sample after the other."""
    own = view(network)
    rivals.ALL[name].patch(own, setting)
    if spare:
        chunk_feed_forward(own)
    args, kwargs = inputs(setting)
    attention, flops, alive = Attention(), FlopCounterMode(display=False), Alive()
    with attention, flops, alive:
        own(*args, **kwargs)
    counts = flops.get_flop_counts()["Global"]
    conv = sum(count for kind, count in counts.items() if "conv" in str(kind))
    return Cost(attention.flops, conv, sum(counts.values()) - conv, alive.peak)


def run(arguments: Sequence[str] | None) -> int:
    parser = Parser(PROGRAM, __doc__)
    parser.add_argument("--model", choices=MODELS, default="sd15", help="(sd15)")
    parser.add_argument("--size", type=size, default=(3840, 2176), help="pixels (3840x2176)")
    parser.add_argument("--ratio", type=ratio, default=0.75, help="(0.75)")
    parser.add_argument(
        "--ways", nargs="+", choices=rivals.ALL, default=SHOWN, metavar="WAY", help=f"({' '.join(SHOWN)})"
    )
    parser.add_argument(
        "--spare",
        action="store_true",
        help="feed-forward layers take guidance's halves in turn, as in generate-4k",
    )
    args = parser.parse_args(arguments)
    check_multiple(args.size, MULTIPLE)
    width, height = args.size
    setting = Setting("unet", args.model, "bfloat16", width, height, args.ratio, 2, "meta")
    network = build(setting)
    print(f"{args.model}, {width}x{height}, ratio {args.ratio:g}")
    print(f"{'TFLOPs':16}{'attention':>10}{'conv':>10}{'matrices':>10}{'all':>10}{'GiB':>8}")
    for name in args.ways:
        try:
            print(f"{name:16}{count(network, name, setting, args.spare)}", flush=True)
        except Exception as error:  # what cannot run without data
            print(f"{name:16}{reason(error)}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded(PROGRAM, lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
