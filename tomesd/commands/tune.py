"""Finds a method for each transformer of a pipeline, by measuring on its own weights, and writes a recipe.

    tomesd tune --speed 2 --out recipe.json                   the model that comes with tomesd
    tomesd tune OWNER/MODEL --error 0.01 --out recipe.json --plot frontier.png
    tomesd tune OWNER/MODEL --psnr 45 --prompts-file prompts.txt --dtype fp16

    tomesd.apply_patch(pipe, tomesd.Recipe.load("recipe.json"))

It takes as long as some hundred steps of the network. What was measured is kept, so a run that was stopped
goes on where it was, and another wish for the same model, size and steps is answered at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..tools import trials, tune
from . import common
from .common import UserError, guarded, need, positive
from .metrics import check_enough, own_prompts
from .pipelines import (
    EMOJI,
    SHORT,
    check_model,
    check_pipeline_size,
    find_model,
    load_pipeline,
    pick_device,
    pick_dtype,
    prepare,
    prompts_in,
    weights_of,
)
from .plot import new_picture, save

PROGRAM = "tomesd tune"


def make_parser() -> argparse.ArgumentParser:
    parser = common.Parser(PROGRAM, __doc__)
    parser.add_argument("model", nargs="?", type=find_model, default=EMOJI, help="folder or hub id (emoji)")
    wish = parser.add_mutually_exclusive_group()
    wish.add_argument("--speed", type=float, help="how many times as fast as plain, with the least error (2)")
    wish.add_argument("--error", type=float, help="relative error of the network's output, in the least time")
    wish.add_argument("--psnr", type=float, help="of pictures against plain ones in dB, in the least time")
    parser.add_argument("--out", type=common.new_file, metavar="FILE", help="write the recipe there")
    parser.add_argument("--json", action="store_true", help="print the recipe as JSON, as --out writes it")
    parser.add_argument(
        "--plot", type=new_picture, metavar="FILE", help="error over speed of all best choices"
    )
    parser.add_argument("--prompts", type=positive, help="how many of the model's names to draw at once (2)")
    parser.add_argument("--prompts-file", type=Path, metavar="FILE", help="what to draw instead, one a line")
    parser.add_argument("--size", type=common.size, help="512 or 1024x576, in pixels (the model's own)")
    parser.add_argument("--steps", type=positive, default=20, help="of the sampler (20)")
    parser.add_argument("--dtype", choices=("auto", *SHORT), default="auto", help="(fp16 on cuda, else fp32)")
    parser.add_argument("--device", default="auto", help="(the best there is)")
    parser.add_argument("--threads", type=common.threads, help="CPU threads of torch")
    cache = common.CACHE / "tune"
    parser.add_argument("--cache", type=Path, default=cache, metavar="FOLDER", help=f"({cache})")
    parser.add_argument("--fresh", action="store_true", help="measure again what is kept there")
    return parser


def prompts_of(args: argparse.Namespace) -> list[str] | None:
    """What to draw: a few names of a model that has some, else the defaults of `tune`."""
    if args.prompts_file:
        return prompts_in(args.prompts_file)
    if not args.prompts and not (Path(args.model) / "names.txt").is_file():
        return None
    names, wanted = own_prompts(args.model), args.prompts or 2
    check_enough(wanted, names)
    return [names[i * len(names) // (wanted + 1)] for i in range(1, wanted + 1)]


def cache_file(args: argparse.Namespace, prompts: list[str] | None) -> Path:
    """Where trials of the same model, settings and sources are kept."""
    folder, package = Path(args.model), Path(tune.__file__).parents[1]
    about = {
        "model": args.model,
        "weights": weights_of(folder),
        "settings": [prompts, args.size, args.steps, args.dtype, str(args.device), torch.get_num_threads()],
        "torch": torch.__version__,
        "sources": [
            hashlib.sha256(file.read_bytes()).hexdigest()
            for room in ("maths", "hosts", "methods", "tools")
            for file in sorted((package / room).glob("*.py"))
        ],
    }
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
    return Path(args.cache) / f"{folder.name}-{digest}.json"


def known_trials(file: Path) -> dict[str, trials.Trial]:
    return {key: trials.Trial(*trial) for key, trial in json.loads(file.read_text(encoding="utf-8")).items()}


def draw(tuning: trials.Tuning, about: dict[str, Any] | None) -> Any:
    """A figure of matplotlib: the error that each speed costs at least, and what was measured of a recipe."""
    figure = need("matplotlib.figure").Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    choices = [c for c in tuning.choices(tune.METHODS) if c.error > 0]
    axis.plot([tuning.speed(c) for c in choices], [math.sqrt(c.error) for c in choices], label="expected")
    if about:
        axis.plot([about["speed"]], [about["error"]], "o", color="C3", label="this recipe, measured")
    axis.set_yscale("log")
    axis.set_xlabel(f"speed of {tuning.network}, plain = 1")
    axis.set_ylabel("relative error of its output")
    axis.grid(color="0.92")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    return figure


def run(args: argparse.Namespace) -> int:
    common.make_folder(args.cache, "--cache")
    wishes = {
        name: value for name in ("speed", "error", "psnr") if (value := getattr(args, name)) is not None
    }
    try:
        wish = tune.Wish.of(wishes)
    except ValueError as error:
        raise UserError(f"argument --{error}") from None
    check_model(args.model)
    args.device = pick_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    prompts = prompts_of(args)
    pipe = load_pipeline(args.model, args.device, pick_dtype(args.dtype, args.device))
    check_pipeline_size(pipe, args.size)
    prepare(pipe)
    width, height = args.size or (None, None)
    try:
        tuning = trials.record(pipe, prompts, height, width, args.steps)
    except (TypeError, ValueError) as error:
        raise UserError(f"{args.model} cannot be tuned: {common.first_line(error)}") from None
    file = cache_file(args, prompts)
    tuning.trials = {} if args.fresh else common.kept(file, known_trials) or {}
    for _ in trials.measure(tuning, tune.METHODS):
        with common.whole(file) as part:
            part.write_text(json.dumps(tuning.trials), encoding="utf-8")
    failed = recipe = None
    try:
        recipe = tune.solve(tuning, tune.METHODS, wish)
        print(json.dumps(recipe.to_dict()) if args.json else recipe)
    except ValueError as error:
        failed = str(error)
    if recipe is not None and args.out:
        recipe.save(args.out)
    if args.plot:
        save(draw(tuning, None if recipe is None else recipe.about), args.plot, "--plot")
    if failed:
        raise UserError(failed)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded(PROGRAM, lambda: run(make_parser().parse_args(arguments)))
