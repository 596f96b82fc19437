"""One step of the shipped model on 480x272 latents, the 130,560 tokens of a 4K picture, on a CPU.

    python scripts/torchvision_ops.py scripts/step_4k.py                    many minutes on two cores
    python scripts/torchvision_ops.py scripts/step_4k.py --latents 64x64    a moment

Plain, tomesd as it comes and with keys_only=True, the settings of examples/generate_4k.py and tomesd 0.1.3,
in turns: seconds (the least of all rounds), the memory that a step adds, and how far its output is from
plain's. Then the memory that one plan adds to the tokens of the finest level. tomesd 0.1.3 is left out where
its similarities do not fit.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import tomesd
from tomesd.bench import memory, peers
from tomesd.bench.models import smooth, view
from tomesd.bench.speed import device_name, positive, reason
from tomesd.bench.ways import similarities
from tomesd.config import MergeConfig
from tomesd.families import find_networks, find_sites
from tomesd.layout import Layout

MODEL = Path(__file__).resolve().parent.parent / "examples" / "emoji-model"
TEXT_TOKENS = 16


def latents(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) > 7 < int(height)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 480x272, sides of at least 8")
    return int(width), int(height)


def old(unet: nn.Module) -> None:
    peers.load("tomesd", alias="tomesd_0_1_3").apply_patch(unet, 0.5)


WAYS: dict[str, Callable[[nn.Module], object]] = {
    "plain": lambda unet: None,
    "default": tomesd.apply_patch,
    "keys_only": lambda unet: tomesd.apply_patch(unet, keys_only=True),
    "4k": lambda unet: tomesd.apply_patch(unet, 0.75, 2, keys_only=True),
    "4k, merge_stage": lambda unet: tomesd.apply_patch(unet, 0.75, 2, merge_stage=True),
    "tomesd 0.1.3": old,
}


def measured(call: Callable[[], Tensor]) -> tuple[Tensor, float, float]:
    """The result of a call, its seconds, and the MiB that it added at most."""
    results: list[Tensor] = []
    begin = time.perf_counter()
    added = memory.peak(lambda: results.append(call()), "cpu")
    return results[0], time.perf_counter() - begin, float("nan") if added is None else added


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of a pipeline (the shipped one)")
    parser.add_argument("--latents", type=latents, default=(480, 272), help="width x height (480x272)")
    parser.add_argument("--rounds", type=positive, default=1, help="calls of each way (1)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="(all)")
    args = parser.parse_args(argv)
    if not (args.model / "unet" / "config.json").is_file():
        parser.error(f"argument --model: {args.model} is not the folder of a pipeline with a unet")
    unet = UNet2DConditionModel.from_pretrained(args.model / "unet").eval().requires_grad_(False)
    ((_, _, family),) = find_networks(unet)
    site = min(find_sites(unet, family), key=lambda site: site.downsample)
    (width, height), batch = args.latents, 2
    h, w = -(-height // site.downsample), -(-width // site.downsample)
    print(f"{width}x{height} latents, {h * w} tokens at the finest level, {batch} images, float32, ", end="")
    print(f"{torch.get_num_threads()} threads of {device_name('cpu')}")

    torch.manual_seed(0)
    image = smooth(batch, unet.config.in_channels, height, width)
    text = torch.randn(batch, TEXT_TOKENS, unet.config.cross_attention_dim)
    needs, free = similarities(batch, h * w, torch.float32), memory.available("cpu")
    networks: dict[str, nn.Module] = {}
    for name in args.ways:
        if name == "tomesd 0.1.3" and free is not None and needs > free:
            print(f"{name}: left out, needs {needs / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are available")
            continue
        network = view(unet)
        try:
            WAYS[name](network)
        except (ValueError, peers.Unavailable) as error:
            print(f"{name}: left out, {reason(error)}")
            continue
        networks[name] = network
        network(image[:, :, :16, :16], 500, text)  # what is made at the first call only

    plain: Tensor | None = None
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for turn in range(args.rounds):
        for name, network in networks.items():

            def step(network: nn.Module = network) -> Tensor:
                output: Tensor = network(image, 500, encoder_hidden_states=text).sample
                return output

            output, taken, added = measured(step)
            plain = output if name == "plain" else plain
            seconds[name].append(taken)
            if turn == args.rounds - 1:
                off = "" if plain is None else f", error {float((output - plain).norm() / plain.norm()):.3f}"
                print(f"{name}: {min(seconds[name]):.2f} s, {added:.0f} MiB{off}", flush=True)
            del output

    layer: Any = site.block.get_submodule("attn1.to_q")
    tokens = smooth(batch, layer.in_features, h, w).flatten(2).mT.contiguous()
    config = MergeConfig(0.75)

    def plan() -> Tensor:
        return Layout.of(tokens.mT.unflatten(2, (h, w)), config, 500).plan(tokens, config).index

    _, taken, added = measured(plan)
    print(f"one plan: {taken:.2f} s, {added:.0f} MiB beyond {tokens.nbytes / 2**20:.0f} MiB of tokens")


if __name__ == "__main__":
    main()
