"""Draw pictures with a Stable Diffusion pipeline and merged tokens, or compare them with the plain model.

    python -m tomesd generate                                 # the small emoji model of a checkout
    python -m tomesd generate "blue heart" "pizza" --compare  # plain beside merged, with times
    python -m tomesd generate "a cat" --model stable-diffusion-v1-5/stable-diffusion-v1-5 --size 768

Without --model the small emoji model of the repository is used: it needs no network and draws the things
listed in examples/emoji-model/README.md. Pictures go to outputs/. A wrong option is explained in one line,
before anything slow begins.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import math
import os
import re
import statistics
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import tomesd

from ..methods.choice import DOWNSAMPLES
from . import memory, metrics, plot
from .common import Parser, UserError, aligned, check_multiple, guarded, need, positive, say, size, timed
from .pipelines import (
    EMOJI_MODEL,
    add_places,
    check_model,
    check_pipeline_size,
    load_pipeline,
    pick_device,
    pick_dtype,
)

if TYPE_CHECKING:
    from PIL import Image

PROGRAM = "python -m tomesd generate"
METHODS: dict[str, Callable[[float], tomesd.Method]] = {
    "merge": tomesd.Merge,
    "sample-keys": tomesd.SampleKeys,
    "merge-stage": tomesd.MergeStage,
}
EMOJI_PROMPTS = ["red apple", "cat face", "blue heart", "pizza", "rocket", "sunflower"]
EMOJI_STEPS, EMOJI_GUIDANCE = 20, 3.0
OTHER_PROMPTS = ["a photo of an astronaut riding a horse on mars", "a watercolour of a harbour at sunrise"]
AMPLIFY = 4  # of the differences in the sheet, which are faint otherwise


@dataclass
class Series:
    """The pictures and costs of one way of drawing, plain or merged."""

    name: str
    label: str
    pictures: list[Image.Image] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peaks: list[int | None] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def peak(self) -> int | None:
        return max((peak for peak in self.peaks if peak is not None), default=None)


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    p = Parser(PROGRAM, __doc__)
    p.add_argument("prompts", nargs="*", metavar="prompt", help="what to draw; put each prompt in quotes")
    p.add_argument("--model", help="folder or hub id of a diffusers pipeline (default: examples/emoji-model)")
    p.add_argument(
        "--ratio", type=float, default=0.5, help="share of tokens to merge, 0 for none (default: 0.5)"
    )
    add_method(p, "merge")
    p.add_argument(
        "--max-downsample",
        type=int,
        choices=DOWNSAMPLES,
        help="work at levels up to this one (default: the finest with attention)",
    )
    p.add_argument("--auto", action="store_true", help="leave blocks alone where merging would be slower")
    p.add_argument("--compare", action="store_true", help="draw plain and merged side by side, with times")
    p.add_argument("--size", type=size, help="N or WxH in pixels (default: the model's own size)")
    p.add_argument("--steps", type=positive, help="denoising steps (default: 20, or the pipeline's own)")
    p.add_argument("--guidance", type=float, help="guidance scale (default: 3, or the pipeline's own)")
    p.add_argument("--seed", type=int, default=0, help="seed of every picture (default: 0)")
    add_places(p)
    args = p.parse_args(arguments)
    args.shipped = args.model is None or Path(args.model).resolve() == EMOJI_MODEL
    args.model = str(EMOJI_MODEL) if args.model is None else args.model
    args.prompts = args.prompts or (EMOJI_PROMPTS if args.shipped else OTHER_PROMPTS)
    return args


def check_cheap(args: argparse.Namespace) -> None:
    """Whatever can be known to be wrong before the slow imports."""
    for prompt in args.prompts:
        if not prompt.strip():
            raise UserError("a prompt is empty")
    if len(args.prompts) > 1 and not any(" " in p.strip() for p in args.prompts):
        say(f"note: {len(args.prompts)} prompts of one word each; put a prompt of several words in quotes")
    if args.size:
        check_multiple(args.size, 8)
    if args.guidance is not None and not (math.isfinite(args.guidance) and args.guidance >= 0):
        raise UserError(f"--guidance has to be a number of at least 0, not {args.guidance}")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed has to be in 0..2^63-1, not {args.seed}")
    check_model(args.model)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {args.out} for the pictures: {error.strerror}") from None
    if not os.access(args.out, os.W_OK):
        raise UserError(f"cannot write into the folder {args.out}")


def add_method(p: argparse.ArgumentParser, default: str) -> None:
    """Which method to patch with."""
    p.add_argument(
        "--method",
        choices=METHODS,
        default=default,
        help="merge: similar tokens merge in self-attention; sample-keys: all tokens look at a sample of "
        "them, closest to plain; merge-stage: whole transformers run on merged tokens, fastest "
        f"(default: {default})",
    )


def make_method(args: argparse.Namespace) -> tomesd.Method:
    """The method that was asked for; a UserError says why that cannot be, before a model is loaded."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            method = METHODS[args.method](args.ratio)
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from None
    for warning in caught:
        say(f"note: {warning.message}")
    return method


def patch(pipe: Any, method: tomesd.Method, max_downsample: int | None, auto: bool = False) -> None:
    """Patches a pipeline; a UserError says why that cannot be."""
    try:
        tomesd.apply_patch(pipe, method, max_downsample, auto=auto)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from None


def hint_unknown_things(args: argparse.Namespace) -> None:
    """The shipped model knows a short list of things; say so when a prompt names none of them."""
    names = EMOJI_MODEL / "names.txt"
    if not args.shipped or not names.is_file():
        return
    known = [name for thing in metrics.read_names(EMOJI_MODEL) for name in thing]
    for prompt in args.prompts:
        text = f" {' '.join(re.findall(r'[a-z]+', prompt.lower()))} "
        if not any(f" {name} " in text for name in known):
            say(f"note: the emoji model was not taught {prompt!r}; the things that it knows are in {names}")


class Drawer:
    """Draws with one pipeline, plain or merged."""

    def __init__(self, args: argparse.Namespace, pipe: Any, device: torch.device) -> None:
        self.args, self.pipe, self.device = args, pipe, device
        self.method = make_method(args)
        self.options: dict[str, Any] = {}
        if args.size:
            self.options.update(width=args.size[0], height=args.size[1])
        accepted = inspect.signature(pipe.__call__).parameters
        if "guidance_scale" in accepted and (args.guidance is not None or args.shipped):
            self.options["guidance_scale"] = EMOJI_GUIDANCE if args.guidance is None else args.guidance
        if args.steps or args.shipped:
            self.options["num_inference_steps"] = args.steps or EMOJI_STEPS

    def patch(self, merged: bool) -> None:
        if merged:
            patch(self.pipe, self.method, self.args.max_downsample, self.args.auto)
        else:
            tomesd.remove_patch(self.pipe)

    def draw(self, prompt: str, label: str, **options: Any) -> Image.Image:
        self.pipe.set_progress_bar_config(desc=f"{label}: {prompt[:40]}", leave=True)
        generator = torch.Generator().manual_seed(self.args.seed)
        result = self.pipe(prompt=prompt, generator=generator, **{**self.options, **options})
        picture: Image.Image = result.images[0]
        return picture

    def timed(self, prompt: str, series: Series) -> None:
        gc.collect()
        with memory.Peak(self.device) as peak:
            picture, seconds = timed(lambda: self.draw(prompt, series.label), self.device)
        series.pictures.append(picture)
        series.seconds.append(seconds)
        series.peaks.append(peak.reached)


def new_series(args: argparse.Namespace, merged: bool) -> Series:
    return Series("merged", f"merged {args.ratio:.0%}") if merged else Series("plain", "plain")


def draw_all(drawer: Drawer, merged: bool) -> Series:
    """Every prompt once, in one way."""
    drawn = new_series(drawer.args, merged)
    drawer.patch(merged)
    for prompt in drawer.args.prompts:
        drawer.timed(prompt, drawn)
    return drawn


def compare(drawer: Drawer) -> tuple[Series, Series]:
    """Every prompt plain and merged from the same seed, in turns, so that both meet the same machine."""
    plain, merged = (new_series(drawer.args, merged) for merged in (False, True))
    for drawn in (merged, plain):  # merged first: a model with nothing to merge is found out now
        drawer.patch(drawn is merged)
        drawer.draw(drawer.args.prompts[0], f"warm-up, {drawn.label}", num_inference_steps=2)
    for i, prompt in enumerate(drawer.args.prompts):
        for drawn in (plain, merged) if i % 2 == 0 else (merged, plain):
            drawer.patch(drawn is merged)
            drawer.timed(prompt, drawn)
    return plain, merged


def differences(a: Image.Image, b: Image.Image) -> tuple[float, float]:
    """Mean absolute difference (of 255) and PSNR in dB."""
    x, y = (np.asarray(picture.convert("RGB")) for picture in (a, b))
    return float(np.abs(x.astype(int) - y).mean()), float(metrics.psnr(x[None], y[None])[0])


def slug(prompt: str) -> str:
    return re.sub(r"\W+", "-", prompt.lower()).strip("-_")[:60].rstrip("-") or "picture"


def save(args: argparse.Namespace, series: Series) -> None:
    """Write the pictures and say where."""
    taken: set[str] = set()
    for prompt, picture in zip(args.prompts, series.pictures, strict=True):
        stem = base = slug(prompt)
        n = 1
        while stem in taken:  # prompts that differ in punctuation only
            n += 1
            stem = f"{base}-{n}"
        taken.add(stem)
        write(picture.save, args.out / f"{stem}-{args.seed}-{series.name}.png")


def write(save: Callable[[Path], object], path: Path) -> None:
    """Save under a path and print it."""
    there = path.exists()
    try:
        save(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None
    print(f"{path}{' (replaced)' if there else ''}")


def human(size: int | None) -> str:
    return "not measured" if size is None else f"{size / 2**30:.2f} GiB"


def psnr_text(psnr: float) -> str:
    return "the same" if psnr == metrics.EQUAL else f"{psnr:.1f} dB"


def summary(drawer: Drawer, plain: Series, merged: Series) -> str:
    pairs = [differences(a, b) for a, b in zip(plain.pictures, merged.pictures, strict=True)]
    width, height = plain.pictures[0].size
    gain = plain.median / merged.median
    mean, psnr = statistics.mean(d for d, _ in pairs), statistics.median(p for _, p in pairs)
    costs = [(drawn.label, f"{drawn.median:.2f}", human(drawn.peak)) for drawn in (plain, merged)]
    lines = [
        f"{width}x{height} pixels, ratio {drawer.args.ratio:g}, seed {drawer.args.seed}, on {drawer.device}; "
        f"median of {len(pairs)} prompt(s)",
        aligned([("", "seconds", f"peak {memory.kind(drawer.device)}"), *costs]),
        f"merged is {gain:.2f} times as fast; mean difference {mean:.1f} of 255, PSNR {psnr_text(psnr)}",
    ]
    if gain < 1.02:
        lines.append(
            "(little to gain here: merging pays where attention is slow, with large models and pictures)"
        )
    return "\n".join(lines)


def sheet(args: argparse.Namespace, plain: Series, merged: Series, title: str) -> Any:
    """Plain over merged over their difference, one column per prompt, as a matplotlib figure."""
    columns, captions = [], []
    for i, prompt in enumerate(args.prompts):
        pair = [drawn.pictures[i].convert("RGB") for drawn in (plain, merged)]
        mean, psnr = differences(*pair)
        columns.append((prompt, [*pair, amplified(*pair)]))
        seconds = [f"{drawn.seconds[i]:.2f} s" for drawn in (plain, merged)]
        captions.append([*seconds, f"mean {mean:.1f} of 255, {psnr_text(psnr)}"])
    inches = max(2.0, plain.pictures[0].width / 100)  # at 100 dpi no picture is shown smaller than it is
    figure = plot.sheet(columns, [plain.label, merged.label, f"difference x{AMPLIFY}"], captions, inches)
    costs = [f"{drawn.label}: {drawn.median:.2f} s, {human(drawn.peak)}" for drawn in (plain, merged)]
    heading = "; ".join([title.split("\n")[0], *costs])
    width = figure.get_size_inches()[0]
    figure.suptitle(textwrap.fill(heading, round(13 * width)), fontsize=9)
    return figure


def amplified(a: Image.Image, b: Image.Image) -> Image.Image:
    """The difference of two pictures on white, times AMPLIFY."""
    chops = need("PIL.ImageChops")
    picture: Image.Image = chops.invert(chops.difference(a, b).point(lambda value: min(255, AMPLIFY * value)))
    return picture


def run(args: argparse.Namespace) -> int:
    check_cheap(args)
    make_method(args)
    need("PIL.Image")
    if args.compare:
        need("matplotlib.figure")
    device = pick_device(args.device)
    hint_unknown_things(args)
    pipe = load_pipeline(args.model, device, pick_dtype(args.dtype, device))
    check_pipeline_size(pipe, args.size)
    drawer = Drawer(args, pipe, device)
    if not args.compare:
        drawn = draw_all(drawer, merged=args.ratio > 0)
        save(args, drawn)
        print(f"{len(drawn.pictures)} picture(s), {drawn.median:.2f} s each (median)")
        return 0
    plain, merged = compare(drawer)
    save(args, plain)
    save(args, merged)
    text = summary(drawer, plain, merged)
    figure = sheet(args, plain, merged, text)
    write(figure.savefig, args.out / f"compare-{slug(args.prompts[0])}-{args.seed}.png")
    print(text)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded(
        PROGRAM,
        lambda: run(parse_args(arguments)),
        "a higher --ratio (up to 0.75), a smaller --size, --dtype fp16 on a GPU, or for large pictures "
        "python -m tomesd generate-4k",
    )
