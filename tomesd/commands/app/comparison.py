"""What a run gives: two pictures, what they cost, how far they are from each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import tomesd

from .. import memory
from ..common import need
from ..generate import amplified, differences, human, psnr_text

if TYPE_CHECKING:
    from PIL import Image

# Pixels, at least, of the longer side of a difference.
SHOWN = 512


@dataclass(frozen=True)
class Settings:
    """What is to be drawn, and by which method."""

    prompt: str
    size: tuple[int, int]
    steps: int
    seed: int
    method: tomesd.Method
    levels: int | None

    @property
    def line(self) -> str:
        """The line of Python that patches like this."""
        levels = "" if self.levels is None else f", max_downsample={self.levels}"
        return f"tomesd.apply_patch(pipe, tomesd.{self.method}{levels})"


@dataclass(frozen=True)
class Drawn:
    """A picture and what it cost."""

    picture: Image.Image
    steps: int
    seconds: float
    peak: memory.Peak


class Run(NamedTuple):
    """What is known of a run, for the second tab."""

    method: str
    time: float  # as a share of plain's
    psnr: float  # dB
    prompt: str
    size: str
    steps: int
    seed: int
    seconds: float


# What the table of runs calls these.
HEADERS = ["method", "time share", "PSNR, dB", "prompt", "size", "steps", "seed", "seconds"]


@dataclass(frozen=True)
class Comparison:
    """A picture drawn by a method, and plain if that was asked for."""

    settings: Settings
    plain: Drawn | None
    merged: Drawn
    memory: str  # what its figures measure

    @property
    def difference(self) -> Image.Image | None:
        """Of the two pictures, amplified, on white; small ones enlarged, pixel by pixel."""
        if self.plain is None:
            return None
        image = amplified(*(drawn.picture.convert("RGB") for drawn in (self.plain, self.merged)))
        times = -(-SHOWN // max(image.size))
        return image.resize((image.width * times, image.height * times), resample=0)

    @property
    def run(self) -> Run | None:
        """The figures of the run; None without a plain picture."""
        if self.plain is None:
            return None
        s = self.settings
        name = f"{s.method}" + ("" if s.levels is None else f" up to level {s.levels}")
        time = round(self.merged.seconds / self.plain.seconds, 3)
        psnr = round(differences(self.plain.picture, self.merged.picture)[1], 2)
        what = s.prompt, "x".join(map(str, s.size)), s.steps, s.seed
        return Run(name, time, psnr, *what, round(self.merged.seconds, 2))

    def table(self) -> list[list[str]]:
        """Seconds, iterations a second and memory of each picture, with a line of names before."""
        lines = [["", "seconds", "iterations/s", f"peak {self.memory}", "of it for the picture"]]
        for name, drawn in (("plain", self.plain), ("merged", self.merged)):
            if drawn is not None:
                added = "not measured" if drawn.peak.added is None else f"{drawn.peak.added:.0f} MiB"
                speed = f"{drawn.steps / drawn.seconds:.2f}"
                lines.append([name, f"{drawn.seconds:.2f}", speed, human(drawn.peak.reached), added])
        return lines

    def verdict(self) -> str:
        if self.plain is None:
            return "Plain was not drawn, so there is nothing to compare with."
        mean, psnr = differences(self.plain.picture, self.merged.picture)
        gain = self.plain.seconds / self.merged.seconds
        return f"{gain:.2f} times as fast; PSNR {psnr_text(psnr)}, mean difference {mean:.2f} of 255"


def error_over_time(runs: Sequence[Run]) -> Any:
    """A figure of matplotlib: each run is a point, each method has a colour."""
    figure = need("matplotlib.figure").Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="time, as a share of plain's", ylabel="PSNR to plain, dB: higher is nearer"
    )
    axes.axvline(1, color="0.55", linestyle="--", label="plain")
    for method in dict.fromkeys(run.method for run in runs):
        own = [run for run in runs if run.method == method]
        axes.plot([run.time for run in own], [run.psnr for run in own], "o", markersize=8, label=method)
    lowest, highest = min([20, *(run.psnr for run in runs)]), max([80, *(run.psnr for run in runs)])
    axes.set(xlim=(0, 1.1 * max([1, *(run.time for run in runs)])), ylim=(lowest - 2, highest + 2))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure
