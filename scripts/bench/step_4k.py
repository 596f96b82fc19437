"""One step of the shipped model on 480x272 latents, the 130,560 tokens of a 4K picture, on a CPU.

    python scripts/bench step-4k                    many minutes on two cores
    python scripts/bench step-4k --latents 64x64    a moment

Plain, tomesd by default and with SampleKeys, the settings of `tomesd generate-4k` and tomesd
0.1.3, in turns: seconds (the least of all rounds), the memory that a step adds, and how far its output is
from plain's. Then the memory that one plan adds to the tokens of the finest level. tomesd 0.1.3 is left out
where its similarities do not fit.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import rivals
import torch
from torch import Tensor, nn

from tomesd.commands import memory
from tomesd.commands.common import (
    Parser,
    UserError,
    device_name,
    guarded,
    need,
    positive,
    size,
    timed,
)
from tomesd.commands.models import Setting, smooth
from tomesd.commands.pipelines import EMOJI_MODEL
from tomesd.commands.runs import Run, patched
from tomesd.hosts.image import Image
from tomesd.hosts.unets import find_networks
from tomesd.methods.merge import Merge

PROGRAM = "python scripts/bench step-4k"
TEXT_TOKENS = 16
# Shown as, way, ratio.
WAYS = {
    "plain": ("plain", 0.0),
    "default": ("windowed", 0.5),
    "sample-keys": ("keys", 0.5),
    "4k": ("4k", 0.75),
    "4k, merge-stage": ("4k-stage", 0.75),
    "tomesd 0.1.3": ("tomesd-0.1.3", 0.5),
}


def make_runs(unet: nn.Module, args: argparse.Namespace, downsample: int) -> list[Run]:
    """A run for each way; those that cannot be are printed and left out."""
    (width, height), runs = args.latents, []
    for name in args.ways:
        way, ratio = WAYS[name]
        # A pixel of these pictures is one of the latents.
        setting = Setting("unet", "", "float32", width, height, ratio, 2, "cpu", 1, downsample)
        run = patched(way, rivals.ALL, unet, setting)
        run.name = name
        if run.note:
            print(f"{name}: {run.note}")
        else:
            runs.append(run)
    return runs


def mib(peak: memory.Peak) -> str:
    return "unknown memory" if peak.added is None else f"{peak.added:.0f} MiB"


def time_steps(runs: list[Run], inputs: tuple[Any, ...], rounds: int) -> None:
    """Prints what each run takes, in the last round."""
    plain: Tensor | None = None
    gc.collect()
    for turn in range(rounds):
        for run in runs:
            with memory.Peak("cpu") as peak:
                output = run.time((inputs, {}), "cpu")
            plain = output if run.name == "plain" else plain
            if turn == rounds - 1:
                off = "" if plain is None else f", error {float((output - plain).norm() / plain.norm()):#.2g}"
                print(f"{run.name}: {min(run.seconds):.2f} s, {mib(peak)}{off}", flush=True)
            del output


def time_plan(channels: int, h: int, w: int, batch: int) -> None:
    """Prints what it takes to find out which of `h` x `w` tokens merge."""
    tokens = smooth(batch, channels, h, w).flatten(2).mT.contiguous()
    with memory.Peak("cpu") as peak:
        _, seconds = timed(partial(Merge(0.75).plan, tokens, Image(h, w)), "cpu")
    print(f"one plan: {seconds:.2f} s, {mib(peak)} beyond {tokens.nbytes / 2**20:.0f} MiB of tokens")


@torch.no_grad()
def run(arguments: Sequence[str] | None) -> int:
    parser = Parser(PROGRAM, __doc__)
    parser.add_argument(
        "--model", type=Path, default=EMOJI_MODEL, help="folder of a pipeline (the shipped one)"
    )
    parser.add_argument("--latents", type=size, default=(480, 272), help="width x height (480x272)")
    parser.add_argument("--rounds", type=positive, default=1, help="calls of each way (1)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="(all)")
    args = parser.parse_args(arguments)
    if not (args.model / "unet" / "config.json").is_file():
        raise UserError(f"argument --model: {args.model} is not the folder of a pipeline with a unet")
    if min(args.latents) < 8:
        raise UserError("argument --latents: sides have to be at least 8")
    unet = need("diffusers").UNet2DConditionModel.from_pretrained(args.model / "unet")
    unet = unet.eval().requires_grad_(False)
    (network,) = find_networks(unet)
    site = min(network.sites, key=lambda site: site.downsample)
    (width, height), batch = args.latents, 2
    h, w = -(-height // site.downsample), -(-width // site.downsample)
    print(f"{width}x{height} latents, {h * w} tokens at the finest level, {batch} images, float32, ", end="")
    print(f"{torch.get_num_threads()} threads of {device_name('cpu')}")

    torch.manual_seed(0)
    image = smooth(batch, unet.config.in_channels, height, width)
    text = torch.randn(batch, TEXT_TOKENS, unet.config.cross_attention_dim)
    runs = make_runs(unet, args, site.downsample)
    for one in runs:
        one.call(image[:, :, :16, :16], 500, text)  # what is made at the first call only
    time_steps(runs, (image, 500, text), args.rounds)
    time_plan(site.module.get_submodule("attn1.to_q").in_features, h, w, batch)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded(PROGRAM, lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
