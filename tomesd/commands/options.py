"""Options that several commands have: what to patch with, and what to draw."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomesd

from ..hosts.unets import find_networks
from ..methods.choice import DOWNSAMPLES
from .common import UserError, check_multiple, guidance, positive, say, seed, size
from .pipelines import EMOJI_MODEL

METHODS: dict[str, type[Any]] = {
    "merge": tomesd.Merge,
    "sample-keys": tomesd.SampleKeys,
    "merge-keys": tomesd.MergeKeys,
    "merge-stage": tomesd.MergeStage,
}
# Of the shipped model; others have their own.
EMOJI_STEPS, EMOJI_GUIDANCE, EMOJI_SHRUNK = 20, 3.0, 0.6
# From so many times the sides of a model's own pictures on, it would draw things twice.
LARGE = 1.75


def add_method(
    p: argparse.ArgumentParser, method: str = "merge", ratio: float = 0.5, levels: str = "the finest"
) -> None:
    """What to patch with."""
    p.add_argument(
        "--ratio", type=float, default=ratio, help=f"share of tokens to save, 0 for none (default: {ratio})"
    )
    p.add_argument(
        "--method",
        choices=METHODS,
        default=method,
        help="merge: similar tokens merge in self-attention; sample-keys and merge-keys: all tokens look at "
        "a sample of them, or at merged ones, closest to plain; merge-stage: whole transformers run on "
        f"merged tokens, fastest (default: {method})",
    )
    p.add_argument("--recipe", type=Path, metavar="FILE", help="what `tomesd tune` has written, instead")
    p.add_argument(
        "--max-downsample",
        type=int,
        choices=DOWNSAMPLES,
        help=f"work at levels up to this one (default: {levels} with attention)",
    )
    p.add_argument("--auto", action="store_true", help="leave blocks alone where it would be slower")
    p.set_defaults(unasked=(method, ratio, None))


def make_method(name: str, ratio: float) -> tuple[tomesd.Method, list[str]]:
    """The method of a name, and what is to be known about it, such as that its ratio was cut.

    Raises:
        UserError: it cannot be had with this ratio.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return METHODS[name](ratio), [str(warning.message) for warning in caught]
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from None


def read_recipe(file: Path, option: str) -> tomesd.Recipe:
    """The recipe in a file that an option names; a UserError says why there is none."""
    try:
        return tomesd.Recipe.load(file)
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"argument {option}: {file}: {error}") from None


def method_asked(args: argparse.Namespace, tell: bool = False) -> tomesd.Method | tomesd.Recipe | None:
    """What was asked for, None for plain; a UserError says why that cannot be, before a model is loaded.

    `tell`: print what is to be known about it, which each command does once.
    """
    if args.recipe:
        if (args.method, args.ratio, args.max_downsample) != args.unasked:
            raise UserError("argument --recipe: it goes without --method, --ratio and --max-downsample")
        return read_recipe(args.recipe, "--recipe")
    method, notes = make_method(args.method, args.ratio)
    for note in notes if tell else ():
        say(f"note: {note}")
    return method if args.ratio else None


def label(args: argparse.Namespace) -> str:
    """What is patched with, in a few words."""
    if args.recipe:
        return f"merged by {args.recipe.name}"
    return f"merged {make_method(args.method, args.ratio)[0].ratio:.0%}"


def patch_as_asked(
    pipe: Any, args: argparse.Namespace, shrink: tomesd.DeepShrink | None = None, plain: bool = False
) -> None:
    """Patches a pipeline with what was asked for, or leaves it plain, but for the shrinking."""
    method = None if plain else method_asked(args)
    if method is not None:
        patch(pipe, method, args.max_downsample, args.auto, shrink)
    elif shrink is not None:
        patch(pipe, tomesd.Merge(0), None, shrink=shrink)
    else:
        tomesd.remove_patch(pipe)


def patch(
    pipe: Any,
    method: tomesd.Method | tomesd.Recipe,
    max_downsample: int | None,
    auto: bool = False,
    shrink: tomesd.DeepShrink | None = None,
) -> None:
    """Patches a pipeline; a UserError says why that cannot be."""
    try:
        tomesd.apply_patch(pipe, method, max_downsample, auto=auto, shrink=shrink)
    except (TypeError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from None


def shrink_for(pipe: Any, args: argparse.Namespace) -> tomesd.DeepShrink | None:
    """What makes one thing of a picture far above the model's own size; None for other pictures."""
    try:
        if not args.size or not all(network.family.down for network in find_networks(pipe)):
            return None
    except ValueError:  # nothing that could be patched
        return None
    own = tomesd.explain(pipe)
    times = math.sqrt(args.size[0] * args.size[1] / (own.width * own.height))
    if times < LARGE:
        return None
    shrink = tomesd.DeepShrink(round(times, 2))
    if shipped(args.model):
        shrink = dataclasses.replace(shrink, until=EMOJI_SHRUNK)
    say(f"note: {times:.1f} times the model's own size, so with {shrink}")
    return shrink


def add_picture(p: argparse.ArgumentParser) -> None:
    """How to draw."""
    p.add_argument("--size", type=size, help="N or WxH in pixels (default: the model's own size)")
    p.add_argument("--steps", type=positive, help="denoising steps (default: 20, or the pipeline's own)")
    p.add_argument("--guidance", type=guidance, help="guidance scale (default: 3, or the pipeline's own)")
    p.add_argument("--seed", type=seed, default=0, help="seed of every picture (default: 0)")


def check_prompts(prompts: Sequence[str]) -> None:
    """Raises a UserError for a prompt that no tokenizer could read."""
    for prompt in prompts:
        if not prompt.strip():
            raise UserError("a prompt is empty")
        try:
            prompt.encode()
        except UnicodeError:  # bytes of another encoding than that of the command line
            raise UserError(f"the prompt {prompt!r} is no text in {sys.getfilesystemencoding()}") from None


def check_picture(args: argparse.Namespace) -> None:
    """Raises a UserError for what cannot be drawn, before anything slow begins."""
    if args.size:
        check_multiple(args.size, 8)


def shipped(model: str) -> bool:
    """Whether it is the model that comes with the package."""
    return Path(model).resolve() == EMOJI_MODEL


def call_options(args: argparse.Namespace, pipe: Any) -> dict[str, Any]:
    """What a pipeline is called with beside prompt and noise."""
    options: dict[str, Any] = {}
    if args.size:
        options.update(width=args.size[0], height=args.size[1])
    small, known = shipped(args.model), inspect.signature(pipe.__call__).parameters
    if (args.guidance is not None or small) and "guidance_scale" in known:
        options["guidance_scale"] = EMOJI_GUIDANCE if args.guidance is None else args.guidance
    if args.steps or small:
        options["num_inference_steps"] = args.steps or EMOJI_STEPS
    return options
