"""Runs ways to compute in turns: seconds, memory and errors of each."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from . import memory
from .common import Result, Row, reason, timed, view
from .models import Inputs, Setting
from .ways import Ways

# Below this share of plain's time, what an ideal saves is noise.
LEAST_SAVING = 0.05


class Run:
    """A network in one way, until it fails; then `note` says why.

    Args:
        name: of the way.
        make: gives the network, or what else is to be called.
        note: why it is not to be tried at all.
    """

    def __init__(self, name: str, make: Callable[[], Callable[..., Any]], note: str = "") -> None:
        self.name = name
        self.note = note
        self.seconds: list[float] = []
        self.first: float | None = None
        self.error: float | None = None
        self.peak: float | None = None
        made = self.attempt(make)
        self.call: Callable[..., Any] = nn.Identity() if made is None else made

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

    def time(self, inputs: Inputs, device: str) -> Tensor:
        """The output of a call, whose seconds are kept."""
        args, kwargs = inputs
        output, seconds = timed(lambda: self.call(*args, **kwargs), device)
        self.seconds.append(seconds)
        return output if isinstance(output, Tensor) else output[0]


def patched(name: str, ways: Ways, network: nn.Module, setting: Setting, compiled: bool = False) -> Run:
    """A run of a network in a way, on a copy that shares its weights."""
    way = ways[name]

    def make() -> Callable[..., Any]:
        own = view(network)
        way.patch(own, setting)
        return alone(own) if compiled else own

    needs, free, note = way.needs(setting), memory.available(setting.device), ""
    if free is not None and needs > free:
        note = f"skipped: needs about {needs / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are available"
    return Run(name, make, note)


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


@torch.no_grad()
def measure(
    runs: Sequence[Run], inputs: Inputs, device: str, rounds: int, bar: Any, warm_up: int = 1
) -> None:
    """Calls all runs in turns: seconds of each, its memory, and its error, the distance from plain's output.

    Args:
        inputs: of each call.
        bar: shows the progress, `rounds + warm_up + 1` steps for each run.
        warm_up: calls of each that are not counted.
    """
    plain: Tensor | None = None
    for turn in range(warm_up + rounds):
        for run in runs:
            bar.set_postfix_str(run.name)
            output = run.attempt(partial(run.time, inputs, device))
            if turn == 0 and output is not None:
                run.first = run.seconds[0]
                output = output.float().cpu()
                plain = output if run.name == "plain" else plain
                run.error = None if plain is None else float((output - plain).norm() / plain.norm())
            if turn + 1 == warm_up:
                run.seconds.clear()
            del output  # or it would stand beside the next one
            bar.update()
    args, kwargs = inputs
    gc.collect()
    for run in runs:
        bar.set_postfix_str(f"memory of {run.name}")
        run.peak = run.attempt(partial(memory.peak, partial(run.call, *args, **kwargs), device))
        bar.update()


def report(seconds: Mapping[str, list[float]], ideals: Mapping[str, str | None]) -> dict[str, Row]:
    """What the times of each way come to; `ideals` names the way that saves what each could at best."""
    median = {name: statistics.median(times) for name, times in seconds.items()}
    least = {name: min(times) for name, times in seconds.items()}
    rows = {}
    for name, times in seconds.items():
        # Inclusive, as the other kind reaches past the extremes of a few rounds.
        p20, *_, p80 = statistics.quantiles(times, n=5, method="inclusive")
        rows[name] = {
            **{"median_s": median[name], "p20_s": p20, "p80_s": p80, "min_s": least[name]},
            "speed": median["plain"] / median[name] if "plain" in median else None,
            "share_median": share(median, name, ideals[name]),
            "share_min": share(least, name, ideals[name]),
        }
    return rows


def share(seconds: Mapping[str, float], name: str, ideal: str | None) -> float | None:
    """How much of what its ideal saves a way saves; None where that is not known or next to nothing."""
    if ideal is None or ideal not in seconds or "plain" not in seconds:
        return None
    saving = seconds["plain"] - seconds[ideal]
    return (seconds["plain"] - seconds[name]) / saving if saving > LEAST_SAVING * seconds["plain"] else None
