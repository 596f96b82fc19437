"""Draw pictures with Stable Diffusion and merged tokens, or compare them with the plain model.

    python examples/generate.py                                 # the small emoji model in this repository
    python examples/generate.py "blue heart" "pizza" --compare  # plain beside merged, with times
    python examples/generate.py "a cat" --model stable-diffusion-v1-5/stable-diffusion-v1-5 --size 768

Pictures go to ``outputs/``.  A wrong option is told in one line, before anything slow begins.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import inspect
import json
import math
import os
import re
import statistics
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

EMOJI_MODEL = Path(__file__).resolve().parent / "emoji-model"
EMOJI_PROMPTS = ["red apple", "cat face", "blue heart", "pizza", "rocket", "sunflower"]
EMOJI_STEPS, EMOJI_GUIDANCE = 20, 3.0
OTHER_PROMPTS = ["a photo of an astronaut riding a horse on mars", "a watercolour of a harbour at sunrise"]
AMPLIFY = 4  # of the differences in the sheet, which are faint otherwise
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class UserError(Exception):
    """A mistake that one line explains; the program ends with exit code 2."""


@dataclass
class Run:
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
        known = [p for p in self.peaks if p is not None]
        return max(known) if known else None


def size(text: str) -> tuple[int, int]:
    """``512`` or ``768x512`` (width x height) as (width, height)."""
    match = re.fullmatch(r"(\d+)(?:[xX](\d+))?", text.strip())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number such as 512 nor WxH such as 768x512")
    width = int(match[1])
    return width, int(match[2] or width)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def add_places(p: argparse.ArgumentParser) -> None:
    """Where to draw, how precisely, and where the pictures go."""
    p.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, mps, ... (default: the best there is)"
    )
    p.add_argument(
        "--dtype", choices=("auto", *DTYPES), default="auto", help="default: fp16 on cuda, else fp32"
    )
    p.add_argument("--out", type=Path, default=Path("outputs"), help="folder for pictures (default: outputs)")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description="Draw pictures with a Stable Diffusion pipeline, its similar tokens merged by tomesd.",
        epilog="Without --model the small emoji model of this repository is used: it needs no network and "
        "draws the things listed in examples/emoji-model/README.md.",
    )
    p.add_argument("prompts", nargs="*", metavar="prompt", help="what to draw; put each prompt in quotes")
    p.add_argument("--model", help="folder or hub id of a diffusers pipeline (default: examples/emoji-model)")
    p.add_argument(
        "--ratio", type=float, default=0.5, help="share of tokens to merge, 0 for none (default: 0.5)"
    )
    p.add_argument(
        "--stage",
        action="store_true",
        help="run whole transformers on merged tokens, not self-attention only",
    )
    p.add_argument(
        "--max-downsample",
        type=int,
        choices=(1, 2, 4, 8),
        help="merge at levels up to this one (default: the finest with attention)",
    )
    p.add_argument(
        "--keys-only",
        action="store_true",
        help="let self-attention look at a sample of the tokens instead of merging them: nearer to plain",
    )
    p.add_argument("--auto", action="store_true", help="leave blocks alone where merging would be slower")
    p.add_argument("--compare", action="store_true", help="draw plain and merged side by side, with times")
    p.add_argument("--size", type=size, help="N or WxH in pixels (default: the model's own size)")
    p.add_argument("--steps", type=positive, help="denoising steps (default: 20, or the pipeline's own)")
    p.add_argument("--guidance", type=float, help="guidance scale (default: 3, or the pipeline's own)")
    p.add_argument("--seed", type=int, default=0, help="seed of every picture (default: 0)")
    add_places(p)
    args = p.parse_args(argv)
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
    check_model_folder(args.model)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {args.out} for the pictures: {error.strerror}") from None
    if not os.access(args.out, os.W_OK):
        raise UserError(f"cannot write into the folder {args.out}")


def check_multiple(size: tuple[int, int], multiple: int, option: str = "--size") -> None:
    for side in size:
        if side % multiple or side == 0:
            below = max(multiple, side // multiple * multiple)
            near = dict.fromkeys((below, below + multiple))
            advice = " or ".join(map(str, near))
            raise UserError(
                f"{option} {size[0]}x{size[1]}: {side} is not a multiple of {multiple}; take {advice}"
            )


def check_model_folder(model: str) -> None:
    path = Path(model).expanduser()
    if path == EMOJI_MODEL and not path.exists():
        raise UserError(f"the shipped model is missing from {path}; scripts/emoji trains it anew")
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise UserError(f"{path} is not a pipeline folder: it has no model_index.json")
        try:
            json.loads((path / "model_index.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path / 'model_index.json'}: {error}") from None
    elif path.is_file():
        raise UserError(f"{path} is a file; --model wants the folder or hub id of a diffusers pipeline")
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith("."):
        raise UserError(f"there is no folder {path}, and {model!r} cannot be a hub id (owner/name)")


def need(module: str) -> Any:
    """Import, or say how to get what is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"cannot import {module} ({error}); run `bash scripts/generate.sh`, which sets everything up, or "
            'pip install -e ".[diffusers]" in the repository'
        ) from None


def check_ratio(ratio: float, **options: Any) -> None:
    """Let tomesd judge the ratio before a model is loaded."""
    config = need("tomesd.config")
    try:
        config.MergeConfig(ratio=ratio, **options)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from None


def pick_device(wanted: str) -> Any:
    torch = need("torch")
    if wanted == "auto":
        mps = getattr(torch.backends, "mps", None)
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if mps and mps.is_available() else "cpu"
        )
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise UserError(
            f"--device {wanted}: there is no such device; cpu, cuda, cuda:1 and mps are some"
        ) from None
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {wanted} cannot be used here: {first_line(error)}") from None
    if device.type == "meta":
        raise UserError("--device meta draws nothing")
    return device


def pick_dtype(wanted: str, device: Any) -> Any:
    name = ("float16" if device.type == "cuda" else "float32") if wanted == "auto" else DTYPES[wanted]
    return getattr(need("torch"), name)


def load_pipeline(
    args: argparse.Namespace, device: Any, otherwise: str = "leave --model out for the shipped model"
) -> Any:
    """The pipeline, on its device; if it cannot be had, the error says what to do `otherwise`."""
    diffusers, dtype = need("diffusers"), pick_dtype(args.dtype, device)
    local = Path(args.model).expanduser()
    source = str(local) if local.is_dir() else args.model
    say(f"loading {source} on {device} as {str(dtype).removeprefix('torch.')}")
    # diffusers 0.42 calls torch_dtype old
    keyword = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 42) else "torch_dtype"
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(source, **{keyword: dtype})
    except Exception as error:
        if local.is_dir():
            raise UserError(f"{local} cannot be loaded as a pipeline: {first_line(error)}") from None
        cause = first_line(error)
        if "not fully cached" in str(error) or "onnect" in str(error):
            cause = "cannot be reached, and it is not in the local cache"
        raise UserError(
            f"cannot get the model {args.model!r}: no such folder here, and from the Hugging "
            f"Face Hub: {cause}. Check the name and the network, or {otherwise}"
        ) from None
    if "prompt" not in inspect.signature(pipe.__call__).parameters:
        raise UserError(f"{args.model} is a {type(pipe).__name__}, which draws nothing from a prompt")
    return pipe.to(device)


def check_pipeline_size(args: argparse.Namespace, pipe: Any) -> None:
    """The size against what this pipeline's autoencoder and network need."""
    if args.size:
        check_multiple(args.size, math.lcm(8, int(getattr(pipe, "vae_scale_factor", 8))))


def hint_unknown_things(args: argparse.Namespace) -> None:
    """The shipped model knows a short list of things; say so when a prompt names none of them."""
    names = EMOJI_MODEL / "names.txt"
    if not args.shipped or not names.is_file():
        return
    known = names.read_text(encoding="utf-8").replace("\n", " / ").split(" / ")
    for prompt in args.prompts:
        text = f" {' '.join(re.findall(r'[a-z]+', prompt.lower()))} "
        if not any(name and f" {name} " in text for name in known):
            say(f"note: the emoji model was not taught {prompt!r}; the things that it knows are in {names}")


class Memory:
    """Peak memory of one run: of the GPU's allocator, or of this process where Linux lets us measure it."""

    def __init__(self, device: Any) -> None:
        self.cuda = need("torch").cuda if device.type == "cuda" else None
        self.device = device
        self.what = "GPU memory" if self.cuda else "process memory"

    def start(self) -> bool:
        gc.collect()
        if self.cuda:
            self.cuda.empty_cache()
            self.cuda.reset_peak_memory_stats(self.device)
            return True
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # or one run would be billed for the leftovers of another
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak below
        except (OSError, AttributeError):
            return False
        return True

    def peak(self, started: bool) -> int | None:
        if not started:
            return None
        if self.cuda:
            return self.cuda.max_memory_allocated(self.device)
        match = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return int(match[1]) * 1024 if match else None


class Drawer:
    """Draws with one pipeline, plain or merged."""

    def __init__(self, args: argparse.Namespace, pipe: Any, device: Any) -> None:
        self.args, self.pipe, self.device = args, pipe, device
        self.torch, self.tomesd = need("torch"), need("tomesd")
        self.memory = Memory(device)
        self.options: dict[str, Any] = {}
        if args.size:
            self.options.update(width=args.size[0], height=args.size[1])
        accepted = inspect.signature(pipe.__call__).parameters
        if "guidance_scale" in accepted and (args.guidance is not None or args.shipped):
            self.options["guidance_scale"] = EMOJI_GUIDANCE if args.guidance is None else args.guidance
        if args.steps or args.shipped:
            self.options["num_inference_steps"] = args.steps or EMOJI_STEPS

    def patch(self, merged: bool) -> None:
        if not merged:
            self.tomesd.remove_patch(self.pipe)
            return
        try:
            self.tomesd.apply_patch(
                self.pipe,
                self.args.ratio,
                self.args.max_downsample,
                merge_stage=self.args.stage,
                auto=self.args.auto,
                keys_only=self.args.keys_only,
            )
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from None

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize(self.device)

    def draw(self, prompt: str, label: str, **options: Any) -> Image.Image:
        self.pipe.set_progress_bar_config(desc=f"{label}: {prompt[:40]}", leave=True)
        generator = self.torch.Generator().manual_seed(self.args.seed)
        result = self.pipe(prompt=prompt, generator=generator, **{**self.options, **options})
        return result.images[0]

    def timed(self, prompt: str, run: Run) -> None:
        started = self.memory.start()
        self.synchronize()
        begin = time.perf_counter()
        picture = self.draw(prompt, run.label)
        self.synchronize()
        run.seconds.append(time.perf_counter() - begin)
        run.peaks.append(self.memory.peak(started))
        run.pictures.append(picture)


def draw_all(drawer: Drawer, merged: bool) -> Run:
    """Every prompt once, in one way."""
    run = Run("merged" if merged else "plain", f"merged {drawer.args.ratio:.0%}" if merged else "plain")
    drawer.patch(merged)
    for prompt in drawer.args.prompts:
        drawer.timed(prompt, run)
    return run


def compare(drawer: Drawer) -> tuple[Run, Run]:
    """Every prompt plain and merged from the same seed, in turns, so that both meet the same machine."""
    plain, merged = Run("plain", "plain"), Run("merged", f"merged {drawer.args.ratio:.0%}")
    for run in (merged, plain):  # merged first: should this model have nothing to merge, we hear of it now
        drawer.patch(run is merged)
        drawer.draw(drawer.args.prompts[0], f"warm-up, {run.label}", num_inference_steps=2)
    for i, prompt in enumerate(drawer.args.prompts):
        for run in (plain, merged) if i % 2 == 0 else (merged, plain):
            drawer.patch(run is merged)
            drawer.timed(prompt, run)
    return plain, merged


def differences(a: Image.Image, b: Image.Image) -> tuple[float, float]:
    """Mean absolute difference (of 255) and PSNR in dB, infinite for the same picture."""
    np = need("numpy")
    x, y = (np.asarray(p.convert("RGB"), dtype=np.float64) for p in (a, b))
    mse = float(np.square(x - y).mean())
    return float(np.abs(x - y).mean()), 10 * math.log10(255**2 / mse) if mse else math.inf


def slug(prompt: str) -> str:
    return re.sub(r"\W+", "-", prompt.lower()).strip("-_")[:60].rstrip("-") or "picture"


def save(args: argparse.Namespace, run: Run) -> None:
    """Write the pictures and say where."""
    taken: set[str] = set()
    for prompt, picture in zip(args.prompts, run.pictures, strict=True):
        stem = base = slug(prompt)
        n = 1
        while stem in taken:  # prompts that differ in punctuation only
            n += 1
            stem = f"{base}-{n}"
        taken.add(stem)
        write(picture.save, args.out / f"{stem}-{args.seed}-{run.name}.png")


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
    return "the same" if math.isinf(psnr) else f"{psnr:.1f} dB"


def summary(drawer: Drawer, plain: Run, merged: Run) -> str:
    pairs = [differences(a, b) for a, b in zip(plain.pictures, merged.pictures, strict=True)]
    width, height = plain.pictures[0].size
    gain = plain.median / merged.median
    mean, psnr = statistics.mean(d for d, _ in pairs), statistics.median(p for _, p in pairs)
    lines = [
        f"{width}x{height} pixels, ratio {drawer.args.ratio:g}, seed {drawer.args.seed}, on {drawer.device}; "
        f"median of {len(pairs)} prompt(s)",
        f"{'':12} {'seconds':>8}   peak {drawer.memory.what}",
        *(f"{r.label:12} {r.median:8.2f}   {human(r.peak)}" for r in (plain, merged)),
        f"merged is {gain:.2f} times as fast; mean difference {mean:.1f} of 255, PSNR {psnr_text(psnr)}",
    ]
    if gain < 1.02:
        lines.append(
            "(little to gain here: merging pays where attention is slow, with large models and pictures)"
        )
    return "\n".join(lines)


def sheet(args: argparse.Namespace, plain: Run, merged: Run, title: str) -> Any:
    """Plain over merged over their difference, one column per prompt, as a matplotlib figure."""
    inches = max(2.0, plain.pictures[0].width / 100)  # at 100 dpi no picture is shown smaller than it is
    columns = len(args.prompts)
    size = (columns * inches + 0.5, 3 * inches + 1.7)
    figure = need("matplotlib.figure").Figure(figsize=size, dpi=100, layout="constrained")
    axes = figure.subplots(3, columns, squeeze=False)
    costs = [f"{run.label}: {run.median:.2f} s, {human(run.peak)}" for run in (plain, merged)]
    heading = "; ".join([title.split("\n")[0], *costs])
    figure.suptitle("\n".join(textwrap.wrap(heading, width=round(13 * size[0]))), fontsize=9)
    for row, name in enumerate((plain.label, merged.label, f"difference x{AMPLIFY}")):
        axes[row, 0].set_ylabel(name)
    for column, prompt in enumerate(args.prompts):
        axes[0, column].set_title(
            textwrap.shorten(prompt, round(14 * inches), placeholder=" ..."), fontsize=10
        )
        pair = [run.pictures[column].convert("RGB") for run in (plain, merged)]
        mean, psnr = differences(*pair)
        cells = (
            (pair[0], f"{plain.seconds[column]:.2f} s"),
            (pair[1], f"{merged.seconds[column]:.2f} s"),
            (amplified(*pair), f"mean {mean:.1f} of 255, {psnr_text(psnr)}"),
        )
        for row, (picture, caption) in enumerate(cells):
            axes[row, column].imshow(picture, interpolation="nearest")
            axes[row, column].set(xticks=[], yticks=[])
            axes[row, column].set_xlabel(caption, fontsize=9)
    return figure


def amplified(a: Image.Image, b: Image.Image) -> Image.Image:
    """The difference of two pictures on white, times AMPLIFY."""
    chops = need("PIL.ImageChops")
    return chops.invert(chops.difference(a, b).point(lambda value: min(255, AMPLIFY * value)))


def say(line: str) -> None:
    """Progress goes to stderr, results to stdout."""
    print(line, file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    """What an error says, short: its first line, or the first sentences of a long one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return textwrap.shorten(lines[0], 160, placeholder=" ...").rstrip(".") if lines else type(error).__name__


def out_of_memory(error: BaseException) -> bool:
    named = type(error).__name__ in ("OutOfMemoryError", "MemoryError")
    return named or "out of memory" in str(error) or "can't allocate memory" in str(error)


def run(args: argparse.Namespace) -> None:
    check_cheap(args)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its hints concern parts that we do not use
    check_ratio(args.ratio, keys_only=args.keys_only, merge_stage=args.stage)
    need("PIL.Image")
    if args.compare:
        need("matplotlib.figure")
    device = pick_device(args.device)
    hint_unknown_things(args)
    pipe = load_pipeline(args, device)
    check_pipeline_size(args, pipe)
    drawer = Drawer(args, pipe, device)
    if not args.compare:
        drawn = draw_all(drawer, merged=args.ratio > 0)
        save(args, drawn)
        print(f"{len(drawn.pictures)} picture(s), {drawn.median:.2f} s each (median)")
        return
    plain, merged = compare(drawer)
    for result in (plain, merged):
        save(args, result)
    text = summary(drawer, plain, merged)
    write(
        sheet(args, plain, merged, text).savefig,
        args.out / f"compare-{slug(args.prompts[0])}-{args.seed}.png",
    )
    print(text)


def guarded(program: str, call: Callable[[], None], if_full: str) -> int:
    """The exit code of a call, whose mistakes are told in a line; `if_full`: what to try if memory ends."""
    try:
        call()
    except UserError as error:
        say(f"{program}: error: {error}")
        return 2
    except KeyboardInterrupt:
        say("stopped")
        return 130
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        say(f"{program}: error: out of memory; try {if_full}")
        return 2
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return guarded(
        "generate.py",
        lambda: run(args),
        "a higher --ratio (up to 0.75), a smaller --size, --dtype fp16 on a GPU, or for large pictures "
        "examples/generate_4k.py",
    )


if __name__ == "__main__":
    sys.exit(main())
