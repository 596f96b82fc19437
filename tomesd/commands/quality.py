"""What error each way to merge costs on trained weights, and what time it saves: pictures against plain ones.

    tomesd quality --quick                          the model that comes with tomesd, a few pictures
    tomesd quality --csv quality.csv --plot quality.png
    tomesd quality --recipes recipe.json            what `tomesd tune` has written, beside all ways
    tomesd quality --model OWNER/MODEL --prompts-file prompts.txt --dtype float16 --batch 2

Any pipeline with a UNet will do: Stable Diffusion 1, 2 and XL. Each prompt is drawn plain, and from the same
noise in each way at each ratio; those with the same ratio leave as many products of queries and keys. What
users forget to compare with is fewer-steps: plain, with that many steps. Columns, means over all pictures:

    seconds         of the UNet for one picture: all points take turns at a call that was recorded; the median
                    of a call / pictures x calls. Of fewer-steps it is computed from plain's
    speed           plain's seconds / its seconds
    peak_mib        memory that this call, of a whole batch, adds at most to what was in use before it
    step_error      distance of the UNet's output from plain's, relative to plain's norm, on the inputs of the
                    plain run, over all steps of the first batch: what merging itself does
    guided_error    the same after guidance, which is what the sampler gets
    psnr_db, ssim   of pictures against plain ones; equal ones have 120 dB
    lpips           perceptual distance, if torchmetrics and the weights of AlexNet are there
    shape_top1, 5   share of pictures whose own reference is the nearest, among the 5 nearest, by colours on
                    16 x 16 squares, if the folder of the model has references: names.png, and names.txt for
                    them

What was drawn and measured is kept, so a run that was stopped goes on where it was. A point that fails has a
note that says why, and the others go on.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import inspect
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..methods.choice import DOWNSAMPLES
from ..methods.recipe import Recipe
from ..patch import apply_patch
from . import common, metrics, options, plot
from .common import DTYPES, Row, UserError, guarded, need, positive, ratio, say
from .drawing import FEWER, Drawings, Point
from .metrics import METRICS, Measure, Metric, Missing, Pictures, Task
from .pipelines import (
    EMOJI,
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
from .ways import WAYS, Way, Ways

PROGRAM = "tomesd quality"
PACKAGE = Path(__file__).resolve().parents[1]
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5)
FULL: Row = {"prompts": 12, "steps": 20, "ratios": [0.25, 0.5, 0.75], "rounds": 5}
QUICK: Row = {"prompts": 4, "steps": 5, "ways": ["windowed", "keys", FEWER], "ratios": [0.5], "rounds": 2}
# Not drawn unless asked for: hardly other than all-levels, and for SDXL.
RARE = ("auto", "stage-4")
FORMATS = {
    **{"seconds": "#.3g", "speed": ".2f", "peak_mib": ".0f", "step_error": ".4f", "guided_error": ".4f"}
}
AXES = {"step_error": "error of a step", "guided_error": "error of a step after guidance"}
# What is written into the folder of what is kept by default.
FILES = {"csv": "quality.csv", "plot": "quality.png", "sheet": "sheet.png"}
# Rows of the sheet.
SHOWN = 6


@dataclass(frozen=True)
class Comparison:
    """Which ways are compared, and by what."""

    ways: Ways
    metrics: tuple[Metric, ...]

    @property
    def names(self) -> list[str]:
        """What can be drawn beside plain; ideals give no picture."""
        return [*(way for way in self.ways if way != "plain" and not way.startswith("ideal")), FEWER]

    @property
    def formats(self) -> dict[str, str]:
        """All figures, and how they are written."""
        return {**FORMATS, **{k: form for metric in self.metrics for k, form in metric.columns.items()}}

    @property
    def axes(self) -> dict[str, str]:
        """What can be plotted, and what it is called there."""
        return {**AXES, **{k: label for metric in self.metrics for k, label in metric.axes.items()}}


COMPARISON = Comparison(WAYS, METRICS)


def make_parser(program: str, compared: Comparison) -> argparse.ArgumentParser:
    parser = common.Parser(program, __doc__)
    parser.add_argument(
        "--model", type=find_model, default=EMOJI, help="folder or hub id of a pipeline (emoji)"
    )
    parser.add_argument("--prompts", type=positive, help="how many, spread over the model's names (12)")
    parser.add_argument("--prompts-file", type=Path, metavar="FILE", help="prompts, one a line, instead")
    parser.add_argument("--seeds", type=positive, default=1, help="pictures of each prompt (1)")
    parser.add_argument("--batch", type=positive, default=12, help="pictures that are drawn at once (12)")
    parser.add_argument("--size", type=positive, help="side in pixels (the model's own)")
    parser.add_argument("--steps", type=positive, help="of the sampler (20)")
    parser.add_argument("--guidance", type=common.guidance, default=3.0, help="(3.0)")
    parser.add_argument("--ratios", type=ratio, nargs="+", metavar="RATIO", help="(0.25 0.5 0.75)")
    parser.add_argument(
        "--max-downsample",
        type=int,
        choices=DOWNSAMPLES,
        help="levels to work at (the finest with attention)",
    )
    parser.add_argument("--ways", nargs="+", choices=compared.names, metavar="WAY", help="these, and plain")
    recipes = "and what `tomesd tune` has written, each named as its file"
    parser.add_argument("--recipes", type=Path, nargs="+", default=[], metavar="FILE", help=recipes)
    parser.add_argument("--rounds", type=positive, help="timed calls of each point (5)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(float32)")
    parser.add_argument("--device", default="auto", help="(the best there is)")
    parser.add_argument("--threads", type=common.threads, help="CPU threads of torch")
    parser.add_argument("--csv", type=common.new_file, metavar="FILE", help="write all figures there")
    parser.add_argument("--json", action="store_true", help="print them as JSON instead of a table")
    parser.add_argument(
        "--plot", type=plot.new_picture, metavar="FILE", help="error over time, a curve for each way"
    )
    parser.add_argument(
        "--plot-metric", choices=compared.axes, default="psnr_db", help="what of it (psnr_db)"
    )
    parser.add_argument(
        "--sheet", type=plot.new_picture, metavar="FILE", help="pictures, a column for each way"
    )
    cache = common.CACHE / "quality"
    parser.add_argument("--cache", type=Path, default=cache, metavar="FOLDER", help=f"({cache})")
    parser.add_argument("--fresh", action="store_true", help="draw and measure again what is kept there")
    parser.add_argument("--quick", action="store_true", help="4 prompts, 5 steps, 3 ways at 0.5, by default")
    parser.add_argument("--list", action="store_true", help="list the ways and stop")
    return parser


def check(args: argparse.Namespace, compared: Comparison) -> None:
    """Fills in what was not given; a UserError says what cannot be done."""
    drawn = [way for way in compared.names if way not in RARE]
    for option, value in ({"ways": drawn} | (QUICK if args.quick else FULL)).items():
        if getattr(args, option) is None and not (option == "prompts" and args.prompts_file):
            setattr(args, option, value)
    args.ways = [*args.ways, *(file.stem for file in args.recipes)]
    common.make_folder(args.cache, "--cache")
    check_model(args.model)
    args.device = str(pick_device(args.device))
    needs = {"tqdm": "tqdm", "skimage": "scikit-image", "matplotlib": "matplotlib", "PIL": "pillow"}
    absent = [package for module, package in needs.items() if importlib.util.find_spec(module) is None]
    if absent:
        raise UserError(f"this needs {', '.join(absent)}: pip install 'tomesd[bench]'")


def with_recipes(compared: Comparison, files: Sequence[Path]) -> Comparison:
    """The same ways, and each of these files of recipes, whose name is that of a way.

    Raises:
        UserError: a file cannot be read, holds no recipe, or is named as another way.
    """
    ways = dict(compared.ways)
    for file in files:
        recipe = options.read_recipe(file, "--recipes")
        if file.stem in (*ways, FEWER):
            raise UserError(f"argument --recipes: {file.stem} is the name of another way: rename {file}")

        def patch(network: Any, setting: Any, recipe: Recipe = recipe) -> None:
            apply_patch(SimpleNamespace(unet=network), recipe)

        ways[file.stem] = Way(f"the recipe in {file}", "red", patch, has_ratio=False)
    return Comparison(ways, compared.metrics)


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts to draw.

    Raises:
        UserError: there are none, or fewer than were asked for.
    """
    names = prompts_in(args.prompts_file) if args.prompts_file else metrics.own_prompts(args.model)
    wanted = args.prompts or len(names)
    metrics.check_enough(wanted, names)
    return names[:: len(names) // wanted][:wanted]


def load(args: argparse.Namespace) -> Any:
    """The pipeline, and in `args` the side of its pictures.

    Raises:
        UserError: it cannot be had, has no UNet to patch, or cannot draw that size.
    """
    device = torch.device(args.device)
    pipe = load_pipeline(args.model, device, pick_dtype(args.dtype, device))
    if not isinstance(getattr(pipe, "unet", None), need("diffusers").UNet2DConditionModel):
        raise UserError(f"argument --model: {args.model} is a {type(pipe).__name__}, which has no UNet")
    prepare(pipe)
    if args.size is None:
        latent = pipe.unet.config.sample_size
        if not isinstance(latent, int):
            raise UserError(f"argument --size: needed, as the model's own is {latent}")
        args.size = latent * pipe.vae_scale_factor
    check_pipeline_size(pipe, (args.size, args.size))
    return pipe


def make_measures(
    task: Task, compared: Comparison, args: argparse.Namespace
) -> tuple[list[Measure], dict[str, str]]:
    """What computes the metrics, and why columns are left out; a UserError if the plot needs one of these."""
    missing: dict[str, str] = {}
    measures = []
    for metric in compared.metrics:
        try:
            measures.append(metric.make(task))
        except Missing as why:
            missing |= dict.fromkeys(metric.columns, str(why))
    if args.guidance <= 1:
        missing["guided_error"] = f"there is none with --guidance {args.guidance:g}"
    if args.plot_metric in missing:
        raise UserError(f"argument --plot-metric: {missing[args.plot_metric]}")
    return measures, missing


def points(args: argparse.Namespace, compared: Comparison) -> Iterator[Point]:
    """Plain, then each way at each of its ratios or numbers of steps."""
    yield Point("plain", None, args.steps)
    for way in compared.names:
        if way not in args.ways:
            continue
        if way == FEWER:
            fewer = dict.fromkeys(round(share * args.steps) for share in SHARES)
            yield from (Point(way, None, steps) for steps in fewer if 0 < steps < args.steps)
        else:
            ratios = dict.fromkeys(args.ratios) if compared.ways[way].has_ratio else [None]
            yield from (Point(way, merged, args.steps) for merged in ratios)


def open_folder(args: argparse.Namespace, prompts: list[str], ways: Ways) -> Path:
    """The folder of what was drawn with the same model, settings and sources; of new ones a new one."""
    folder = Path(args.model)
    sources = {*PACKAGE.rglob("*.py"), *(Path(inspect.getfile(way.patch)) for way in ways.values())}
    about: Row = {
        "model": str(folder.resolve()) if folder.is_dir() else args.model,
        "weights": weights_of(folder),
        # Not seeds: the batches of more of them come after those of fewer.
        **{
            name: getattr(args, name)
            for name in ("batch", "size", "steps", "guidance", "dtype", "max_downsample")
        },
        "prompts": prompts,
        **{f"recipe {file.stem}": file.read_text(encoding="utf-8") for file in args.recipes},
        "device": torch.device(args.device).type,
        "torch": torch.__version__,
        "diffusers": need("diffusers").__version__,
        "sources": hashlib.sha256(b"".join(file.read_bytes() for file in sorted(sources))).hexdigest(),
    }
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
    folder = Path(args.cache) / f"{folder.name}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    with common.whole(folder / "about.json") as part:
        part.write_text(json.dumps(about, indent=1))
    if args.fresh:
        for file in [*folder.glob("*.npz"), folder / "times.json"]:
            file.unlink(missing_ok=True)
    return folder


def draw_and_measure(
    drawings: Drawings, wanted: list[Point], measures: list[Measure], columns: Iterable[str]
) -> tuple[list[Row], dict[Point, Pictures]]:
    """A row for each point, and the pictures of those that did not fail."""
    progress = need("tqdm").tqdm
    times = drawings.times(wanted, progress)
    pictures: dict[Point, Pictures] = {}
    rows: list[Row] = []
    with progress(total=len(wanted) * len(drawings.batches), desc="pictures", unit="batch") as bar:
        for point in wanted:
            bar.set_postfix_str(point.name)
            row: Row = {"point": point.name, "way": point.way, "ratio": point.ratio, "steps": point.steps}
            row |= {**dict.fromkeys(columns), **times[point.name]}
            rows.append(row)
            drawn = row["note"] or drawings.all_of(point, bar)
            if isinstance(drawn, str):
                row["note"] = drawn
                if point.way == "plain":
                    raise UserError(f"plain cannot be drawn: {drawn}")
                continue
            pictures[point], errors = drawn
            row |= {"speed": rows[0]["seconds"] / row["seconds"], **errors}
            for measure in measures:
                row |= measure(pictures[point], None if point == wanted[0] else pictures[wanted[0]])
    return rows, pictures


def columns(pictures: dict[Point, Pictures], rows: int) -> list[tuple[str, Pictures]]:
    """For the sheet: of each way the point whose ratio is nearest to 0.5, or which has the fewest steps."""
    ways: dict[str, list[Point]] = {}
    for point in pictures:
        ways.setdefault(point.way, []).append(point)

    def far(point: Point) -> tuple[float, int]:
        return abs((point.ratio or 0) - 0.5), point.steps

    shown = [min(here, key=far) for here in ways.values()]
    return [(point.name, pictures[point][:rows]) for point in shown]


def plots(
    rows: list[Row], pictures: dict[Point, Pictures], prompts: list[str], compared: Comparison, args: Any
) -> dict[str, Any]:
    """The figures of matplotlib that go to --plot and --sheet."""
    marks = [
        {**row, "mark": row["steps"] if row["way"] == FEWER else row["ratio"] or row["way"]} for row in rows
    ]
    title = heading(args, len(prompts))
    return {
        "plot": plot.curves(marks, args.plot_metric, compared.axes[args.plot_metric], title, compared.ways),
        "sheet": plot.sheet(columns(pictures, len(prompts[:SHOWN])), prompts[:SHOWN]),
    }


def heading(args: argparse.Namespace, prompts: int) -> str:
    return (
        f"{Path(args.model).name}, {prompts} prompts x {args.seeds} seed{'s' * (args.seeds > 1)}, "
        f"{args.size} pixels, {args.steps} steps, guidance {args.guidance:g}, {args.dtype}, "
        f"{common.device_name(args.device)}"
    )


def run(args: argparse.Namespace, compared: Comparison) -> int:
    """The exit code: 1 if no way but plain could be drawn."""
    if args.list:
        fewer = {FEWER: "plain, with fewer steps"}
        common.list_lines({way: fewer.get(way) or compared.ways[way].explains for way in compared.names})
        return 0
    compared = with_recipes(compared, args.recipes)
    check(args, compared)
    prompts = read_prompts(args)
    pipe = load(args)
    task = Task(args.device, args.cache, Path(args.model), prompts * args.seeds)
    measures, missing = make_measures(task, compared, args)
    if args.threads:
        torch.set_num_threads(args.threads)
    folder = open_folder(args, prompts, compared.ways)
    drawings = Drawings(pipe, prompts, folder, args, compared.ways)
    wanted = list(points(args, compared))
    rows, pictures = draw_and_measure(drawings, wanted, measures, compared.formats)

    if not args.json:
        print(common.figures_table("point", list(compared.formats), rows, compared.formats))
        for why in dict.fromkeys(missing.values()):
            print(f"{', '.join(name for name, its in missing.items() if its == why)} left out: {why}")
        print(heading(args, len(prompts)))
    outputs = {name: getattr(args, name) or folder / file for name, file in FILES.items()}
    settings = ("model", "seeds", "batch", "size", "guidance", "dtype", "max_downsample")
    what = {name: getattr(args, name) for name in settings} | {"prompts": len(prompts)}
    where = common.environment(args.device, "diffusers")
    full = [{**row, **what, **where} for row in rows]
    common.write_csv(full, outputs["csv"])
    if args.json:
        print(json.dumps(full))
    for name, figure in plots(rows, pictures, prompts, compared, args).items():
        plot.save(figure, outputs[name], f"--{name}")
    for name, path in outputs.items():
        (say if args.json else print)(f"{name:6}{path}")
    return 0 if len(pictures) > 1 else 1


def main(
    arguments: Sequence[str] | None = None, program: str = PROGRAM, compared: Comparison = COMPARISON
) -> int:
    return guarded(program, lambda: run(make_parser(program, compared).parse_args(arguments), compared))
