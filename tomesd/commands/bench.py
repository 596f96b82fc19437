"""Measures how much of the saving that is possible each way to merge takes, and at what price.

    tomesd bench --quick                            a minute on two cores
    tomesd bench                                    one SD 1.5 full-resolution self-attention
    tomesd bench --level unet --model sdxl          a whole UNet, full size, random weights
    tomesd bench --level unet --sizes 3840x2176 --compile --csv bench.csv

All ways run in turns, in one process, with weights that they share. Figures of each:

    median_s .. min_s   seconds of a call, after one that warms up
    speed               plain's median / its median
    share               (plain - way) / (plain - ideal), of medians and of minima: how much of what could be
                        saved at best it does save. Each way has its own ideal, which does the same with
                        tokens cut by slicing; left out where that saves less than a twentieth. On a busy
                        machine trust the minima
    peak_mib            memory that a call adds at most to what was in use before it
    error               distance of its output from plain's, relative to plain's norm. With random weights
                        it separates wrong ways from right ones, but says nothing of pictures
    ops                 operations that torch dispatches in a call, views included; what costs at small
                        sizes on a GPU
    compile_s           seconds of the first call with --compile, beyond the median

A way that fails has a note that says why, and the others go on.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import common
from .common import DTYPES, Row, UserError, guarded, need, positive, ratio, reason
from .models import MODELS, Setting, build, inputs
from .pipelines import pick_device
from .runs import measure, patched, report
from .ways import WAYS, Ways, at

PROGRAM = "tomesd bench"
# Seconds depend on it; the sizes of all levels of all models divide by it.
MULTIPLE = 64
# What is measured by default, and with --quick.
FULL: Row = {"sizes": [(512, 512), (768, 768), (1024, 1024)], "dtypes": list(DTYPES), "rounds": 7}
QUICK: Row = {"sizes": [(512, 512)], "dtypes": ["float32", "bfloat16"], "rounds": 3}
FIGURES = (
    *("median_s", "p20_s", "p80_s", "min_s", "speed", "share_median", "share_min"),
    *("peak_mib", "error", "ops", "compile_s"),
)
FORMATS = {"speed": ".2f", "share_median": ".3f", "share_min": ".3f", "peak_mib": ".0f", "compile_s": ".1f"}


def make_parser(program: str, ways: Ways) -> argparse.ArgumentParser:
    parser = common.Parser(program, __doc__)
    models = "; ".join(f"{name}: {model.explains}" for name, model in MODELS.items())
    parser.add_argument("--level", choices=("block", "unet"), default="block", help="what to measure")
    parser.add_argument("--model", choices=MODELS, default="sd15", help=models)
    parser.add_argument(
        "--sizes",
        type=common.size,
        nargs="+",
        metavar="SIZE",
        help="pixels: a side, or WIDTHxHEIGHT; multiples of 64 (512 768 1024)",
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="(all of them)")
    parser.add_argument("--ratios", type=ratio, nargs="+", default=[0.5], metavar="RATIO", help="(0.5)")
    parser.add_argument("--batch", type=positive, default=2, help="pictures, or guidance halves (2)")
    parser.add_argument("--rounds", type=positive, help="timed calls of each way (7)")
    parser.add_argument("--ways", nargs="+", choices=ways, metavar="WAY", help="these, and plain (all)")
    parser.add_argument("--compile", action="store_true", help="through torch.compile, without graph breaks")
    parser.add_argument(
        "--channels-last", action="store_true", help="weights in this order, as convolutions like"
    )
    parser.add_argument("--threads", type=common.threads, help="CPU threads of torch")
    parser.add_argument("--device", default="auto", help="(the best there is)")
    parser.add_argument("--csv", type=common.new_file, help="write all figures there")
    parser.add_argument("--quick", action="store_true", help="512 pixels, two dtypes, 3 rounds, by default")
    parser.add_argument("--list", action="store_true", help="list the ways and stop")
    return parser


def check(args: argparse.Namespace, ways: Ways) -> None:
    """Fills in what was not given; a UserError says what cannot be done."""
    for option, value in (QUICK if args.quick else FULL).items():
        if getattr(args, option) is None:
            setattr(args, option, value)
    for size in args.sizes:
        common.check_multiple(size, MULTIPLE, "--sizes")
    if args.rounds < 2:
        raise UserError(f"argument --rounds: {args.rounds} must be at least 2")
    possible = at(args.level, ways)
    wrong = [name for name in args.ways or [] if name not in possible]
    if wrong:
        raise UserError(
            f"argument --ways: no --level {args.level} of {', '.join(wrong)}: only of {', '.join(possible)}"
        )
    args.ways = [name for name in possible if not args.ways or name in args.ways or name == "plain"]
    args.device = str(pick_device(args.device))


class Counter(TorchDispatchMode):
    """Counts the operations that are dispatched inside of it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: int = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.ops += 1
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def count(call: Callable[[], object]) -> int:
    """How many operations a call dispatches."""
    counter = Counter()
    with counter:
        call()
    return counter.ops


def measured(
    network: nn.Module, setting: Setting, args: argparse.Namespace, ways: Ways, bar: Any
) -> list[Row]:
    """A row for each way."""
    if args.compile:
        torch.compiler.reset()
        # Else torch takes modules that differ in hooks alone for the same.
        torch._dynamo.config.skip_nnmodule_hook_guards = False
    positional, keywords = called = inputs(setting)
    runs = [patched(name, ways, network, setting, args.compile) for name in args.ways]
    measure(runs, called, setting.device, args.rounds, bar)
    ideals = {name: ways[name].ideal for name in args.ways}
    figures = report({run.name: run.seconds for run in runs if not run.note}, ideals)
    rows = []
    for run in runs:
        row: Row = {"way": run.name, **dict.fromkeys(FIGURES)}
        if not args.compile:  # compiled code is dispatched as a whole
            row["ops"] = run.attempt(partial(count, partial(run.call, *positional, **keywords)))
        if not run.note:
            row |= {"peak_mib": run.peak, "error": run.error, **figures[run.name]}
            if args.compile and run.first is not None:
                row["compile_s"] = run.first - row["median_s"]
        rows.append({**row, "note": run.note})
    return rows


def table(rows: list[Row]) -> str:
    """One setting's rows, aligned."""
    first = rows[0]
    title = (
        f"{first['level']} of {first['model']}, {first['size']} ({first['tokens']} tokens), "
        f"{first['dtype']}, ratio {first['ratio']:g}, batch {first['batch']}, "
        f"{'compiled' if first['compiled'] else 'eager'}"
    )
    return f"{title}\n{common.figures_table('way', FIGURES, rows, FORMATS)}\n"


def run(args: argparse.Namespace, ways: Ways) -> int:
    """The exit code: 1 if no way could be measured."""
    if args.list:
        only = {False: " (whole UNets only)", True: ""}
        common.list_lines({name: way.explains + only[way.block] for name, way in ways.items()})
        return 0
    check(args, ways)
    need("diffusers")
    if args.threads:
        torch.set_num_threads(args.threads)
    where = common.environment(args.device, "diffusers")
    settings = [
        Setting(args.level, args.model, dtype, width, height, merged, args.batch, args.device)
        for dtype, (width, height), merged in itertools.product(args.dtypes, args.sizes, args.ratios)
    ]
    rows: list[Row] = []
    network: nn.Module | None = None
    with need("tqdm").tqdm(total=len(settings) * len(args.ways) * (args.rounds + 2), unit="run") as bar:
        for before, setting in zip([None, *settings], settings, strict=False):
            what = {
                **{"level": setting.level, "model": setting.model, "dtype": setting.dtype},
                **{"size": f"{setting.width}x{setting.height}", "tokens": setting.tokens},
                **{"ratio": setting.ratio, "batch": setting.batch, "compiled": args.compile},
                **({"channels_last": True} if args.channels_last else {}),
            }
            try:
                if before is None or before.dtype != setting.dtype or network is None:
                    bar.set_postfix_str(f"making {setting.model} in {setting.dtype}")
                    network = None  # before the next one is made
                    network = build(setting)
                    if args.channels_last:
                        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                new = measured(network, setting, args, ways, bar)
            except Exception as error:  # no way to begin, but other settings may do
                failed = {**dict.fromkeys(FIGURES), "note": reason(error)}
                new = [{"way": name, **failed} for name in args.ways]
            new = [{**what, **row, **where} for row in new]
            bar.write(table(new))
            rows += new
            if args.csv:  # each time, as a long run may be stopped
                common.write_csv(rows, args.csv)
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    return 0 if any(not row["note"] for row in rows) else 1


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM, ways: Ways = WAYS) -> int:
    return guarded(program, lambda: run(make_parser(program, ways).parse_args(arguments), ways))
