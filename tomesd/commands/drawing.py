"""Draws what `quality` compares, and keeps it: pictures, errors and times of each way."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..hosts.unets import find_networks
from .common import Lazy, Row, UserError, device_name, kept, reason, whole
from .metrics import Floats, Pictures
from .models import Setting
from .runs import Run, measure, patched
from .ways import Ways

if TYPE_CHECKING:
    import numpy as np
else:
    np = Lazy("numpy")

# Plain, with fewer steps: no way to patch, but what others have to beat.
FEWER = "fewer-steps"

# What the UNet was called with, by position and by name, and what it gave.
Call = tuple[tuple[Any, ...], dict[str, Any], Tensor]


@dataclass(frozen=True)
class Point:
    """A way of drawing: its name in the table or `FEWER`, its ratio if it has one, and how many steps."""

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


class Drawings:
    """The drawings of a pipeline, in a folder that keeps them.

    Args:
        args: those of `quality`.
    """

    def __init__(
        self, pipe: Any, prompts: list[str], folder: Path, args: argparse.Namespace, ways: Ways
    ) -> None:
        self.pipe, self.args, self.folder, self.ways = pipe, args, folder, ways
        self.unet: nn.Module = pipe.unet
        (network,) = find_networks(self.unet)
        self.downsample = min((site.downsample for site in network.sites), default=1)
        starts = [(seed, i) for seed in range(args.seeds) for i in range(0, len(prompts), args.batch)]
        self.batches = [
            Batch(index, seed, i, prompts[i : i + args.batch]) for index, (seed, i) in enumerate(starts)
        ]
        self.recorded: tuple[Pictures, list[Call]] | None = None

    def run(self, point: Point) -> Run:
        """A copy of the UNet of its own; it fails later, with a note, if it cannot be patched."""
        args = self.args
        setting = Setting(
            *("unet", type(self.pipe).__name__, args.dtype, args.size, args.size, point.ratio or 0.0),
            *(2 * len(self.batches[0].prompts), args.device, self.pipe.vae_scale_factor, self.downsample),
            args.max_downsample or 0,
        )
        torch.manual_seed(0)  # tomesd 0.1.3 takes its randomness from there
        return patched("plain" if point.way == FEWER else point.way, self.ways, self.unet, setting)

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
        """The plain pictures of the first batch, and every call of the UNet for them; drawn once.

        Raises:
            UserError: they cannot be drawn, so there is nothing to compare with.
        """
        if self.recorded is None:
            calls: list[Call] = []

            def keep(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                calls.append((args, kwargs, output[0]))

            handle = self.unet.register_forward_hook(keep, with_kwargs=True)
            try:
                self.recorded = self.draw(self.unet, self.batches[0], self.args.steps), calls
            except Exception as error:
                raise UserError(f"plain cannot be drawn: {reason(error)}") from error
            finally:
                handle.remove()
        return self.recorded

    def drawn(self, point: Point, batch: Batch) -> Drawn | str:
        """A batch as it is kept, or made and kept now; else a note that says why not."""
        file = self.folder / f"{point.name}-{batch.index}.npz"
        drawn = kept(file, read)
        if drawn is None:
            run = self.run(point)
            drawn = run.attempt(lambda: self.make(run.call, point, batch))
            if drawn is None:
                return run.note
            with whole(file) as part:
                np.savez_compressed(part, **vars(drawn))
        return drawn

    def make(self, network: Callable[..., Any], point: Point, batch: Batch) -> Drawn:
        nothing = np.empty(0)
        if batch.index > 0 or point.way == FEWER:
            return Drawn(self.draw(network, batch, point.steps), nothing, nothing)
        pictures, calls = self.record()
        if point.way == "plain":
            return Drawn(pictures, nothing, nothing)
        off = errors(network, calls, len(batch.prompts), self.args.guidance)
        return Drawn(self.draw(network, batch, point.steps), *off)

    def all_of(self, point: Point, bar: Any) -> tuple[Pictures, Row] | str:
        """All pictures of a point and its errors; else a note that says why not. `bar` counts batches."""
        done: list[Drawn] = []
        for i, batch in enumerate(self.batches):
            drawn = self.drawn(point, batch)
            if isinstance(drawn, str):
                bar.update(len(self.batches) - i)
                return drawn
            done.append(drawn)
            bar.update()
        figures: Row = {}
        for name in ("step_error", "guided_error"):
            values = getattr(done[0], name)
            figures[name] = float(values.mean()) if values.size else None
        return np.concatenate([drawn.pictures for drawn in done]), figures

    def times(self, points: list[Point], progress: Any) -> dict[str, Row]:
        """Seconds of a picture, memory and note of each point, by its name: as they are kept, or anew."""
        timed = [point for point in points if point.way != FEWER]
        file = self.folder / "times.json"
        where: Row = {"device": device_name(self.args.device), "threads": torch.get_num_threads()}
        where["rounds"] = self.args.rounds
        old = kept(file, lambda file: dict(json.loads(file.read_text()))) or {}
        # Points that were not measured in turns cannot be compared. What failed may do better now, unless it
        # cannot be done at all.
        known = old.get("points", {}).items()
        final = {name for name, row in known if not row["note"] or row["note"].startswith("ValueError")}
        if old.get("where") != where or not {point.name for point in timed} <= final:
            old = {"where": where, "points": self.measure(timed, progress)}
            with whole(file) as part:
                part.write_text(json.dumps(old, indent=1))
        times: dict[str, Row] = dict(old["points"])
        plain = times["plain"]
        for point in points:
            if point.way == FEWER and not plain["note"]:
                times[point.name] = {**plain, "seconds": plain["seconds"] * point.steps / self.args.steps}
        return times

    def measure(self, points: list[Point], progress: Any) -> dict[str, Row]:
        pictures, calls = self.record()
        args, kwargs, _ = calls[len(calls) // 2]
        runs = {point.name: self.run(point) for point in points}
        rounds = self.args.rounds
        with progress(total=len(runs) * (rounds + 2), desc="times", unit="call") as bar:
            measure([*runs.values()], (args, kwargs), self.args.device, rounds, bar)
        rows: dict[str, Row] = {}
        for name, run in runs.items():
            rows[name] = {"note": run.note}
            if not run.note:
                seconds = statistics.median(run.seconds) * len(calls) / len(pictures)
                rows[name] |= {"seconds": seconds, "peak_mib": run.peak}
        return rows


def read(file: Path) -> Drawn:
    """What `Drawings` has kept in a file."""
    with np.load(file) as arrays:
        return Drawn(**arrays)


@torch.no_grad()
def errors(
    network: Callable[..., Any], calls: list[Call], pictures: int, guidance: float
) -> tuple[Floats, Floats]:
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
