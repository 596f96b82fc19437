"""Draw a picture of 3840x2176 pixels, with a fraction of the attention.

    tomesd generate-4k "a harbour at sunrise"        # Stable Diffusion 1.5 from the hub
    tomesd generate-4k "a harbour at sunrise" --size 4096 --method merge-stage \\
        --model stabilityai/stable-diffusion-xl-base-1.0
    tomesd generate-4k --random --compare            # no weights: what 50 steps take
    tomesd generate-4k "red apple" --model emoji --size 256x128 --steps 20

A model draws well at the size that it was trained at, and repeats things at larger ones.  So the picture is
drawn at about that size, upscaled, and refined at the size asked for by img2img: most of the time goes there,
and there tomesd is at work. `--direct` draws at once at the size asked for, the deep levels of the network
shrunk in the first steps (`tomesd.DeepShrink`).

At the two finest levels with attention every token looks at a sixteenth of all.  TFLOPs of a step with both
guidance halves, and GiB that it needs beside the weights (`python scripts/bench count --spare`):

                                 SD 1.5, 3840x2176     SDXL, 4096x4096
    plain                             292   2.9             576   4.4
    tomesd by default                 128   2.9             409   4.4
    this                               62   2.9             218   4.4
    this, merge-stage                  55   2.2             113   4.4

Self-attention alone, on a sample of the keys, stays closest to the plain picture.  With `--method
merge-stage` three of four tokens merge, for all parts of a transformer: take it for SDXL, where these weigh
more, and where memory is short.

`bash scripts/bench_gpu.sh outputs/gpu 4k` measures steps alone on a GPU, tomesd 0.1.3 among them.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import tomesd

from . import generate, memory, options
from .common import (
    Parser,
    UserError,
    aligned,
    check_multiple,
    guarded,
    guidance,
    need,
    positive,
    refusals,
    say,
    seed,
    size,
    synchronize,
)
from .models import random_pipeline
from .pipelines import (
    EMOJI,
    add_places,
    check_pipeline_size,
    find_model,
    load_pipeline,
    pick_device,
    pick_dtype,
    spare_memory,
)

if TYPE_CHECKING:
    from PIL import Image

PROGRAM = "tomesd generate-4k"
MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@dataclass
class Stage:
    """A picture and what it cost; `steps` are the seconds of each denoising step."""

    name: str
    label: str
    picture: Image.Image
    seconds: float
    steps: list[float]
    peak: int | None

    @property
    def step(self) -> float:
        """Median seconds of a step, without the first, in which text and picture are encoded."""
        return statistics.median(self.steps[1:] or self.steps)


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    p = Parser(PROGRAM, __doc__)
    p.add_argument("prompt", nargs="?", help="what to draw, in quotes")
    which = p.add_mutually_exclusive_group()
    which.add_argument(
        "--model", type=find_model, default=MODEL, help=f"folder or hub id of a pipeline ({MODEL})"
    )
    which.add_argument(
        "--random",
        action="store_true",
        help="Stable Diffusion 1.5 in full size with random weights, directly: draws noise, needs no "
        "download, costs what the real one costs",
    )
    p.add_argument("--size", type=size, default=(3840, 2176), help="N or WxH in pixels (default: 3840x2176)")
    p.add_argument(
        "--direct",
        action="store_true",
        help="draw at once at --size, with DeepShrink where that is far above the model's own",
    )
    p.add_argument("--base-size", type=size, help="what to draw first (default: near the model's own size)")
    p.add_argument(
        "--strength", type=float, help="share of the steps that refine the upscaled picture (default: 0.4)"
    )
    p.add_argument("--steps", type=positive, default=50, help="denoising steps (default: 50)")
    p.add_argument("--guidance", type=guidance, help="guidance scale (default: 3, or the pipeline's own)")
    options.add_method(p, "sample-keys", 0.75, "the two finest")
    p.add_argument("--compare", action="store_true", help="do the last stage without tomesd as well")
    p.add_argument("--seed", type=seed, default=0, help="seed of the picture (default: 0)")
    add_places(p)
    args = p.parse_args(arguments)
    if args.prompt is None and not args.random:
        p.error("what is to be drawn? give a prompt in quotes, or --random to measure without weights")
    for option in ("base_size", "strength"):
        if getattr(args, option) is not None and (args.direct or args.random):
            p.error(
                f"--{option.replace('_', '-')} means nothing with {'--random' if args.random else '--direct'}"
            )
    if args.strength is None:
        args.strength = 0.4
    if args.guidance is None and options.shipped(args.model):
        args.guidance = options.EMOJI_GUIDANCE
    args.direct = args.direct or args.random
    args.prompt = "noise" if args.prompt is None else args.prompt
    return args


def check_cheap(args: argparse.Namespace) -> None:
    """Whatever can be known to be wrong before the slow imports, and before a model is loaded."""
    # One prompt, and the names that generate.py has for things.
    generate.check_cheap(argparse.Namespace(**{**vars(args), "prompts": [args.prompt]}))
    if args.base_size:
        check_multiple(args.base_size, 8, "--base-size")
    if not 0 < args.strength <= 1:
        raise UserError(f"--strength has to be above 0 and at most 1, not {args.strength}")
    if not args.direct and int(args.steps * args.strength) < 1:
        raise UserError(
            f"--steps {args.steps} times --strength {args.strength} leaves no step to refine in: raise one"
        )


def load(args: argparse.Namespace, device: torch.device) -> Any:
    dtype = pick_dtype(args.dtype, device)
    if args.random:
        say(f"making a random Stable Diffusion 1.5 on {device} as {str(dtype).removeprefix('torch.')}")
        say("note: the picture will be noise; only seconds and memory mean something")
        pipe = random_pipeline(device, dtype)
    else:
        pipe = load_pipeline(args.model, device, dtype, f"take --random or --model {EMOJI}")
    if not (hasattr(pipe, "unet") and hasattr(pipe, "vae")):
        raise UserError(f"{args.model} is a {type(pipe).__name__}, which has no UNet or no autoencoder")
    spare_memory(pipe, args.size)
    return pipe


def base_size(pipe: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height near the model's own area and near the shape of `size`, even at all levels."""
    multiple = pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    native = tomesd.explain(pipe)

    def distance(candidate: tuple[int, int]) -> float:
        width, height = candidate
        shape = math.log(width / height) - math.log(size[0] / size[1])
        return 2 * abs(shape) + abs(math.log(width * height / (native.width * native.height)))

    sides = range(multiple, 2 * max(native.width, native.height) + multiple, multiple)
    return min(itertools.product(sides, sides), key=distance)


class Tiles:
    """Tells how far the autoencoder is, which encodes and decodes large pictures tile by tile."""

    def __init__(self, vae: Any) -> None:
        self.halves = {"encoding": vae.encoder, "decoding": vae.decoder}

    def __enter__(self) -> None:
        self.hooks = [half.register_forward_hook(self.counter(name)) for name, half in self.halves.items()]

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()
        say("")

    def counter(self, name: str) -> Callable[..., None]:
        number = itertools.count(1)

        def count(*call: object) -> None:
            # Not a bar of tqdm: it could not be closed before the bar of the steps begins.
            print(f"\r{name}: tile {next(number)}", end="", file=sys.stderr, flush=True)

        return count


@dataclass
class Artist:
    """Draws one picture in stages, and measures each."""

    args: argparse.Namespace
    device: torch.device

    def now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def draw(self, pipe: Any, name: str, label: str, **call: Any) -> Stage:
        marks: list[float] = []

        def mark(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            marks.append(self.now())
            return tensors

        if self.args.guidance is not None:
            call["guidance_scale"] = self.args.guidance
        call.setdefault("num_inference_steps", self.args.steps)
        pipe.set_progress_bar_config(desc=label)
        gc.collect()
        with memory.Peak(self.device) as peak, Tiles(pipe.vae), refusals():
            begin = self.now()
            result = pipe(
                prompt=self.args.prompt,
                generator=torch.Generator().manual_seed(self.args.seed),
                callback_on_step_end=mark,
                **call,
            )
            end = self.now()
        steps = [b - a for a, b in zip([begin, *marks], marks, strict=False)]
        return Stage(name, label, result.images[0], end - begin, steps, peak.reached)


def save(args: argparse.Namespace, stage: Stage) -> None:
    stem = f"{generate.slug(args.prompt)}-{args.seed}-{'x'.join(map(str, stage.picture.size))}"
    generate.write(stage.picture.save, args.out / f"{stem}-{stage.name}.png")


def table(stages: list[Stage], memory: str) -> str:
    """What each stage cost."""
    lines = [("", "size", "seconds", "steps", "s/step", "50 steps", f"peak {memory}")]
    for s in stages:
        seconds = (f"{s.seconds:.2f}", str(len(s.steps)), f"{s.step:.3f}", f"{50 * s.step:.1f} s")
        lines.append((s.label, "x".join(map(str, s.picture.size)), *seconds, generate.human(s.peak)))
    return aligned(lines)


def patch(
    args: argparse.Namespace, pipe: Any, merged: bool = True, shrink: tomesd.DeepShrink | None = None
) -> None:
    finest = min(row.downsample for row in tomesd.explain(pipe).rows)
    if not (args.max_downsample or args.recipe):
        args.max_downsample = min(8, 2 * finest)
    options.patch_as_asked(pipe, args, shrink, plain=not merged)


def run(args: argparse.Namespace) -> int:
    check_cheap(args)
    ops = need("PIL.ImageOps")
    device = pick_device(args.device)
    pipe = load(args, device)
    check_pipeline_size(pipe, args.size)
    merging = bool(args.recipe or args.ratio)
    if merging:  # tried now, as the base picture takes a while
        patch(args, pipe)
        say(str(tomesd.explain(pipe, args.size[1], args.size[0])).split("\n")[-1])
        tomesd.remove_patch(pipe)
    artist = Artist(args, device)
    stages, shrink = [], None
    if args.direct:
        last, what = pipe, {"width": args.size[0], "height": args.size[1]}
        shrink = None if args.random else options.shrink_for(pipe, args)
    else:
        try:
            last = need("diffusers").AutoPipelineForImage2Image.from_pipe(pipe)
        except ValueError:
            raise UserError(f"diffusers has no img2img for {type(pipe).__name__}: take --direct") from None
        width, height = args.base_size or base_size(pipe, args.size)
        if abs(width / height * args.size[1] / args.size[0] - 1) > 0.1:
            say(f"note: {width}x{height} is of another shape than the picture, and will be cropped to it")
        stages.append(artist.draw(pipe, "base", "base", width=width, height=height))
        save(args, stages[0])
        large = ops.fit(stages[0].picture, args.size, method=need("PIL.Image").Resampling.LANCZOS)
        what = {"image": large, "strength": args.strength}
    if args.compare and device.type == "cuda":  # or the first of the two would pay for what is made once
        artist.draw(last, "", "warm-up", **what, num_inference_steps=math.ceil(1 / args.strength))
    for merged in (False, True) if args.compare and merging else (merging,):
        patch(args, last, merged, shrink)
        label = options.label(args) if merged else "plain"
        stages.append(artist.draw(last, "merged" if merged else "plain", label, **what))
        save(args, stages[-1])
    print(table(stages, memory.kind(device)))
    if args.compare and merging:
        plain, fast = stages[-2:]
        line = f"a merged step is {plain.step / fast.step:.2f} times as fast"
        if not args.random:  # or it would compare noise with noise
            line += f"; PSNR {generate.psnr_text(generate.differences(plain.picture, fast.picture)[1])}"
        print(line)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded(
        PROGRAM,
        lambda: run(parse_args(arguments)),
        "a smaller --size, --dtype fp16 on a GPU, or a higher --ratio without --compare",
    )
