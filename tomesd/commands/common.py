"""What commands, scripts and examples share: command lines, errors, tables, files, clocks, views."""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import importlib.metadata
import io
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import nn

from .. import __version__
from ..maths.devices import synchronize as synchronize
from ..maths.devices import timed as timed
from ..methods import files
from ..tools import extras
from .memory import keep_freed
from .torchvision import mend_torchvision

# The repository, where this is a checkout of it.
ROOT = Path(__file__).resolve().parents[2]
DTYPES = ("float32", "bfloat16", "float16")
Row = dict[str, Any]
Result = TypeVar("Result")
Module = TypeVar("Module", bound=nn.Module)


EXIT_CODES = """exit codes:
  0    done
  1    nothing could be done, or not all of it: what failed is listed
  2    a mistake, explained in one line; nothing was begun, or what was done is kept
  130  stopped by Ctrl-C; what was done is kept"""


def cache_folder() -> Path:
    """Where commands keep what is slow to make."""
    try:
        return Path.home() / ".cache" / "tomesd"
    except RuntimeError:  # a user of whom nothing is known, as in containers
        return Path(tempfile.gettempdir()) / "tomesd"


CACHE = cache_folder()


class UserError(Exception):
    """A mistake that one line explains; the command ends with exit code 2."""


class Lazy:
    """A module that is imported when it is first used, so that `--help` works where it is not installed."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(need(self.name), attribute)


class Parser(argparse.ArgumentParser):
    """Takes a module's docstring for its description, and raises UserError for a wrong command line."""

    def __init__(self, program: str, description: str | None, **options: Any) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(program, description=description, formatter_class=layout, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def dispatch(
    program: str, commands: Mapping[str, str], package: str, arguments: Sequence[str] | None = None
) -> int:
    """Runs the command that the first argument names; lists all without one.

    Args:
        program: what a user types before that name.
        commands: a line about each; its module has a `main(arguments)`.
        package: what comes before the names of these modules.
        arguments: those of the command line by default.

    Returns:
        The exit code, one of `EXIT_CODES`.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]

    def run() -> int:
        if name in ("-h", "--help"):
            print(f"usage: {program} COMMAND ...\n")
            list_lines(commands)
            print(f"\n{program} COMMAND --help explains each, with examples; {program} --version.\n")
            print(EXIT_CODES)
            return 0
        if name == "--version":
            print(f"tomesd {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
            return 0
        if name not in commands:
            raise UserError(f"invalid choice: {name!r} (choose from {', '.join(commands)})")
        mend_torchvision()
        code: int = need(package + name.replace("-", "_")).main(rest)
        return code

    return guarded(f"{program} {name}" if name in commands else program, run)


def guarded(program: str, call: Callable[[], int], if_full: str = "smaller sizes or batches") -> int:
    """The exit code of a call; mistakes are explained in a line. `if_full`: what to try if memory ends."""
    take_any_text()
    keep_freed()
    try:
        try:
            return call()
        finally:
            sys.stdout.flush()  # or a pipe that is closed would be noticed when Python ends
    except UserError as error:
        say(f"{program}: error: {error}")
        return 2
    except KeyboardInterrupt:
        say("stopped")
        return 130
    except BrokenPipeError:  # `| head` has seen enough; or Python would complain once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # no space, no permission, no such file
        say(f"{program}: error: {error}")
        return 2
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        say(f"{program}: error: out of memory; try {if_full}")
        return 2


def take_any_text() -> None:
    """Makes printing safe where output is closed, or in an encoding that lacks letters of a path."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def need(module: str) -> Any:
    """Imports a module.

    Raises:
        UserError: it, or what it needs, is not installed; says how to get it.
    """
    try:
        return extras.need(module)
    except ImportError as error:
        raise UserError(str(error)) from error


def size(text: str) -> tuple[int, int]:
    """Width and height of `512` or `3840x2176`."""
    found = re.fullmatch(r"(\d{1,6})(?:[xX](\d{1,6}))?", text.strip())
    if not found or 0 in (sides := (int(found[1]), int(found[2] or found[1]))):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a side like 512 nor a size like 3840x2176")
    return sides


def positive(text: str) -> int:
    return whole_number(text, 1)


def from_zero(text: str) -> int:
    return whole_number(text, 0)


def threads(text: str) -> int:
    """With millions torch would fail later, and say nothing of threads."""
    return whole_number(text, 1, most=1024)


def whole_number(text: str, least: int, most: int = 2**31 - 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    if int(text) > most:
        raise argparse.ArgumentTypeError(f"{text} is above {most}")
    return int(text)


def seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number in 0..2^63-1")
    return int(text)


def guidance(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def ratio(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be above 0 and below 1")
    return value


def check_multiple(size: tuple[int, int], multiple: int, option: str = "--size") -> None:
    """Raises a UserError for a size that is not a multiple of so many pixels, with sizes that are."""
    for side in size:
        if side % multiple:
            below = max(multiple, side // multiple * multiple)
            near = " or ".join(map(str, dict.fromkeys((below, below + multiple))))
            text = "x".join(map(str, size))
            raise UserError(f"{option} {text}: {side} is not a multiple of {multiple}; take {near}")


def new_file(text: str) -> Path:
    """The path of a file to write; what cannot be written is refused now, and not after hours."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {path}")
    return path


def make_folder(path: Path, option: str) -> None:
    """Makes a folder where there is none; a UserError if one cannot write there: now, and not after hours."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"argument {option}: cannot make the folder {path}: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"argument {option}: cannot write into the folder {path}")


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Makes UserErrors of what a pipeline, or a method in it, says that it cannot draw."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"it cannot be drawn: {first_line(error)}") from error


def list_lines(lines: Mapping[str, str]) -> None:
    """Prints names with what each of them is."""
    width = max(map(len, lines))
    for name, about in lines.items():
        print(f"{name:{width}}  {about}")


def say(line: str) -> None:
    """Progress goes to stderr, results to stdout."""
    print(line, file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    """What an error says, short: its first line, or the first sentences of a long one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return textwrap.shorten(lines[0], 160, placeholder=" ...").rstrip(".") if lines else type(error).__name__


def reason(error: Exception) -> str:
    """What went wrong, for a table: the kind of the error and its first line."""
    return f"{type(error).__name__}: {first_line(error)}"


def out_of_memory(error: BaseException) -> bool:
    named = type(error).__name__ in ("OutOfMemoryError", "MemoryError")
    return named or "out of memory" in str(error) or "can't allocate memory" in str(error)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """A table of cells: the first column to the left, others to the right. Short lines stay as they are."""
    columns = max(map(len, lines))
    full = [line for line in lines if len(line) == columns]
    widths = [max(len(line[0]) for line in lines)]
    widths += [max(len(line[i]) for line in full) for i in range(1, columns)]
    text = []
    for first, *cells in lines:
        if len(cells) + 1 == columns:
            cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        text.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(text)


def figures_table(lead: str, figures: Sequence[str], rows: Sequence[Row], formats: Mapping[str, str]) -> str:
    """Rows as a table: the column `lead`, then those figures that a row has, or its note."""

    def cell(row: Row, name: str) -> str:
        value = row[name]
        if value is None:
            return "-"
        return format(value, formats.get(name, "#.4g")) if isinstance(value, float) else str(value)

    shown = [name for name in figures if any(row.get(name) is not None for row in rows)]
    lines = [[lead, *shown]]
    for row in rows:
        lines.append([row[lead], row["note"]] if row["note"] else [row[lead], *(cell(row, n) for n in shown)])
    return aligned(lines)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    with whole(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to; what is written there appears as `path` at the end, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.whole(path) as part:
        yield part


def kept(path: Path, read: Callable[[Path], Result]) -> Result | None:
    """What was kept in a file; None where there is none, or where it was cut short or is of another kind."""
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except Exception as error:  # every reader has its own for what it cannot read
        say(f"note: {path} cannot be read ({reason(error)}); it is made again")
        return None


def view(network: Module) -> Module:
    """A copy that shares the weights, so that each way can stay patched, for the memory of one."""
    shared = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): tensor for tensor in shared})


def environment(device: str | torch.device, *packages: str) -> Row:
    """Where something was measured, and with which versions of what."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **{package: importlib.metadata.version(package) for package in packages},
        "tomesd": f"{__version__} {commit()}".strip(),
    }


def device_name(device: str | torch.device) -> str:
    """What the processor or the GPU calls itself."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"model name\s*: (.*)", info)
    return found[1] if found else platform.machine()


def commit() -> str:
    """The commit of a checkout, and whether files differ from it."""
    if not (ROOT / ".git").exists():
        return ""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
