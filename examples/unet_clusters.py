"""Draws which tokens a Stable Diffusion model merges, over the finished pictures.

    python examples/unet_clusters.py                                     # the emoji model in this repository
    python examples/unet_clusters.py "cat face" --ratio 0.75 --at 0 5 19
    python examples/unet_clusters.py "a cat" --model stable-diffusion-v1-5/stable-diffusion-v1-5 --level 2

For each prompt: above, over the finished picture, the groups of tokens that one block merged at some steps;
below, the picture rebuilt from one mean patch for each group.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import tomesd
from tomesd.vis import LEAST, rebuilt

EMOJI_MODEL = Path(__file__).resolve().parent / "emoji-model"
INCHES = 3.4
LEGEND = """above: each group of merged tokens in its
mean colour, with a border of its own colour;
the dot is where the others merged into.
Tokens without border merged with nothing.

below: the picture rebuilt from
one mean patch for each group"""


def parse_args(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompts", nargs="*", metavar="prompt", help="what to draw; put each in quotes")
    parser.add_argument("--model", default=str(EMOJI_MODEL), help="folder or hub id of a diffusers pipeline")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of tokens to merge (default: 0.5)")
    parser.add_argument("--matching", choices=("windowed", "exact"), default="windowed")
    parser.add_argument(
        "--level", type=int, choices=(1, 2, 4, 8), help="downsampling to show (default: the finest)"
    )
    parser.add_argument("--block", type=int, default=0, help="which of the level's blocks to show, from 0")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default: 20)")
    parser.add_argument(
        "--at", type=int, nargs="+", help="steps to show, from 0 (default: first, middle, last)"
    )
    parser.add_argument("--size", type=int, help="pixels (default: the model's own size)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: 3, or the pipeline's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("unet-clusters.png"))
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps has to be at least 1, not {args.steps}")
    args.at = sorted({0, args.steps // 2, args.steps - 1} if args.at is None else set(args.at))
    if not 0 <= args.at[0] <= args.at[-1] < args.steps:
        parser.error(f"--at has to be in 0..{args.steps - 1}, got {args.at}: there are {args.steps} steps")
    if not args.out.parent.is_dir():
        parser.error(f"--out: there is no folder {args.out.parent}")
    if args.block < 0:
        parser.error(f"--block is counted from 0, got {args.block}")
    return parser, args


def shown(plans: list[tomesd.Plan], level: int | None, block: int) -> list[tomesd.Plan]:
    """Of one block at a level, the finest by default: its plan at each step.

    Raises:
        ValueError: there is no such block.
    """
    levels = sorted({plan.downsample for plan in plans})
    level = levels[0] if level is None else level
    blocks = list(dict.fromkeys(plan.block for plan in plans if plan.downsample == level))
    if block >= len(blocks):
        raise ValueError(f"no block {block} at level {level}: {len(blocks)} merge there, at levels {levels}")
    return [plan for plan in plans if plan.block == blocks[block]]


def main(argv: list[str] | None = None) -> None:
    parser, args = parse_args(argv)
    import diffusers
    import matplotlib.pyplot as plt

    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(args.model)
        tomesd.apply_patch(pipe, args.ratio, max_downsample=args.level, matching=args.matching)
    except (OSError, ValueError, TypeError) as error:
        parser.error(str(error))
    options = {"num_inference_steps": args.steps}
    emoji = Path(args.model).resolve() == EMOJI_MODEL
    if args.guidance is not None or emoji:
        options["guidance_scale"] = 3.0 if args.guidance is None else args.guidance
    if args.size is not None:
        options.update(height=args.size, width=args.size)
    prompts = args.prompts or (["cat face", "pizza", "blue heart"] if emoji else ["a photo of a cat"])
    pipe.to("cuda" if torch.cuda.is_available() else "cpu").set_progress_bar_config(leave=False)

    columns = 1 + len(args.at)
    figure, axes = plt.subplots(
        2 * len(prompts),
        columns,
        figsize=(INCHES * columns, (INCHES + 0.3) * 2 * len(prompts)),
        squeeze=False,
        layout="compressed",
    )
    for axis in axes.flat:
        axis.axis("off")
    for i, prompt in enumerate(prompts):
        try:
            with tomesd.trace(pipe, steps=args.at) as plans:
                image = pipe(prompt, generator=torch.Generator().manual_seed(args.seed), **options).images[0]
            chosen = shown(plans, args.level, args.block)
        except ValueError as error:
            parser.error(str(error))
        axes[2 * i, 0].imshow(image, interpolation="nearest")
        axes[2 * i, 0].set_title(prompt)
        for j, plan in enumerate(chosen, 1):
            drawn = tomesd.make_visualization(image, plan)
            axes[2 * i, j].imshow(drawn)
            axes[2 * i, j].set_title(
                f"step {plan.step + 1} of {args.steps}: {plan.map.tokens} -> {plan.map.groups} tokens",
                fontsize=9,
            )
            below = rebuilt(image.resize(drawn.size), plan.map[-1:], plan.h, plan.w)
            axes[2 * i + 1, j].imshow(below)
    axes[1, 0].text(0, 1, LEGEND, va="top", fontsize=9)
    tokens = f"{chosen[0].w} x {chosen[0].h} tokens"
    figure.suptitle(
        f"{chosen[0].block}, {tokens}, ratio {args.ratio:g}, {args.matching} matching", fontsize=10
    )
    side = max(LEAST * chosen[0].w, 400)
    figure.savefig(args.out, dpi=1.05 * side / INCHES)
    print(args.out)


if __name__ == "__main__":
    main()
