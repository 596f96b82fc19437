"""What the page does: draws plain and merged, compares, traces. It knows no gradio."""

from __future__ import annotations

import argparse
import gc
import inspect
import itertools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

import tomesd

from ...hosts.unets import find_networks
from .. import common, memory
from ..common import UserError, check_multiple, need, timed
from ..generate_4k import base_size
from ..options import EMOJI_GUIDANCE, make_method, patch
from .comparison import Comparison, Drawn, Settings
from .traced import Traced

if TYPE_CHECKING:
    from PIL import Image

Value = TypeVar("Value")
# What `apply_patch` does without `max_downsample`.
FINEST = "finest"
# So many times the model's own area, pictures are drawn small first, and then refined with this share of the
# steps: models repeat things where they draw at once.
LARGE = 4
STRENGTH = 0.4
# Latents of a picture of 3840 x 2176 pixels, where one of them stands for 8 x 8.
LATENTS_4K = 480, 272
# Plain pictures that are kept.
KEPT = 16

# Told what is drawn, which of its steps begins, and how many there are.
Told = Callable[[str, int, int], object]


class Cancelled(Exception):
    """The user stopped a run."""


class Source(NamedTuple):
    """A pipeline, what it is called with to draw one picture, and the share of the steps that it takes."""

    pipe: Any
    call: dict[str, Any]
    share: float


def read(kind: Callable[[str], Value], what: str, given: object) -> Value:
    """What a field of the page says, as a command line would take it; a UserError if that is wrong."""
    try:
        return kind("" if given is None else str(given))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{what}: {error}") from None


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
        # Who draws or waits, and what is set to stop that; and that of the one who draws.
        self.asked: list[tuple[str, threading.Event]] = []
        self.stopped = threading.Event()

    def presets(self) -> dict[str, dict[str, Any]]:
        """What each preset sets, by the names of the page's fields."""
        two_finest = min(8, 2 * self.finest)
        own, large = ("x".join(map(str, s)) for s in (self.size, [n * self.scale for n in LATENTS_4K]))
        return {
            "Exact look": dict(size=own, method="merge-keys", ratio=0.5, levels=FINEST, beside=True),
            "Fast": dict(size=own, method="merge-stage", ratio=0.5, levels=two_finest, beside=True),
            "4K": dict(size=large, method="sample-keys", ratio=0.75, levels=two_finest, beside=False),
        }

    def settings(
        self, prompt: str, size: Any, steps: Any, method: str, ratio: float, levels: Any, seed: Any
    ) -> tuple[Settings, list[str]]:
        """What the fields of the page say, and notes about it; a UserError if one of them is wrong."""
        if not (prompt or "").strip():
            raise UserError("the prompt is empty: say what to draw")
        picture = (
            read(common.size, "size", size),
            read(common.positive, "steps", steps),
            read(common.seed, "seed", seed),
        )
        check_multiple(picture[0], math.lcm(8, self.scale), "size")
        made, notes = make_method(method, ratio)
        return Settings(prompt.strip(), *picture, made, None if levels == FINEST else int(levels)), notes

    def compare(self, wanted: Settings, beside: bool, told: Told, who: str = "") -> Comparison:
        """Draws a picture by the method, and the plain one `beside` it unless it is still known.

        Raises:
            UserError: the method cannot be had on this pipeline.
            Cancelled: somebody called `stop(who)`.
        """
        with self._turn(who):
            self._check(wanted)
            source = self._source(wanted, told)
            plain = self._plain(wanted, source, told) if beside else None
            with tomesd.patched(self.pipe, wanted.method, wanted.levels):
                merged = self._draw(wanted, source, type(wanted.method).__name__, told)
            return Comparison(wanted, plain, merged, memory.kind(self.device))

    def trace(self, wanted: Settings, told: Told, who: str = "") -> Traced:
        """Draws a picture by the method and notes what merged; errors as of `compare`."""
        with self._turn(who):
            self._check(wanted)
            source = self._source(wanted, told)
            with tomesd.patched(self.pipe, wanted.method, wanted.levels), tomesd.trace(self.pipe) as plans:
                picture = self._call(wanted, source, wanted.steps, "traced", told)
            return Traced(wanted.method, picture, plans)

    def stop(self, who: str = "") -> bool:
        """Lets what somebody draws, or waits for, end at its next step; whether there was something."""
        stops = [stop for name, stop in list(self.asked) if name == who]
        for stop in stops:
            stop.set()
        return bool(stops)

    @contextmanager
    def _turn(self, who: str) -> Iterator[None]:
        mine = who, threading.Event()
        self.asked.append(mine)
        try:
            with self.turn:
                self.stopped = mine[1]
                yield
        finally:
            self.asked.remove(mine)

    def _check(self, wanted: Settings) -> None:
        """A UserError for a method that cannot be had, before anything is drawn."""
        patch(self.pipe, wanted.method, wanted.levels)
        tomesd.remove_patch(self.pipe)

    def _is_large(self, wanted: Settings) -> bool:
        return math.prod(wanted.size) > LARGE * math.prod(self.size)

    def _source(self, wanted: Settings, told: Told) -> Source:
        """What draws a picture: for a large one what refines a small one, as `generate-4k` does."""
        width, height = wanted.size
        at_once = Source(self.pipe, {"width": width, "height": height}, 1)
        if not self._is_large(wanted) or not hasattr(self.pipe, "unet"):
            return at_once
        try:
            refiner = need("diffusers").AutoPipelineForImage2Image.from_pipe(self.pipe)
        except ValueError:  # there is none for this pipeline
            return at_once
        refiner.set_progress_bar_config(disable=True)
        least = math.ceil(1 / STRENGTH)
        if wanted.steps < least:
            raise UserError(f"a picture of this size takes at least {least} steps, not {wanted.steps}")
        small = replace(wanted, size=base_size(self.pipe, wanted.size))
        base = self._plain(small, self._source(small, told), told).picture
        image = need("PIL.ImageOps").fit(base, wanted.size, method=need("PIL.Image").Resampling.LANCZOS)
        return Source(refiner, {"image": image, "strength": STRENGTH}, STRENGTH)

    def _plain(self, wanted: Settings, source: Source, told: Told) -> Drawn:
        key = wanted.prompt, wanted.size, wanted.steps, wanted.seed
        drawn = self.kept.pop(key, None) or self._draw(wanted, source, "plain", told)
        self.kept[key] = drawn  # as the newest
        while len(self.kept) > KEPT:
            del self.kept[next(iter(self.kept))]
        return drawn

    def _draw(self, wanted: Settings, source: Source, label: str, told: Told) -> Drawn:
        kind = label, wanted.size
        if kind not in self.warm:  # the first calls at a size pay for what is made once
            self._call(wanted, source, math.ceil(1 / source.share) + 1, f"warm-up, {label}", told)
            self.warm.add(kind)
        gc.collect()
        with memory.Peak(self.device) as peak:
            picture, seconds = timed(
                lambda: self._call(wanted, source, wanted.steps, label, told), self.device
            )
        return Drawn(picture, int(wanted.steps * source.share), seconds, peak)

    def _call(self, wanted: Settings, source: Source, steps: int, label: str, told: Told) -> Image.Image:
        numbers, total = itertools.count(1), int(steps * source.share)

        def begin(*call: object) -> None:
            if self.stopped.is_set():
                raise Cancelled
            told(label, min(next(numbers), total), total)

        vae: Any = getattr(self.pipe, "vae", None)
        if hasattr(vae, "enable_tiling"):  # at once, a 4K picture would take tens of gigabytes
            vae.enable_tiling() if self._is_large(wanted) else vae.disable_tiling()
        # A hook of our own, as not all pipelines have callbacks, and those that do call them in several ways.
        hook = find_networks(self.pipe)[0].module.register_forward_pre_hook(begin)
        try:
            generator = torch.Generator().manual_seed(wanted.seed)
            call = {**source.call, **self.options, "num_inference_steps": steps, "generator": generator}
            picture: Image.Image = source.pipe(prompt=wanted.prompt, **call).images[0]
        finally:
            hook.remove()
        return picture
