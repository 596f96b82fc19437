"""Draw pictures with a Stable Diffusion pipeline and merged tokens, or compare them with the plain model.

    tomesd generate                                 # the small emoji model that comes with tomesd
    tomesd generate "blue heart" "pizza" --compare  # plain beside merged, with times
    tomesd generate "a cat" --model stable-diffusion-v1-5/stable-diffusion-v1-5 --size 768
    accelerate launch -m tomesd generate --prompts-file prompts.txt --images 4 --out many
    torchrun --nproc-per-node 2 -m tomesd generate --prompts-file prompts.txt --device cpu --out many

Without --model the small emoji model is used: it needs no network and draws 330 things, red apple and rocket
among them. A --size far above the model's own is drawn with DeepShrink; generate-4k draws it in two stages.
Pictures go to outputs/ as they are drawn. A wrong option is explained in one line, before
anything slow begins.

With --prompts-file each line is a prompt. They are shared out to all processes of `accelerate launch` or
torchrun, on one machine or several that share the folder. Each picture has a seed of its own, by its prompt,
its number and --seed, so any number of processes draws the same ones. metadata.csv lists them, failed.csv the
prompts that could not be drawn. The same command goes on where it was stopped, by whatever.
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import memory, metrics, options, plot
from .common import (
    Parser,
    UserError,
    aligned,
    guarded,
    make_folder,
    need,
    positive,
    refusals,
    say,
    timed,
    whole,
)
from .pipelines import (
    EMOJI,
    EMOJI_MODEL,
    add_places,
    check_model,
    check_pipeline_size,
    find_model,
    load_pipeline,
    pick_device,
    pick_dtype,
    spare_memory,
)

if TYPE_CHECKING:
    from PIL import Image

PROGRAM = "tomesd generate"
EMOJI_PROMPTS = ["red apple", "cat face", "blue heart", "pizza", "rocket", "sunflower"]
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
    p.add_argument("--prompts-file", type=Path, metavar="FILE", help="draw many: a prompt a line")
    p.add_argument("--images", type=positive, metavar="N", help="of each of these prompts (default: 1)")
    p.add_argument(
        "--model",
        type=find_model,
        default=EMOJI,
        help="folder or hub id of a diffusers pipeline (default: emoji)",
    )
    options.add_method(p)
    p.add_argument("--compare", action="store_true", help="draw plain and merged side by side, with times")
    options.add_picture(p)
    add_places(p)
    args = p.parse_args(arguments)
    if args.prompts_file is None:
        if args.images:
            p.error("--images belongs to --prompts-file")
        args.prompts = args.prompts or (EMOJI_PROMPTS if options.shipped(args.model) else OTHER_PROMPTS)
    elif args.prompts or args.compare:
        p.error(f"--prompts-file does not go with {'--compare' if args.compare else 'prompts beside it'}")
    return args


def check_cheap(args: argparse.Namespace) -> None:
    """Whatever can be known to be wrong before the slow imports."""
    options.check_prompts(args.prompts)
    if len(args.prompts) > 1 and not any(" " in p.strip() for p in args.prompts):
        say(f"note: {len(args.prompts)} prompts of one word each; put a prompt of several words in quotes")
    options.check_picture(args)
    options.method_asked(args, tell=True)
    check_model(args.model)
    make_folder(args.out, "--out")


def hint_unknown_things(args: argparse.Namespace) -> None:
    """The shipped model knows a short list of things; say so when a prompt names none of them."""
    names = EMOJI_MODEL / "names.txt"
    if not options.shipped(args.model) or not names.is_file():
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
        self.options = options.call_options(args, pipe)
        self.shrink = options.shrink_for(pipe, args)
        if self.shrink is not None:
            spare_memory(pipe, args.size)

    def patch(self, merged: bool) -> None:
        options.patch_as_asked(self.pipe, self.args, self.shrink, plain=not merged)

    def draw(self, prompt: str, label: str, **call: Any) -> Image.Image:
        self.pipe.set_progress_bar_config(desc=f"{label}: {prompt[:40]}", leave=True)
        generator = torch.Generator().manual_seed(self.args.seed)
        with refusals():
            result = self.pipe(prompt=prompt, generator=generator, **{**self.options, **call})
        picture: Image.Image = result.images[0]
        return picture

    def timed(self, prompt: str, stem: str, series: Series) -> None:
        """Draws a picture and writes it at once, so that a run that is stopped keeps it."""
        gc.collect()
        with memory.Peak(self.device) as peak:
            picture, seconds = timed(lambda: self.draw(prompt, series.label), self.device)
        write(picture.save, self.args.out / f"{stem}-{self.args.seed}-{series.name}.png")
        series.pictures.append(picture)
        series.seconds.append(seconds)
        series.peaks.append(peak.reached)


def new_series(args: argparse.Namespace, merged: bool) -> Series:
    return Series("merged", options.label(args)) if merged else Series("plain", "plain")


def draw_all(drawer: Drawer, merged: bool) -> Series:
    """Every prompt once, in one way."""
    drawn = new_series(drawer.args, merged)
    drawer.patch(merged)
    for prompt, stem in zip(drawer.args.prompts, stems(drawer.args.prompts), strict=True):
        drawer.timed(prompt, stem, drawn)
    return drawn


def compare(drawer: Drawer) -> tuple[Series, Series]:
    """Every prompt plain and merged from the same seed, in turns, so that both meet the same machine."""
    plain, merged = (new_series(drawer.args, merged) for merged in (False, True))
    for drawn in (merged, plain):  # merged first: a model with nothing to merge is found out now
        drawer.patch(drawn is merged)
        drawer.draw(drawer.args.prompts[0], f"warm-up, {drawn.label}", num_inference_steps=2)
    for i, stem in enumerate(stems(drawer.args.prompts)):
        for drawn in (plain, merged) if i % 2 == 0 else (merged, plain):
            drawer.patch(drawn is merged)
            drawer.timed(drawer.args.prompts[i], stem, drawn)
    return plain, merged


def differences(a: Image.Image, b: Image.Image) -> tuple[float, float]:
    """Mean absolute difference (of 255) and PSNR in dB."""
    np = need("numpy")
    x, y = (np.asarray(picture.convert("RGB")) for picture in (a, b))
    return float(np.abs(x.astype(int) - y).mean()), float(metrics.psnr(x[None], y[None])[0])


def slug(prompt: str) -> str:
    return re.sub(r"\W+", "-", prompt.lower()).strip("-_")[:60].rstrip("-") or "picture"


def stems(prompts: Sequence[str]) -> list[str]:
    """A file name for each prompt, also for those that differ in punctuation only."""
    taken: list[str] = []
    for prompt in prompts:
        stem = base = slug(prompt)
        n = 1
        while stem in taken:
            n += 1
            stem = f"{base}-{n}"
        taken.append(stem)
    return taken


def write(save: Callable[[Path], object], path: Path) -> None:
    """Save under a path, whole or not at all, and print it."""
    there = path.exists()
    try:
        with whole(path) as part:
            save(part)
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
        f"{width}x{height} pixels, {merged.label}, seed {drawer.args.seed}, on {drawer.device}; "
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
    need("PIL.Image")
    if args.compare:
        need("matplotlib.figure")
    device = pick_device(args.device)
    hint_unknown_things(args)
    pipe = load_pipeline(args.model, device, pick_dtype(args.dtype, device))
    check_pipeline_size(pipe, args.size)
    drawer = Drawer(args, pipe, device)
    if not args.compare:
        drawn = draw_all(drawer, merged=bool(args.recipe or args.ratio))
        print(f"{len(drawn.pictures)} picture(s), {drawn.median:.2f} s each (median)")
        return 0
    plain, merged = compare(drawer)
    text = summary(drawer, plain, merged)
    figure = sheet(args, plain, merged, text)
    write(figure.savefig, args.out / f"compare-{slug(args.prompts[0])}-{args.seed}.png")
    print(text)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    def call() -> int:
        args = parse_args(arguments)
        # By its name, as a command is: it draws by what this module holds.
        return need("tomesd.commands.many").run(args) if args.prompts_file else run(args)

    return guarded(
        PROGRAM,
        call,
        "a higher --ratio (up to 0.75), a smaller --size, --dtype fp16 on a GPU, or for large pictures "
        "tomesd generate-4k",
    )
