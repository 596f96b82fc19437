"""Draws what `bench --csv` has written: speed over size, and below it the share of the ideal or memory.

    tomesd bench --csv bench.csv
    tomesd plot bench.csv --out bench.png
    tomesd plot cpu.csv gpu.csv --below peak_mib --out bench.png

A panel for each device, level, model, dtype and kind of running, a line for each way. What was measured twice
is drawn as it was measured last.
"""

from __future__ import annotations

import argparse
import csv
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import common
from .bench import FIGURES
from .common import Row, UserError, guarded, need, new_file, whole
from .ways import WAYS, Ways

PROGRAM = "tomesd plot"
# What makes a panel, and how to put it.
PANEL = ("device", "level", "model", "dtype", "compiled", "ratio", "batch")
LABELS = {"share_median": "share of the ideal saving", "peak_mib": "memory of a call, MiB"}
# Of ways that this table does not know, as those of a later version.
OTHER = "0.75"
# Of plain with fewer steps, which is no way to patch.
FEWER_COLOUR = "0.35"

Point = dict[str, str]


def make_parser(program: str) -> argparse.ArgumentParser:
    parser = common.Parser(program, __doc__)
    parser.add_argument("csv", type=Path, nargs="+", help="what `bench --csv` has written")
    parser.add_argument("--out", type=new_picture, default="bench.png", help="the picture (bench.png)")
    parser.add_argument("--below", choices=LABELS, default="share_median", help="the second row of panels")
    return parser


def read(paths: list[Path]) -> list[Point]:
    """All rows that have figures.

    Raises:
        UserError: a file cannot be read or is not what the benchmark writes, or none has figures.
    """
    rows: list[Point] = []
    for path in paths:
        try:
            file = path.open(newline="", encoding="utf-8-sig", errors="replace")
        except OSError as error:
            raise UserError(str(error)) from None
        with file:
            reader = csv.DictReader(file)
            missing = {*PANEL, "way", "size", *FIGURES} - set(reader.fieldnames or [])
            if missing:
                raise UserError(f"{path} has no column {', '.join(sorted(missing))}: not of `bench --csv`")
            try:
                rows += [checked(row) for row in reader if row["median_s"] and row["speed"]]
            except (csv.Error, ValueError, argparse.ArgumentTypeError) as error:
                raise UserError(f"{path}, line {reader.line_num}: not of `bench --csv`: {error}") from None
    if not rows:
        raise UserError(f"no way was measured in {', '.join(map(str, paths))}")
    return rows


def checked(row: Point) -> Point:
    """A row, if its size and its figures are some; else a ValueError or an ArgumentTypeError."""
    common.size(row["size"])
    for name in FIGURES:
        float(row[name] or 0)
    return row


def title(rows: list[Point], key: tuple[str, ...]) -> str:
    """What a panel shows; what all panels share is left to the heading."""
    first = dict(zip(PANEL, key, strict=True))
    words = [words_for(name, first[name]) for name in PANEL if len({row[name] for row in rows}) > 1]
    return ", ".join(filter(None, words))


def heading(rows: list[Point]) -> str:
    """What all panels share."""
    words = [words_for(name, rows[0][name]) for name in PANEL if len({row[name] for row in rows}) == 1]
    return ", ".join(filter(None, words))


def words_for(name: str, value: str) -> str:
    if name == "compiled":
        return "compiled" if value == "True" else "eager"
    return f"{name} {value}" if name in ("ratio", "batch") else value


def short(size: str) -> str:
    """`512` for 512x512."""
    width, height = size.split("x")
    return width if width == height else size


def draw(rows: list[Point], below: str, ways: Ways) -> Any:
    """A figure of matplotlib."""
    shown = dict.fromkeys(row["way"] for row in rows)
    panels = list(dict.fromkeys(tuple(row[name] for name in PANEL) for row in rows))
    figure = need("matplotlib.figure").Figure(figsize=(2.4 + 3.4 * len(panels), 6.4), layout="constrained")
    axes = figure.subplots(2, len(panels), squeeze=False, sharex="col")
    for column, key in enumerate(panels):
        here = [row for row in rows if tuple(row[name] for name in PANEL) == key]
        sizes = sorted({row["size"] for row in here}, key=lambda size: math.prod(map(int, size.split("x"))))
        for axis, figure_name in zip(axes[:, column], ("speed", below), strict=True):
            for way in shown:
                points = {row["size"]: row for row in here if row["way"] == way and row[figure_name]}
                at = [i for i, size in enumerate(sizes) if size in points]
                if not at or (way.startswith("ideal") and figure_name == "share_median"):
                    continue  # 1 by definition
                values = [float(points[sizes[i]][figure_name]) for i in at]
                colour = ways[way].colour if way in ways else OTHER
                axis.plot(at, values, color=colour, label=way, **style(way))
            axis.grid(axis="y", color="0.92")
            axis.spines[["top", "right"]].set_visible(False)
            axis.margins(0.1)
        axes[0, column].set_title(title(rows, key), fontsize=10)
        axes[1, column].set_xticks(range(len(sizes)), map(short, sizes))
        axes[1, column].set_xlabel("pixels")
        if below == "share_median":
            axes[1, column].axhline(1, color="0.3", linewidth=1.1, linestyle="--")
            low, high = axes[1, column].get_ylim()
            axes[1, column].set_ylim(min(0.7, low), max(1.05, high))
        else:
            axes[1, column].set_ylim(0, None)
    axes[0, 0].set_ylabel("speed, plain = 1")
    axes[1, 0].set_ylabel(LABELS[below])
    lines = {line.get_label(): line for axis in axes[0] for line in axis.get_lines()}
    figure.legend(lines.values(), lines, loc="outside right center", frameon=False)
    figure.suptitle(heading(rows), fontsize=11)
    return figure


def style(way: str) -> dict[str, Any]:
    """Ideals are drawn as the limits that they are."""
    if way.startswith("ideal"):
        return {"marker": "_", "linestyle": "--", "linewidth": 1.1}
    return {"marker": "o", "markersize": 4}


def curves(rows: list[Row], column: str, label: str, title: str, ways: Ways) -> Any:
    """A figure of matplotlib: a column of `quality` over seconds; each way a curve, plain's time a line.

    Rows hold their `mark`, what is written beside their point, and plain is the first.
    """
    figure = need("matplotlib.figure").Figure(figsize=(8.2, 5), layout="constrained")
    axis = figure.subplots()
    axis.axvline(rows[0]["seconds"], color=ways["plain"].colour, linestyle="--", label="plain")
    for way in dict.fromkeys(row["way"] for row in rows[1:]):
        here = [row for row in rows if row["way"] == way and row[column] is not None]
        if not here:
            continue
        colour, marker = (ways[way].colour, "o") if way in ways else (FEWER_COLOUR, "s")
        seconds, values = ([row[name] for row in here] for name in ("seconds", column))
        axis.plot(seconds, values, color=colour, marker=marker, markersize=4, label=way)
        about: Row = {"textcoords": "offset points", "fontsize": 6, "color": colour}
        for row, at in zip(here, zip(seconds, values, strict=True), strict=True):
            axis.annotate(row["mark"], at, (3, 3), **about)
    axis.set(xlabel="seconds of the UNet for a picture", ylabel=label)
    axis.set_title(title, fontsize=9)
    axis.grid(color="0.92")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False)
    return figure


def sheet(
    columns: Sequence[tuple[str, Any]],
    rows: Sequence[str],
    captions: Sequence[Sequence[str]] = (),
    inches: float = 1.0,
) -> Any:
    """A figure of matplotlib: pictures, as many in each column as there are names of rows.

    Args:
        columns: the name and the pictures of each.
        captions: of the pictures of each column.
        inches: side of a picture.
    """
    side, font = inches + 0.1, 7 if inches < 2 else 9
    size = (side * len(columns) + 1, (side + 0.3 * bool(captions)) * len(rows) + 0.4)
    figure = need("matplotlib.figure").Figure(figsize=size, dpi=100, layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for j, (name, pictures) in enumerate(columns):
        axes[0, j].set_title(textwrap.fill(name, round(14 * inches)), fontsize=font)
        for i, (axis, picture) in enumerate(zip(axes[:, j], pictures, strict=True)):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[], xlabel=captions[j][i] if captions else "")
            axis.spines[:].set_color("0.85")  # a difference that is white would look as if it were missing
    for axis, row in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(textwrap.fill(row, 16), fontsize=font, rotation=0, ha="right", va="center")
    return figure


def new_picture(text: str) -> Path:
    """The path of a picture to write; one that `save` could not write is refused now, and not after hours."""
    path = new_file(text)
    kinds = need("matplotlib.figure").Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise argparse.ArgumentTypeError(f"the name of {path} has to end in one of .{', .'.join(kinds)}")
    return path


def save(figure: Any, path: Path, option: str) -> None:
    """Writes a figure of matplotlib; a UserError names the option that asks for what cannot be."""
    try:
        with whole(path) as part:
            figure.savefig(part, dpi=150)
    except (OSError, ValueError) as error:  # no such folder, or no such format
        raise UserError(f"argument {option}: {error}") from None


def run(args: argparse.Namespace, ways: Ways) -> int:
    save(draw(read(args.csv), args.below, ways), args.out, "--out")
    print(args.out)
    return 0


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM, ways: Ways = WAYS) -> int:
    return guarded(program, lambda: run(make_parser(program).parse_args(arguments), ways))
