"""Measures how much of the saving that is possible each way to merge takes, and at what price.

    python -m tomesd bench --quick                            a minute on two cores
    python -m tomesd bench                                    one SD 1.5 full-resolution self-attention
    python -m tomesd bench --level unet --model sdxl          a whole UNet, full size, random weights
    python -m tomesd bench --level unet --sizes 3840x2176 --compile --csv bench.csv

All ways run in turns, in one process, with weights that they share. Figures of each:

    median_s .. min_s   seconds of a call, after one that warms up
    speed               plain's median / its median
    share               (plain - way) / (plain - ideal), of medians and of minima: how much of what could be
                        saved at best it does save. Each way has its own ideal, which does the same with
                        tokens cut by slicing; left out where that saves less than a twentieth. On a busy
                        machine trust the minima
    peak_mib            memory that a call adds at most to what stood before it
    error               distance of its output from plain's, relative to plain's norm. With random weights
                        it tells ways that are wrong from ways that are right, but nothing of pictures
    ops                 operations that torch dispatches in a call, views included; what costs at small
                        sizes on a GPU
    compile_s           seconds of the first call with --compile, beyond the median

A way that fails has a note that says why, and the others go on.
"""

from __future__ import annotations

import argparse
import csv
import gc
import itertools
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .. import __version__
from . import memory, peers
from .models import MODELS, Inputs, Setting, build, import_diffusers, inputs, view
from .ways import WAYS, at

Row = dict[str, Any]
Result = TypeVar("Result")

DTYPES = ("float32", "bfloat16", "float16")
# Seconds depend on it; the sizes of all levels of all models divide by it.
MULTIPLE = 64
# What is measured unless told, and with --quick.
FULL: Row = {"sizes": [(512, 512), (768, 768), (1024, 1024)], "dtypes": list(DTYPES), "rounds": 7}
QUICK: Row = {"sizes": [(512, 512)], "dtypes": ["float32", "bfloat16"], "rounds": 3}
# Below this share of plain's time, what an ideal saves is noise.
LEAST_SAVING = 0.05
FIGURES = (
    *("median_s", "p20_s", "p80_s", "min_s", "speed", "share_median", "share_min"),
    *("peak_mib", "error", "ops", "compile_s"),
)
FORMATS = {"speed": ".2f", "share_median": ".3f", "share_min": ".3f", "peak_mib": ".0f", "compile_s": ".1f"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models = "; ".join(f"{name}: {model.explains}" for name, model in MODELS.items())
    parser.add_argument("--level", choices=("block", "unet"), default="block", help="what to measure")
    parser.add_argument("--model", choices=MODELS, default="sd15", help=models)
    parser.add_argument(
        "--sizes",
        type=size,
        nargs="+",
        metavar="SIZE",
        help="pixels: a side, or WIDTHxHEIGHT; multiples of 64 (512 768 1024)",
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="(all of them)")
    parser.add_argument("--ratios", type=ratio, nargs="+", default=[0.5], metavar="RATIO", help="(0.5)")
    parser.add_argument("--batch", type=positive, default=2, help="pictures, or guidance halves (2)")
    parser.add_argument("--rounds", type=int, help="timed calls of each way (7)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, metavar="WAY", help="these, and plain (all)")
    parser.add_argument("--compile", action="store_true", help="through torch.compile, without graph breaks")
    parser.add_argument("--threads", type=positive, help="CPU threads of torch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, help="write all figures there")
    parser.add_argument("--quick", action="store_true", help="512 pixels, two dtypes, 3 rounds, unless told")
    parser.add_argument("--list", action="store_true", help="list the ways and stop")


def size(text: str) -> tuple[int, int]:
    """Width and height of `512` or `3840x2176`."""
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a side like 512 nor a size like 3840x2176")
    width, height = int(found[1]), int(found[2] or found[1])
    if not width or not height or width % MULTIPLE or height % MULTIPLE:
        raise argparse.ArgumentTypeError(f"{text} must be multiples of {MULTIPLE} pixels")
    return width, height


def ratio(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be above 0 and below 1")
    return value


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


class Run:
    """One way in one setting, until it fails; then `note` says why."""

    def __init__(self, name: str, network: nn.Module, setting: Setting, compiled: bool) -> None:
        way = WAYS[name]
        self.name = name
        self.note = ""
        self.seconds: list[float] = []
        self.first: float | None = None
        self.error: float | None = None
        self.peak: float | None = None
        self.ops: int | None = None
        self.call: Callable[..., Any] = nn.Identity()
        needs, free = way.needs(setting), memory.available(setting.device)
        if free is not None and needs > free:
            self.note = f"skipped: needs about {needs / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are available"
            return
        patch = way.patch(setting.level)
        assert patch is not None
        own = view(network)
        if self.attempt(lambda: (patch(own, setting),)):
            self.call = alone(own) if compiled else own

    def attempt(self, step: Callable[[], Result]) -> Result | None:
        """The result of a step, or None and a note if it fails or another did before."""
        if self.note:
            return None
        try:
            return step()
        except Exception as error:  # whatever it is, the other ways go on
            self.note = reason(error)
            self.call = nn.Identity()  # lets go of what the patched network holds
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def time(self, inputs: Inputs, wait: Callable[[], None]) -> Tensor:
        """The output of a call, whose seconds are kept."""
        args, kwargs = inputs
        wait()
        begin = time.perf_counter()
        output: Tensor = self.call(*args, **kwargs)[0]
        wait()
        self.seconds.append(time.perf_counter() - begin)
        return output

    def row(self) -> Row:
        """All that is not told by the times of all ways."""
        seen = Row(peak_mib=self.peak, error=self.error, ops=self.ops) if not self.note else {}
        return {"way": self.name, **dict.fromkeys(FIGURES), **seen, "note": self.note}


def reason(error: Exception) -> str:
    """What went wrong, in a line."""
    lines = [line.strip() for line in str(error).splitlines()]
    return f"{type(error).__name__}: {next(filter(None, lines), '')}"[:200]


def alone(network: nn.Module) -> Callable[..., Any]:
    """A compiled call of a network that shares no compiled code with other networks of its class.

    torch keeps what it makes with the code object and goes through all of it at each call, which would cost
    the ways that come last, and end at its limit of recompilations.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return network(*args, **kwargs)

    own = FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
    compiled: Callable[..., Any] = torch.compile(own, fullgraph=True)
    return compiled


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that are dispatched inside of it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: int = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.ops += 1
        return function(*args, **(kwargs or {}))


def count(call: Callable[[], object]) -> int:
    """How many operations a call dispatches."""
    counter = Counter()
    with counter:
        call()
    return counter.ops


@torch.no_grad()
def measure(
    network: nn.Module, setting: Setting, names: list[str], args: argparse.Namespace, bar: Any
) -> list[Row]:
    """A row for each way; all run in turns."""
    wait = getattr(torch, torch.device(setting.device).type).synchronize
    if args.compile:
        torch.compiler.reset()
        # Else torch takes modules that differ in hooks alone for the same.
        torch._dynamo.config.skip_nnmodule_hook_guards = False
    called = inputs(setting)
    runs = [Run(name, network, setting, args.compile) for name in names]
    plain: Tensor | None = None
    for turn in range(args.rounds + 1):
        for run in runs:
            bar.set_postfix_str(run.name)
            output = run.attempt(partial(run.time, called, wait))
            if turn == 0 and output is not None:
                run.first = run.seconds.pop()
                output = output.float().cpu()
                plain = output if run.name == "plain" else plain
                run.error = None if plain is None else float((output - plain).norm() / plain.norm())
            del output  # or it would stand beside the next one
            bar.update()
    gc.collect()  # what waits to be collected would be missing from what calls add
    for run in runs:
        bar.set_postfix_str(f"memory and operations of {run.name}")
        call = partial(run.call, *called[0], **called[1])
        run.peak = run.attempt(partial(memory.peak, call, setting.device))
        if not args.compile:  # compiled code is dispatched as a whole
            run.ops = run.attempt(partial(count, call))
        bar.update()
    figures = report({run.name: run.seconds for run in runs if not run.note})
    rows = [{**run.row(), **figures.get(run.name, {})} for run in runs]
    if args.compile:
        for run, row in zip(runs, rows, strict=True):
            if run.first is not None and row["median_s"] is not None:
                row["compile_s"] = run.first - row["median_s"]
    return rows


def report(seconds: dict[str, list[float]]) -> dict[str, Row]:
    """What the times of each way come to."""
    median = {name: statistics.median(times) for name, times in seconds.items()}
    least = {name: min(times) for name, times in seconds.items()}
    rows = {}
    for name, times in seconds.items():
        # Inclusive, as the other kind reaches past the extremes of a few rounds.
        p20, *_, p80 = statistics.quantiles(times, n=5, method="inclusive")
        rows[name] = {
            **{"median_s": median[name], "p20_s": p20, "p80_s": p80, "min_s": least[name]},
            "speed": median["plain"] / median[name] if "plain" in median else None,
            "share_median": share(median, name),
            "share_min": share(least, name),
        }
    return rows


def share(seconds: dict[str, float], name: str) -> float | None:
    """How much of what its ideal saves a way saves; None where that is not known or next to nothing."""
    ideal = WAYS[name].ideal
    if ideal not in seconds or "plain" not in seconds:
        return None
    saving = seconds["plain"] - seconds[ideal]
    return (seconds["plain"] - seconds[name]) / saving if saving > LEAST_SAVING * seconds["plain"] else None


def environment(device: str) -> Row:
    """Where it was measured, and with what."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": import_diffusers().version,
        "tomesd": f"{__version__} {commit()}".strip(),
    }


def device_name(device: str) -> str:
    """What the processor or the GPU calls itself."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"model name\s*: (.*)", info)
    return found[1] if found else platform.machine()


def commit() -> str:
    """The commit of a checkout, and whether files differ from it."""
    if not peers.CHECKOUT:
        return ""
    command = ["git", "-C", str(peers.ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def written(value: Any, form: str) -> str:
    """A figure as it stands in a table."""
    if value is None:
        return "-"
    return format(value, form) if isinstance(value, float) else str(value)


def aligned(lead: str, figures: Iterable[str], rows: list[Row], formats: dict[str, str]) -> str:
    """Rows as a table: the column `lead`, then those figures that a row has, or its note."""
    shown = [name for name in figures if any(row[name] is not None for row in rows)]
    lines = [[lead, *shown]]
    lines += [[row[lead], *(written(row[name], formats.get(name, "#.4g")) for name in shown)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for (first, *cells), note in zip(lines, ["", *(row["note"] for row in rows)], strict=True):
        # A row that failed has no figures, and its note needs the room.
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        text.append("  ".join([first.ljust(widths[0]), *([note] if note else padded)]))
    return "\n".join(text)


def table(rows: list[Row]) -> str:
    """One setting's rows, aligned."""
    first = rows[0]
    title = (
        f"{first['level']} of {first['model']}, {first['size']} ({first['tokens']} tokens), "
        f"{first['dtype']}, ratio {first['ratio']:g}, batch {first['batch']}, "
        f"{'compiled' if first['compiled'] else 'eager'}"
    )
    return f"{title}\n{aligned('way', FIGURES, rows, FORMATS)}\n"


def write(rows: list[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
            )


def list_ways() -> None:
    width = max(map(len, WAYS))
    for name, way in WAYS.items():
        only = "" if way.block else " (whole UNets only)"
        print(f"{name:{width}}  {way.explains}{only}")


def run(args: argparse.Namespace) -> int:
    """Runs the command; its exit code is 1 if no way could be measured."""
    parser: argparse.ArgumentParser = args.command
    if args.list:
        list_ways()
        return 0
    for option, value in (QUICK if args.quick else FULL).items():
        if getattr(args, option) is None:
            setattr(args, option, value)
    if args.rounds < 2:
        parser.error(f"argument --rounds: {args.rounds} must be at least 2")
    if args.csv and not args.csv.parent.is_dir():  # not only after hours
        parser.error(f"argument --csv: there is no folder {args.csv.parent}")
    possible = at(args.level)
    wrong = [name for name in args.ways or [] if name not in possible]
    if wrong:
        parser.error(
            f"argument --ways: no --level {args.level} of {', '.join(wrong)}: only of {', '.join(possible)}"
        )
    names = [name for name in possible if not args.ways or name in args.ways or name == "plain"]
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"argument --device: {reason(error)}")
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        sys.exit("the benchmark needs tqdm: pip install 'tomesd[bench]'")
    if args.threads:
        torch.set_num_threads(args.threads)
    where = environment(args.device)
    settings = [
        Setting(args.level, args.model, dtype, width, height, merged, args.batch, args.device)
        for dtype, (width, height), merged in itertools.product(args.dtypes, args.sizes, args.ratios)
    ]
    rows: list[Row] = []
    network: nn.Module | None = None
    with tqdm(total=len(settings) * len(names) * (args.rounds + 2), unit="run") as bar:
        for before, setting in zip([None, *settings], settings, strict=False):
            what = {
                **{"level": setting.level, "model": setting.model, "dtype": setting.dtype},
                **{"size": f"{setting.width}x{setting.height}", "tokens": setting.tokens},
                **{"ratio": setting.ratio, "batch": setting.batch, "compiled": args.compile},
            }
            try:
                if before is None or before.dtype != setting.dtype or network is None:
                    bar.set_postfix_str(f"making {setting.model} in {setting.dtype}")
                    network = None  # before the next one is made
                    network = build(setting)
                measured = measure(network, setting, names, args, bar)
            except Exception as error:  # no way to begin, but other settings may do
                failed = {**dict.fromkeys(FIGURES), "note": reason(error)}
                measured = [{"way": name, **failed} for name in names]
            new = [{**what, **row, **where} for row in measured]
            bar.write(table(new))
            rows += new
            if args.csv:  # each time, as a long run may be stopped
                write(rows, args.csv)
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    return 0 if any(not row["note"] for row in rows) else 1
