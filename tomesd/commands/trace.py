"""Draws which tokens merged, over the finished picture: a row for each level, a column for each step.

    tomesd trace emoji "red apple" --out trace.png              the small model that comes with tomesd
    tomesd trace OWNER/MODEL "a cat" --out trace.png --at 0 5 19 --max-downsample 2
    tomesd trace OWNER/MODEL "a cat" --out trace.png --block unet.mid_block.attentions.0.transformer_blocks.0

Each group of tokens is painted in its mean colour, with a border; a dot marks the token that the others
merged into. With sample-keys nothing merges: the dots are the tokens that all look at.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import tomesd

from . import options, plot
from .common import Parser, UserError, from_zero, guarded, need
from .generate import Drawer
from .pipelines import check_model, check_pipeline_size, find_model, load_pipeline, pick_device, pick_dtype

if TYPE_CHECKING:
    from PIL import Image

PROGRAM = "tomesd trace"
INCHES = 4.0


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(PROGRAM, __doc__)
    parser.add_argument("model", type=find_model, help="folder or hub id; emoji is the shipped one")
    parser.add_argument("prompt", help="what to draw, in quotes")
    parser.add_argument(
        "--out", type=plot.new_picture, required=True, metavar="PICTURE", help="where to draw it"
    )
    parser.add_argument(
        "--at", type=from_zero, nargs="+", metavar="STEP", help="from 0 (first, middle and last)"
    )
    parser.add_argument("--block", help="as `tomesd explain` lists it (the first one of each level)")
    options.add_method(parser)
    options.add_picture(parser)
    parser.add_argument("--device", default="auto", help="(the best there is)")
    return parser


def choose(plans: Sequence[tomesd.Plan], args: argparse.Namespace) -> dict[str, list[tomesd.Plan]]:
    """The plans to show, of each block.

    Raises:
        UserError: there was no such block or step.
    """
    blocks = {plan.block: plan.downsample for plan in reversed(plans)}
    first = {downsample: block for block, downsample in blocks.items()}
    if args.block and args.block not in blocks:
        raise UserError(
            f"argument --block: {args.block} merged nothing; these did: {', '.join(sorted(blocks))}"
        )
    steps = sorted({plan.step for plan in plans})
    at = args.at or sorted({steps[0], steps[len(steps) // 2], steps[-1]})
    if not set(at) <= set(steps):
        raise UserError(f"argument --at: there are steps 0 to {steps[-1]}, not {', '.join(map(str, at))}")
    wanted = [args.block] if args.block else [first[downsample] for downsample in sorted(first)]
    by_step = {(plan.block, plan.step): plan for plan in plans}
    return {block: [by_step[block, step] for step in at] for block in wanted}


def draw(picture: Image.Image, shown: dict[str, list[tomesd.Plan]], prompt: str) -> Any:
    """A figure of matplotlib."""
    rows = [plans[0] for plans in shown.values()]
    names = [f"{plan.w} x {plan.h} tokens, {plan.map.groups} left" for plan in rows]
    columns = [(prompt, [picture] * len(rows))]
    for together in zip(*shown.values(), strict=True):
        painted = [tomesd.make_visualization(picture, plan) for plan in together]
        columns.append((f"step {together[0].step}", painted))
    return plot.sheet(columns, names, inches=INCHES)


def run(args: argparse.Namespace) -> int:
    options.check_prompts([args.prompt])
    options.check_picture(args)
    if options.method_asked(args, tell=True) is None:
        raise UserError("argument --ratio: with 0 nothing merges")
    check_model(args.model)
    for module in ("PIL.Image", "matplotlib.figure"):
        need(module)
    device = pick_device(args.device)
    pipe = load_pipeline(args.model, device, pick_dtype("auto", device))
    check_pipeline_size(pipe, args.size)
    options.patch_as_asked(pipe, args)
    merging = [row.name for row in tomesd.explain(pipe).rows if row.method is not None]
    if args.block and args.block not in merging:
        raise UserError(f"argument --block: nothing merges at {args.block}, only at {', '.join(merging)}")
    with tomesd.trace(pipe) as plans:
        picture = Drawer(args, pipe, device).draw(args.prompt, "trace")
    shown = choose(plans, args)
    for plan in (plan for row in shown.values() for plan in row):
        print(plan)
    plot.save(draw(picture, shown, args.prompt), args.out, "--out")
    print(args.out)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded(PROGRAM, lambda: run(make_parser().parse_args(arguments)))
