"""What error each way to merge costs on trained weights, and what time it saves: pictures against plain ones.

    python -m tomesd quality --quick                          the model of the checkout, a few pictures
    python -m tomesd quality --csv quality.csv --plot quality.png
    python -m tomesd quality --model OWNER/MODEL --prompts-file prompts.txt --dtype float16 --batch 2

Any pipeline with a UNet will do: Stable Diffusion 1, 2 and XL. Each prompt is drawn plain, and from the same
noise in each way at each ratio; those with the same ratio leave as many products of queries and keys. What
users forget to compare with is fewer-steps: plain, with that many steps. Columns, means over all pictures:

    seconds         of the UNet for one picture: all points take turns at a call that was recorded; the median
                    of a call / pictures x calls. Of fewer-steps it is reckoned from plain's
    speed           plain's seconds / its seconds
    peak_mib        memory that this call, of a whole batch, adds at most to what stood before it
    step_error      distance of the UNet's output from plain's, relative to plain's norm, on the inputs of the
                    plain run, over all steps of the first batch: what merging itself does
    guided_error    the same after guidance, which is what the sampler gets
    psnr_db, ssim   of pictures against plain ones; equal ones have 120 dB
    lpips           perceptual distance, if torchmetrics and the weights of AlexNet are there
    dinov2_cosine   of class tokens of DINOv2 ViT-S/14: same thing, or another?
    fd_dinov2       Frechet distance of these tokens, all pictures of a point against all plain ones (Stein et
                    al., 2023). Of fewer than thousands of pictures it ranks the points and no more
    name_top1, 5    share of pictures whose own reference is the nearest, among the 5 nearest, by these
                    tokens, if the folder of the model has references: names.png, and names.txt for them
    shape_top1, 5   the same by colours on 16 x 16 squares

What was drawn and measured is kept, so a run that was stopped goes on where it was. A point that fails has a
note that says why, and the others go on.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.util
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import DOWNSAMPLES
from ..families import find_networks, find_sites
from . import memory, metrics, peers
from .metrics import Floats, Measures, Pictures
from .models import Setting, import_diffusers
from .plot import curves, sheet
from .speed import DTYPES, Row, Run, aligned, device_name, environment, positive, ratio, reason, write
from .ways import WAYS, at

MODEL = peers.ROOT / "examples" / "emoji-model"
FOLDER = peers.FOLDER.parent / "quality"
FEWER = "fewer-steps"
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5)
# Ideals give no picture. Of the others these have no ratio.
POSSIBLE = [*(way for way in at("unet") if way != "plain" and not way.startswith("ideal")), FEWER]
NO_RATIO = ("todo", "hypertile")
FULL: Row = {
    "prompts": 12,
    "steps": 20,
    "ways": [way for way in POSSIBLE if way not in ("auto", "stage-4")],
    "ratios": [0.25, 0.5, 0.75],
    "rounds": 5,
}
QUICK: Row = {"prompts": 4, "steps": 5, "ways": ["windowed", "keys", FEWER], "ratios": [0.5], "rounds": 2}
FORMATS = {
    **{"seconds": "#.3g", "speed": ".2f", "peak_mib": ".0f", "step_error": ".4f", "guided_error": ".4f"},
    **{"psnr_db": ".2f", "ssim": ".4f", "lpips": ".4f", "dinov2_cosine": ".4f", "fd_dinov2": ".1f"},
    **{"name_top1": ".3f", "name_top5": ".3f", "shape_top1": ".3f", "shape_top5": ".3f"},
}
AXES = {
    **{"psnr_db": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS", "fd_dinov2": "FD-DINOv2"},
    **{"dinov2_cosine": "1 - cosine of DINOv2", "step_error": "error of a step"},
    "guided_error": "error of a step after guidance",
}
# What is written into the folder of what is kept unless told where.
FILES = {"csv": "quality.csv", "plot": "quality.png", "sheet": "sheet.png"}
# Rows of the sheet.
SHOWN = 6

# What the UNet was called with, by position and by name, and what it gave.
Call = tuple[tuple[Any, ...], dict[str, Any], Tensor]


@dataclass(frozen=True)
class Point:
    """A way of drawing: its `WAYS` name or `FEWER`, its ratio if it has one, and how many steps."""

    way: str
    ratio: float | None
    steps: int

    @property
    def name(self) -> str:
        if self.way == FEWER:
            return f"{self.way} {self.steps}"
        return self.way if self.ratio is None else f"{self.way} {self.ratio:g}"


@dataclass(frozen=True)
class Batch:
    """What is drawn at once; `first` is the index of its first prompt."""

    index: int
    seed: int
    first: int
    prompts: list[str]


@dataclass(frozen=True)
class Drawn:
    """Pictures of a batch, and the errors of each call and picture, none if they were not computed."""

    pictures: Pictures
    step_error: Floats
    guided_error: Floats


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="folder or hub id of a pipeline (examples/emoji-model of a checkout)")
    parser.add_argument("--prompts", type=positive, help="how many, spread over the model's names (12)")
    parser.add_argument("--prompts-file", type=Path, metavar="FILE", help="prompts, one a line, instead")
    parser.add_argument("--seeds", type=positive, default=1, help="pictures of each prompt (1)")
    parser.add_argument("--batch", type=positive, default=12, help="pictures that are drawn at once (12)")
    parser.add_argument("--size", type=positive, help="side in pixels (the model's own)")
    parser.add_argument("--steps", type=positive, help="of the sampler (20)")
    parser.add_argument("--guidance", type=float, default=3.0, help="(3.0)")
    parser.add_argument("--ratios", type=ratio, nargs="+", metavar="RATIO", help="(0.25 0.5 0.75)")
    parser.add_argument(
        "--max-downsample",
        type=int,
        choices=DOWNSAMPLES,
        help="levels to work at (the finest with attention)",
    )
    parser.add_argument("--ways", nargs="+", choices=POSSIBLE, metavar="WAY", help="these, and plain")
    parser.add_argument("--rounds", type=positive, help="timed calls of each point (5)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(float32)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=positive, help="CPU threads of torch")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="error over time, a curve for each way")
    parser.add_argument("--plot-metric", choices=AXES, default="psnr_db", help="what of it (psnr_db)")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="pictures, a column for each way")
    parser.add_argument("--cache", type=Path, default=FOLDER, metavar="FOLDER", help=f"({FOLDER})")
    parser.add_argument("--fresh", action="store_true", help="draw and measure again what is kept there")
    parser.add_argument("--quick", action="store_true", help="4 prompts, 5 steps, 3 ways at 0.5, unless told")
    parser.add_argument("--list", action="store_true", help="list the ways and stop")


def points(args: argparse.Namespace) -> Iterator[Point]:
    """Plain, then each way at each of its ratios or numbers of steps."""
    yield Point("plain", None, args.steps)
    for way in POSSIBLE:
        if way not in args.ways:
            continue
        if way == FEWER:
            fewer = dict.fromkeys(round(share * args.steps) for share in SHARES)
            yield from (Point(way, None, steps) for steps in fewer if 0 < steps < args.steps)
        else:
            ratios = [None] if way in NO_RATIO else dict.fromkeys(args.ratios)
            yield from (Point(way, merged, args.steps) for merged in ratios)


class Bench:
    """A pipeline, what it is to draw, and the folder that keeps what it has drawn."""

    def __init__(self, pipe: Any, prompts: list[str], folder: Path, args: argparse.Namespace) -> None:
        self.pipe, self.args, self.folder = pipe, args, folder
        self.unet: nn.Module = pipe.unet
        ((_, unet, family),) = find_networks(self.unet)
        self.downsample = min((site.downsample for site in find_sites(unet, family)), default=1)
        starts = [(seed, i) for seed in range(args.seeds) for i in range(0, len(prompts), args.batch)]
        self.batches = [
            Batch(index, seed, i, prompts[i : i + args.batch]) for index, (seed, i) in enumerate(starts)
        ]
        self.recorded: tuple[Pictures, list[Call]] | None = None

    def patched(self, point: Point) -> Run:
        """A copy of the UNet of its own; it fails later, with a note, if it cannot be patched."""
        args = self.args
        setting = Setting(
            *("unet", type(self.pipe).__name__, args.dtype, args.size, args.size, point.ratio or 0.0),
            *(2 * len(self.batches[0].prompts), args.device, self.pipe.vae_scale_factor, self.downsample),
            args.max_downsample or 0,
        )
        torch.manual_seed(0)  # tomesd 0.1.3 takes its randomness from there
        return Run("plain" if point.way == FEWER else point.way, self.unet, setting, compiled=False)

    def draw(self, network: Any, batch: Batch, steps: int) -> Pictures:
        """A batch through a network in place of the UNet; each prompt starts from noise of its own."""
        numbers = range(batch.first, batch.first + len(batch.prompts))
        generators = [torch.Generator().manual_seed(100_000 * batch.seed + i) for i in numbers]
        self.pipe.unet = network
        try:
            images = self.pipe(
                batch.prompts,
                height=self.args.size,
                width=self.args.size,
                num_inference_steps=steps,
                guidance_scale=self.args.guidance,
                generator=generators,
                output_type="np",
            ).images
        finally:
            self.pipe.unet = self.unet
        if not np.isfinite(images).all():
            raise ValueError(f"pictures are not finite in {self.args.dtype}")
        pictures: Pictures = (np.clip(images, 0, 1) * 255).round().astype(np.uint8)
        return pictures

    def record(self) -> tuple[Pictures, list[Call]]:
        """The plain pictures of the first batch, and every call of the UNet for them; drawn once."""
        if self.recorded is None:
            calls: list[Call] = []

            def keep(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                calls.append((args, kwargs, output[0]))

            handle = self.unet.register_forward_hook(keep, with_kwargs=True)
            try:
                self.recorded = self.draw(self.unet, self.batches[0], self.args.steps), calls
            except Exception as error:  # whatever it is, there is nothing to compare with
                raise SystemExit(f"plain cannot be drawn: {reason(error)}") from error
            finally:
                handle.remove()
        return self.recorded

    def drawn(self, point: Point, batch: Batch) -> Drawn | str:
        """A batch as it is kept, or made and kept now; else a note that says why not."""
        file = self.folder / f"{point.name}-{batch.index}.npz"
        if not file.exists():
            run = self.patched(point)
            made = run.attempt(lambda: self.make(run.call, point, batch))
            if made is None:
                return run.note
            part = file.with_suffix(".partial.npz")
            np.savez_compressed(part, **vars(made))
            part.rename(file)
        with np.load(file) as arrays:
            return Drawn(**arrays)

    def make(self, network: Any, point: Point, batch: Batch) -> Drawn:
        nothing = np.empty(0)
        if batch.index > 0 or point.way == FEWER:
            return Drawn(self.draw(network, batch, point.steps), nothing, nothing)
        pictures, calls = self.record()
        if point.way == "plain":
            return Drawn(pictures, nothing, nothing)
        off = errors(network, calls, len(batch.prompts), self.args.guidance)
        return Drawn(self.draw(network, batch, point.steps), *off)

    @torch.no_grad()
    def measure(self, wanted: list[Point], progress: Any) -> dict[str, Row]:
        """Seconds of a picture, memory and note of each point, by its name: as they are kept, or anew."""
        timed = [point for point in wanted if point.way != FEWER]
        file = self.folder / "times.json"
        where: Row = {"device": device_name(self.args.device), "threads": torch.get_num_threads()}
        where["rounds"] = self.args.rounds
        kept: Any = json.loads(file.read_text()) if file.exists() else {}
        # Points that were not measured in turns cannot be compared. What failed may do better now, unless it
        # cannot be done at all.
        known = kept.get("points", {}).items()
        final = {name for name, row in known if not row["note"] or row["note"].startswith("ValueError")}
        if kept.get("where") != where or not {point.name for point in timed} <= final:
            pictures, calls = self.record()
            args, kwargs, _ = calls[len(calls) // 2]
            runs = {point.name: self.patched(point) for point in timed}
            wait = getattr(torch, torch.device(self.args.device).type).synchronize
            with progress(total=len(runs) * (self.args.rounds + 2), desc="times", unit="call") as bar:
                for turn in range(self.args.rounds + 1):
                    for run in runs.values():
                        run.attempt(partial(run.time, (args, kwargs), wait))
                        if turn == 0:
                            run.seconds.clear()  # warms up
                        bar.update()
                gc.collect()  # what waits to be collected would be missing from what calls add
                for run in runs.values():
                    call = partial(run.call, *args, **kwargs)
                    run.peak = run.attempt(partial(memory.peak, call, self.args.device))
                    bar.update()
            figures = {
                name: {"note": run.note}
                if run.note
                else {
                    "seconds": statistics.median(run.seconds) * len(calls) / len(pictures),
                    "peak_mib": run.peak,
                    "note": "",
                }
                for name, run in runs.items()
            }
            kept = {"where": where, "points": figures}
            file.write_text(json.dumps(kept, indent=1))
        times: dict[str, Row] = dict(kept["points"])
        plain = times["plain"]
        for point in wanted:
            if point.way == FEWER and not plain["note"]:
                times[point.name] = {**plain, "seconds": plain["seconds"] * point.steps / self.args.steps}
        return times


@torch.no_grad()
def errors(network: Any, calls: list[Call], pictures: int, guidance: float) -> tuple[Floats, Floats]:
    """Relative errors of a network's outputs, as they are and after guidance, of every call and picture.

    Outputs hold the half without text first, as pipelines of Stable Diffusion have it; without guidance there
    is no such half, and no error after it.
    """

    def relative(got: Tensor, wanted: Tensor) -> Floats:
        distance = (got - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
        return np.asarray(distance.cpu(), np.float64)

    def guide(output: Tensor) -> Tensor:
        without, with_text = output.chunk(2)
        return without + guidance * (with_text - without)

    raw, guided = [], []
    for args, kwargs, output in calls:
        got, wanted = network(*args, **kwargs)[0].float(), output.float()
        raw.append(relative(got, wanted))
        if len(wanted) == 2 * pictures:
            guided.append(relative(guide(got), guide(wanted)))
    return np.concatenate(raw), np.concatenate(guided) if guided else np.empty(0)


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts to draw.

    Raises:
        ValueError: there are none, or fewer than were asked for.
    """
    if args.prompts_file:
        try:
            lines = args.prompts_file.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ValueError(f"argument --prompts-file: {error}") from error
        names = [line.strip() for line in lines if line.strip()]
        if not names:
            raise ValueError(f"argument --prompts-file: {args.prompts_file} is empty")
    elif (Path(args.model) / "names.txt").is_file():
        names = [names[0] for names in metrics.read_names(Path(args.model))]
    else:
        raise ValueError(f"{args.model} has no names.txt to take prompts from: give a --prompts-file")
    wanted = args.prompts or (len(names) if args.prompts_file else FULL["prompts"])
    if wanted > len(names):
        raise ValueError(f"argument --prompts: {wanted}, where there are {len(names)} to take from")
    return names[:: len(names) // wanted][:wanted]


def load(args: argparse.Namespace) -> Any:
    """The pipeline.

    Raises:
        ValueError: it cannot be had, or it has no UNet to patch.
    """
    import_diffusers()
    diffusers = importlib.import_module("diffusers")
    # diffusers 0.42 calls torch_dtype old
    keyword = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 42) else "torch_dtype"
    dtype = {keyword: getattr(torch, args.dtype)}
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(args.model, **dtype)
    except (OSError, ValueError) as error:
        raise ValueError(f"argument --model: {args.model}: {reason(error)}") from error
    if not isinstance(getattr(pipe, "unet", None), diffusers.UNet2DConditionModel):
        raise ValueError(f"argument --model: {args.model} is a {type(pipe).__name__}, which has no UNet")
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None  # it would blacken pictures that are to be compared
    pipe.to(args.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def size_of(pipe: Any, size: int | None) -> int:
    """The side of its pictures in pixels: `size`, or the pipeline's own.

    Raises:
        ValueError: the pipeline cannot draw that size, or does not say its own.
    """
    if size is None:
        latent = pipe.unet.config.sample_size
        if not isinstance(latent, int):
            raise ValueError(f"argument --size: needed, as the model's own is {latent}")
        size = latent * pipe.vae_scale_factor
    multiple = max(8, pipe.vae_scale_factor)  # pipelines of diffusers ask for 8, whatever the VAE
    if size % multiple:
        raise ValueError(f"argument --size: {size} must be a multiple of {multiple}")
    return size


def key(args: argparse.Namespace, prompts: list[str]) -> Row:
    """All that pictures depend on."""
    model = Path(args.model)
    weights = sorted(file for file in model.rglob("*") if file.suffix in (".safetensors", ".bin", ".json"))
    here = Path(__file__)
    sources = [*sorted(here.parents[1].glob("*.py")), here, *map(here.with_name, ("ways.py", "models.py"))]
    return {
        "model": str(model.resolve()) if model.is_dir() else args.model,
        "weights": [
            [str(file.relative_to(model)), file.stat().st_size, file.stat().st_mtime_ns] for file in weights
        ],
        # Not seeds: the batches of more of them come after those of fewer.
        **{
            name: getattr(args, name)
            for name in ("batch", "size", "steps", "guidance", "dtype", "max_downsample")
        },
        "prompts": prompts,
        "device": torch.device(args.device).type,
        **{name: value for name, value in environment(args.device).items() if name in ("torch", "diffusers")},
        "sources": hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest(),
    }


def columns(pictures: dict[Point, Pictures], rows: int) -> dict[str, Pictures]:
    """For the sheet: of each way the point whose ratio is nearest to 0.5, or which has the fewest steps."""
    ways: dict[str, list[Point]] = {}
    for point in pictures:
        ways.setdefault(point.way, []).append(point)

    def far(point: Point) -> tuple[float, int]:
        return abs((point.ratio or 0) - 0.5), point.steps

    shown = [min(here, key=far) for here in ways.values()]
    return {point.name: pictures[point][:rows] for point in shown}


def check(args: argparse.Namespace) -> None:
    """Fills in what was not given.

    Raises:
        ValueError: what cannot be done.
    """
    for option, value in (QUICK if args.quick else FULL).items():
        if getattr(args, option) is None and not (option == "prompts" and args.prompts_file):
            setattr(args, option, value)
    for option in ("csv", "plot", "sheet"):
        path = getattr(args, option)
        if path and not path.parent.is_dir():  # not only after hours
            raise ValueError(f"argument --{option}: there is no folder {path.parent}")
    if args.model is None:
        if not MODEL.is_dir():
            raise ValueError("argument --model: this is not a checkout with a model, so give one")
        args.model = str(MODEL)
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"argument --device: {reason(error)}") from error


def run(args: argparse.Namespace) -> int:
    """Runs the command; its exit code is 1 if no way but plain could be drawn."""
    parser: argparse.ArgumentParser = args.command
    if args.list:
        for way in POSSIBLE:
            print(f"{way:16}  {'plain, with fewer steps' if way == FEWER else WAYS[way].explains}")
        return 0
    needs = {"tqdm": "tqdm", "skimage": "scikit-image", "matplotlib": "matplotlib", "PIL": "pillow"}
    absent = [package for module, package in needs.items() if importlib.util.find_spec(module) is None]
    if absent:
        sys.exit(f"the quality bench needs {', '.join(absent)}: pip install 'tomesd[bench]'")
    from tqdm import tqdm  # type: ignore[import-untyped]

    try:
        check(args)
        prompts = read_prompts(args)
        pipe = load(args)
        args.size = size_of(pipe, args.size)
        measures = Measures(args.device, args.cache / "dinov2", Path(args.model), prompts * args.seeds)
        if args.guidance <= 1:
            measures.missing["guided_error"] = f"there is none with --guidance {args.guidance:g}"
        if args.plot_metric in measures.missing:
            raise ValueError(f"argument --plot-metric: {measures.missing[args.plot_metric]}")
    except ValueError as error:
        parser.error(str(error))
    if args.threads:
        torch.set_num_threads(args.threads)
    about = key(args, prompts)
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
    folder: Path = args.cache / f"{Path(args.model).name}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "about.json").write_text(json.dumps(about, indent=1))
    if args.fresh:
        for file in [*folder.glob("*.npz"), folder / "times.json"]:
            file.unlink(missing_ok=True)

    bench = Bench(pipe, prompts, folder, args)
    wanted = list(points(args))
    times = bench.measure(wanted, tqdm)
    pictures: dict[Point, Pictures] = {}
    rows: list[Row] = []
    with tqdm(total=len(wanted) * len(bench.batches), desc="pictures", unit="batch") as bar:
        for point in wanted:
            bar.set_postfix_str(point.name)
            row = {"point": point.name, "way": point.way, "ratio": point.ratio, "steps": point.steps}
            row |= dict.fromkeys(FORMATS) | times[point.name]
            done: list[Drawn] = []
            for batch in bench.batches:
                drawn = None if row["note"] else bench.drawn(point, batch)
                if isinstance(drawn, Drawn):
                    done.append(drawn)
                elif drawn:
                    row["note"] = drawn
                bar.update()
            rows.append(row)
            if row["note"]:
                if point.way == "plain":
                    sys.exit(f"plain cannot be drawn: {row['note']}")
                continue
            row["speed"] = rows[0]["seconds"] / row["seconds"]
            pictures[point] = np.concatenate([drawn.pictures for drawn in done])
            for name in ("step_error", "guided_error"):
                values = getattr(done[0], name)
                row[name] = float(values.mean()) if values.size else None
            row |= measures(pictures[point], None if point == wanted[0] else pictures[wanted[0]])

    print(aligned("point", FORMATS, rows, FORMATS))
    for why in dict.fromkeys(measures.missing.values()):
        print(f"{', '.join(name for name, its in measures.missing.items() if its == why)} left out: {why}")
    where = environment(args.device)
    seeds = "1 seed" if args.seeds == 1 else f"{args.seeds} seeds"
    title = (
        f"{Path(args.model).name}, {len(prompts)} prompts x {seeds}, {args.size} pixels, "
        f"{args.steps} steps, guidance {args.guidance:g}, {args.dtype}, {where['device']}"
    )
    print(title)
    common = {"model": args.model, "prompts": len(prompts)}
    options = ("seeds", "batch", "size", "guidance", "dtype", "max_downsample")
    common |= {name: getattr(args, name) for name in options}
    outputs = {name: getattr(args, name) or folder / file for name, file in FILES.items()}
    write([{**row, **common, **where} for row in rows], outputs["csv"])
    try:
        curves(rows, args.plot_metric, AXES[args.plot_metric], title).savefig(outputs["plot"], dpi=150)
        sheet(columns(pictures, len(prompts[:SHOWN])), prompts[:SHOWN]).savefig(outputs["sheet"], dpi=150)
    except ValueError as error:  # no such format
        parser.error(str(error))
    for name, path in outputs.items():
        print(f"{name:6}{path}")
    return 0 if len(pictures) > 1 else 1
