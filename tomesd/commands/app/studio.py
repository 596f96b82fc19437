"""What the page does: draws plain and merged, compares, traces. It knows no gradio."""

from __future__ import annotations

import argparse
import gc
import inspect
import itertools
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import tomesd

from ...hosts.unets import find_networks
from .. import memory
from ..common import UserError, check_multiple, need, size, timed
from ..generate import EMOJI_GUIDANCE, amplified, differences, human, patch, psnr_text
from .traced import Traced

if TYPE_CHECKING:
    from PIL import Image

METHODS: dict[str, Callable[[float], tomesd.Method]] = {
    method.__name__: method
    for method in (tomesd.Merge, tomesd.SampleKeys, tomesd.MergeKeys, tomesd.MergeStage)
}
# What `apply_patch` does without `max_downsample`.
FINEST = "finest"
# Latents of a picture of 3840 x 2176 pixels, where one of them stands for 8 x 8.
LATENTS_4K = 480, 272
# Pixels, at least, of the longer side of a difference.
SHOWN = 512
# Plain pictures that are kept.
KEPT = 16

# Told what is drawn, which of its steps begins, and how many there are.
Told = Callable[[str, int, int], object]


class Cancelled(Exception):
    """The user stopped a run."""


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
    axes.legend(loc="lower left")
    return figure


def make_method(name: str, ratio: float) -> tuple[tomesd.Method, list[str]]:
    """The method, and what is to be known about it, such as that its ratio was cut.

    Raises:
        UserError: it cannot be had with this ratio.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return METHODS[name](ratio), [str(warning.message) for warning in caught]
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from None


def read_size(text: str, multiple: int) -> tuple[int, int]:
    """Width and height; a UserError for what is no size, or none that the pipeline can draw."""
    try:
        wanted = size(text)
    except argparse.ArgumentTypeError as error:
        raise UserError(str(error)) from None
    check_multiple(wanted, multiple, "size")
    return wanted


class Studio:
    """Draws with one pipeline, one picture at a time, whichever thread asks for it.

    Args:
        pipe: of diffusers, on its device. It is left without a patch.
        shipped: whether it is the model of the repository, which draws best with less guidance than others.
    """

    def __init__(self, pipe: Any, device: torch.device, shipped: bool) -> None:
        self.pipe, self.device = pipe, device
        pipe.set_progress_bar_config(disable=True)
        native = tomesd.explain(pipe)
        self.finest = min(row.downsample for row in native.rows)
        self.size = native.width, native.height
        self.scale = int(getattr(pipe, "vae_scale_factor", 8))
        accepted = inspect.signature(pipe.__call__).parameters
        self.options = {"guidance_scale": EMOJI_GUIDANCE} if shipped and "guidance_scale" in accepted else {}
        self.kept: dict[tuple[Any, ...], Drawn] = {}
        self.warm: set[tuple[Any, ...]] = set()
        self.turn = threading.Lock()
        self.who: str | None = None
        self.stopped = threading.Event()

    def presets(self) -> dict[str, dict[str, Any]]:
        """What each preset sets, by the names of the page's fields."""
        two_finest = min(8, 2 * self.finest)
        own, large = ("x".join(map(str, s)) for s in (self.size, [n * self.scale for n in LATENTS_4K]))
        return {
            "Exact look": dict(size=own, method="MergeKeys", ratio=0.5, levels=FINEST, beside=True),
            "Fast": dict(size=own, method="MergeStage", ratio=0.5, levels=two_finest, beside=True),
            "4K": dict(size=large, method="SampleKeys", ratio=0.75, levels=two_finest, beside=False),
        }

    def settings(
        self, prompt: str, size: str, steps: float, method: str, ratio: float, levels: Any, seed: float
    ) -> tuple[Settings, list[str]]:
        """What the fields of the page say, and notes about it; a UserError if one of them is wrong."""
        if not (prompt or "").strip():
            raise UserError("the prompt is empty: say what to draw")
        if seed is None or not 0 <= seed < 2**63:
            raise UserError(f"the seed has to be in 0..2^63-1, not {seed}")
        if not steps or steps < 1:
            raise UserError(f"there has to be at least one step, not {steps}")
        made, notes = make_method(method, ratio)
        wanted = read_size(size or "", math.lcm(8, self.scale))
        limit = None if levels == FINEST else int(levels)
        return Settings(prompt.strip(), wanted, int(steps), int(seed), made, limit), notes

    def compare(self, wanted: Settings, beside: bool, told: Told, who: str = "") -> Comparison:
        """Draws a picture by the method, and the plain one `beside` it unless it is still known.

        Raises:
            UserError: the method cannot be had on this pipeline.
            Cancelled: somebody called `stop(who)`.
        """
        with self._turn(who):
            self._check(wanted)
            plain = self._plain(wanted, told) if beside else None
            with tomesd.patched(self.pipe, wanted.method, wanted.levels):
                merged = self._draw(wanted, type(wanted.method).__name__, told)
            return Comparison(wanted, plain, merged, memory.kind(self.device))

    def trace(self, wanted: Settings, told: Told, who: str = "") -> Traced:
        """Draws a picture by the method and notes what merged; errors as of `compare`."""
        with self._turn(who):
            self._check(wanted)
            with tomesd.patched(self.pipe, wanted.method, wanted.levels), tomesd.trace(self.pipe) as plans:
                picture = self._call(wanted, wanted.steps, "traced", told)
            return Traced(wanted.method, picture, plans)

    def stop(self, who: str = "") -> bool:
        """Lets what somebody draws now end at its next step; whether there was something."""
        mine = self.who == who
        if mine:
            self.stopped.set()
        return mine

    @contextmanager
    def _turn(self, who: str) -> Iterator[None]:
        with self.turn:
            self.stopped.clear()
            self.who = who
            try:
                yield
            finally:
                self.who = None

    def _check(self, wanted: Settings) -> None:
        """A UserError for a method that cannot be had, before anything is drawn."""
        patch(self.pipe, wanted.method, wanted.levels)
        tomesd.remove_patch(self.pipe)

    def _plain(self, wanted: Settings, told: Told) -> Drawn:
        key = wanted.prompt, wanted.size, wanted.steps, wanted.seed
        drawn = self.kept.pop(key, None) or self._draw(wanted, "plain", told)
        self.kept[key] = drawn  # as the newest
        while len(self.kept) > KEPT:
            del self.kept[next(iter(self.kept))]
        return drawn

    def _draw(self, wanted: Settings, label: str, told: Told) -> Drawn:
        kind = label, wanted.size
        if kind not in self.warm:  # the first calls at a size pay for what is made once
            self._call(wanted, 2, f"warm-up, {label}", told)
            self.warm.add(kind)
        gc.collect()
        with memory.Peak(self.device) as peak:
            picture, seconds = timed(lambda: self._call(wanted, wanted.steps, label, told), self.device)
        return Drawn(picture, wanted.steps, seconds, peak)

    def _call(self, wanted: Settings, steps: int, label: str, told: Told) -> Image.Image:
        numbers = itertools.count(1)

        def begin(*call: object) -> None:
            if self.stopped.is_set():
                raise Cancelled
            told(label, min(next(numbers), steps), steps)

        width, height = wanted.size
        vae: Any = getattr(self.pipe, "vae", None)
        if hasattr(vae, "enable_tiling"):  # at once, a 4K picture would take tens of gigabytes
            large = width * height > 4 * math.prod(self.size)
            vae.enable_tiling() if large else vae.disable_tiling()
        # A hook of our own, as not all pipelines have callbacks, and those that do call them in several ways.
        hook = find_networks(self.pipe)[0].module.register_forward_pre_hook(begin)
        try:
            generator = torch.Generator().manual_seed(wanted.seed)
            call = dict(width=width, height=height, num_inference_steps=steps, generator=generator)
            picture: Image.Image = self.pipe(prompt=wanted.prompt, **call, **self.options).images[0]
        finally:
            hook.remove()
        return picture
