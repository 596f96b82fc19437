"""Draws which tokens a Stable Diffusion model merges, over the finished pictures.

    python examples/unet_clusters.py                                     # the emoji model in this repository
    python examples/unet_clusters.py "cat face" --ratio 0.75 --at 0 5 19
    python examples/unet_clusters.py "a cat" --model stable-diffusion-v1-5/stable-diffusion-v1-5 --level 2

For each prompt: above, over the finished picture, the groups of tokens that the first block of a level merged
at some steps, with a dot where the others merged into; below, the picture rebuilt from one mean patch for
each group.
"""

from __future__ import annotations

import argparse
import sys

import matplotlib.pyplot as plt
import torch

import tomesd
from tomesd.commands.common import Parser, from_zero, guarded, guidance, positive, ratio, refusals
from tomesd.commands.options import patch
from tomesd.commands.pipelines import EMOJI, find_model, load_pipeline, pick_device, pick_dtype
from tomesd.commands.plot import new_picture
from tomesd.tools.vis import LEAST, rebuilt

PROGRAM = "examples/unet_clusters.py"
INCHES = 3.4


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(PROGRAM, __doc__)
    parser.add_argument(
        "prompts", nargs="*", default=["cat face", "pizza"], help="what to draw, each in quotes"
    )
    parser.add_argument(
        "--model", type=find_model, default=EMOJI, help="folder or hub id of a diffusers pipeline"
    )
    parser.add_argument("--ratio", type=ratio, default=0.5, help="share of tokens to merge (0.5)")
    parser.add_argument("--level", type=int, choices=(1, 2, 4, 8), help="downsampling (the finest)")
    parser.add_argument("--steps", type=positive, default=20, help="denoising steps (20)")
    parser.add_argument("--at", type=from_zero, nargs="+", help="steps to show, from 0 (first, middle, last)")
    parser.add_argument("--guidance", type=guidance, default=3.0, help="guidance scale (3)")
    parser.add_argument("--out", type=new_picture, default="unet-clusters.png")
    args = parser.parse_args(arguments)
    last = args.steps - 1
    args.at = sorted(set(args.at or (0, args.steps // 2, last)))
    if args.at[-1] > last:
        parser.error(f"argument --at: there are steps 0 to {last}")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    device = pick_device("auto")
    pipe = load_pipeline(args.model, device, pick_dtype("auto", device))
    patch(pipe, tomesd.Merge(args.ratio), args.level)
    rows, columns = 2 * len(args.prompts), 1 + len(args.at)
    size = (INCHES * columns, (INCHES + 0.3) * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="compressed")
    for axis in axes.flat:
        axis.axis("off")
    for i, prompt in enumerate(args.prompts):
        noise = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
        with refusals(), tomesd.trace(pipe, steps=args.at) as plans:
            image = pipe(prompt, generator=noise, **options).images[0]
        level = args.level or min(plan.downsample for plan in plans)
        block = next(plan.block for plan in plans if plan.downsample == level)
        axes[2 * i, 0].imshow(image, interpolation="nearest")
        axes[2 * i, 0].set_title(prompt)
        shown = [plan for plan in plans if plan.block == block]
        for plan, (above, below) in zip(shown, axes[2 * i : 2 * i + 2, 1:].T, strict=True):
            drawn = tomesd.make_visualization(image, plan)
            above.imshow(drawn)
            tokens = f"{plan.map.tokens} -> {plan.map.groups} tokens"
            above.set_title(f"step {plan.step + 1} of {args.steps}: {tokens}", fontsize=9)
            below.imshow(rebuilt(image.resize(drawn.size), plan.map[-1:], plan.h, plan.w))
    figure.suptitle(f"{block}, {plan.w} x {plan.h} tokens, ratio {args.ratio:g}", fontsize=10)
    figure.savefig(args.out, dpi=1.05 * max(LEAST * plan.w, 400) / INCHES)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(PROGRAM, main))
