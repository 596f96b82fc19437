"""How far do merged pictures stray from the plain ones? Each way of merging on a trained pipeline.

    python scripts/quality.py [--prompts 12] [--seeds 2] [--ratios 0.25 0.5 0.75] [--csv FILE]

Every picture is drawn plain and in each way from the same seed. `one_step_error` is the relative error of the
network's output on the plain run's own latents, averaged over all steps: what merging itself costs. PSNR of
the finished pictures is what is left to see of it, and of what the sampler makes of small differences. tomesd
0.1.3 stands beside ours.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

import tomesd
from tomesd.bench import peers
from tomesd.bench.ways import equal_time
from tomesd.families import find_networks, find_sites

MODEL = Path(__file__).resolve().parent.parent / "examples" / "emoji-model"


def ways(unet: nn.Module) -> dict[str, tuple[Callable[[float], object], Callable[[], object]]]:
    """Name -> how to patch at a ratio, how to remove."""
    old = peers.load("tomesd", alias="tomesd_0_1_3")

    def ours(**options: object) -> tuple[Callable[[float], object], Callable[[], object]]:
        return lambda ratio: tomesd.apply_patch(unet, ratio, **options), lambda: tomesd.remove_patch(unet)

    return {
        "tomesd 0.1.3": (lambda ratio: old.apply_patch(unet, ratio), lambda: old.remove_patch(unet)),
        "exact": ours(matching="exact"),
        "windowed": ours(),
        "windowed, no rand": ours(use_rand=False),
        "reuse=1": ours(reuse=1),
        "reuse=2": ours(reuse=2),
        "reuse=5": ours(reuse=5),
        "prop_attn": ours(prop_attn=True),
        "keys only, equal time": (
            lambda ratio: tomesd.apply_patch(unet, equal_time(ratio), keys_only=True),
            lambda: tomesd.remove_patch(unet),
        ),
        "ToDo": downsample_keys(unet),
        "attn, cross, mlp": ours(merge_crossattn=True, merge_mlp=True),
        "stage": ours(merge_stage=True),
        "stage, prop_attn": ours(merge_stage=True, prop_attn=True),
    }


def downsample_keys(unet: nn.Module) -> tuple[Callable[[float], object], Callable[[], object]]:
    """ToDo, which has one ratio alone: keys and values from every second token of every second row."""
    handles: list[RemovableHandle] = []

    def enter(attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        side = math.isqrt(args[0].shape[1])  # pictures are square here
        keys = args[0].unflatten(1, (side, side))[:, ::2, ::2].flatten(1, 2)
        return args, {**kwargs, "encoder_hidden_states": keys}

    def patch(ratio: float) -> None:
        ((_, network, family),) = find_networks(unet)
        for site in find_sites(network, family):
            if site.level == 0:
                handles.append(site.block.attn1.register_forward_pre_hook(enter, with_kwargs=True))

    def remove() -> None:
        while handles:
            handles.pop().remove()

    return patch, remove


class Recorder:
    """Keeps what the network was called with and what it gave."""

    def __init__(self, network: nn.Module) -> None:
        self.calls: list[tuple[tuple, dict, Tensor]] = []
        self.handle = network.register_forward_hook(self.keep, with_kwargs=True)

    def keep(self, network: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        self.calls.append((args, kwargs, output[0]))


def draw(
    pipe: StableDiffusionPipeline, prompts: list[str], seed: int, args: argparse.Namespace
) -> np.ndarray:
    """Pictures `[B, H, W, 3]` in 0..1; each prompt starts from its own noise."""
    generators = [torch.Generator().manual_seed(seed * 1000 + i) for i in range(len(prompts))]
    call = dict(num_inference_steps=args.steps, guidance_scale=args.guidance, generator=generators)
    return pipe(prompts, height=args.size, width=args.size, output_type="np", **call).images


def psnr(a: np.ndarray, b: np.ndarray) -> list[float]:
    return (-10 * np.log10(np.square(a - b).mean((1, 2, 3)) + 1e-12)).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(MODEL), help="folder or hub id of a Stable Diffusion pipeline")
    parser.add_argument("--prompts", type=int, default=12, help="how many of the model's own names")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--size", type=int, help="pixels; the model's own if not given")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--ways", nargs="+", metavar="WAY", help="these only (default: all)")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()

    pipe = StableDiffusionPipeline.from_pretrained(args.model, safety_checker=None)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    names = (MODEL / "names.txt").read_text(encoding="utf-8").split("\n")[:-1]
    prompts = names[:: max(1, len(names) // args.prompts)][: args.prompts]
    every = ways(pipe.unet)
    unknown = set(args.ways or ()) - set(every)
    if unknown:
        parser.error(f"no way is called {', '.join(sorted(unknown))}; there are {', '.join(every)}")
    every = {name: way for name, way in every.items() if name in (args.ways or every)}
    errors: dict[tuple[str, float], list[float]] = {}
    levels: dict[tuple[str, float], list[float]] = {}
    bar = tqdm(total=args.seeds * (1 + len(every) * len(args.ratios)), unit="batch")
    for seed in range(args.seeds):
        recorder = Recorder(pipe.unet)
        plain = draw(pipe, prompts, seed, args)
        recorder.handle.remove()
        bar.update()
        for name, (patch, remove) in every.items():
            for ratio in args.ratios:
                patch(ratio)
                with torch.inference_mode():
                    for call_args, call_kwargs, output in recorder.calls:
                        again = pipe.unet(*call_args, **call_kwargs)[0]
                        error = (again - output).flatten(1).norm(dim=1) / output.flatten(1).norm(dim=1)
                        errors.setdefault((name, ratio), []).extend(error.tolist())
                merged = draw(pipe, prompts, seed, args)
                levels.setdefault((name, ratio), []).extend(psnr(merged, plain))
                remove()
                bar.update()
    bar.close()
    rows = [
        {
            "ratio": ratio,
            "way": name,
            "one_step_error": round(statistics.mean(errors[name, ratio]), 4),
            "psnr_db": round(statistics.mean(levels[name, ratio]), 2),
            "psnr_median_db": round(statistics.median(levels[name, ratio]), 2),
        }
        for ratio in args.ratios
        for name in every
    ]
    print("  ".join(f"{column:>18}" for column in rows[0]))
    for row in rows:
        print("  ".join(f"{value!s:>18}" for value in row.values()))
    print(f"{len(prompts)} prompts x {args.seeds} seeds, {args.steps} steps, guidance {args.guidance}")
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
