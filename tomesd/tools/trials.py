"""What tune measures: a plain run, and what each method does in each transformer alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from ..hosts.family import Site
from ..hosts.hooks import patch_of
from ..hosts.unets import find_networks
from ..maths.devices import timed
from ..methods import options
from ..methods.choice import ImageNetwork
from ..methods.cost import work_of
from ..methods.method import Method
from ..methods.recipe import Recipe
from ..patch import patched

PROMPTS = ("a photograph of a cat", "a painting of a house by the sea")
# How many steps that follow each other are recorded, in the middle of a run.
RECORDED = 4
ROUNDS = 3
# Of the finest level, by which work is compared.
TOKENS = 4096
# Transformers that do less of the work of all than this are left alone.
LEAST = 0.01
# What is left at least of the time of a call, by what is expected.
LEFT = 0.05
# How many ways to share out the time are kept; the rest lies between them.
KEPT = 2000

Trials = TypeVar("Trials")
Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


class Trial(NamedTuple):
    """What a method does in one transformer."""

    error: float  # mean square of the relative error of the network's output, after guidance
    seconds: float  # that it saves of a call of the network


class Unit(NamedTuple):
    """Blocks that get one method: those of a transformer, or one of a network that runs its blocks itself."""

    blocks: tuple[str, ...]  # names
    module: nn.Module  # that is timed

    def key(self, method: Method) -> str:
        """The name of a method here in `Tuning.trials`."""
        return f"{self.blocks[0]} {method}"


class Choice(NamedTuple):
    """A method or none for each transformer, and what they are expected to do together."""

    seconds: float  # saved
    error: float  # mean square
    methods: tuple[Method | None, ...]


@dataclass
class Tuning:
    """Measurements of one pipeline, which `solve` looks through.

    `trials` may be kept as JSON and given again, to go on where a run was stopped.
    """

    pipe: Any
    network: ImageNetwork
    units: list[Unit]
    calls: list[Call]  # recorded ones of the network, of steps that follow each other
    guidance: float  # 1: none
    draw: Callable[[], Any]  # pictures
    inputs: dict[str, Call] = field(default_factory=dict)  # a recorded call of each unit, by its first block
    plain: list[Tensor] = field(default_factory=list)  # outputs, after guidance
    seconds: float = math.nan  # of a plain call
    trials: dict[str, Trial] = field(default_factory=dict)

    def outputs(self) -> list[Tensor]:
        """Of the recorded calls, after guidance."""
        return [self.guided(_first(self.network.module(*args, **kwargs))) for args, kwargs in self.calls]

    def guided(self, output: Tensor) -> Tensor:
        if self.guidance == 1:
            return output
        without, text = output.chunk(2)
        return without + self.guidance * (text - without)

    def error(self) -> float:
        """Mean square of the relative error of the network as it is patched now, over steps that follow.

        Their errors are summed first: those that repeat add up in a picture, those that cancel do not.
        """
        plain = torch.stack(self.plain)
        apart = torch.stack(self.outputs()).sub(plain).sum(0).flatten(1).norm(dim=1)
        return float((apart / plain.transpose(0, 1).flatten(1).norm(dim=1)).square().mean())

    def choices(self, methods: Sequence[Method]) -> list[Choice]:
        """The best choices for all transformers: of the more time, the less error."""
        best = [Choice(0.0, 0.0, ())]
        for unit in self.units:
            ways: list[tuple[Method | None, Trial]] = [(None, Trial(0.0, 0.0))]
            ways += [(m, self.trials[k]) for m in methods if (k := unit.key(m)) in self.trials]
            best = front(
                Choice(c.seconds + trial.seconds, c.error + trial.error, (*c.methods, method))
                for c in best
                for method, trial in ways
            )
        return best

    def clock(self, unit: Unit) -> float:
        """Seconds of a call of a transformer as it is patched now."""
        args, kwargs = self.inputs[unit.blocks[0]]
        return least(lambda: unit.module(*args, **kwargs), self.plain[0].device)

    def recipe(self, choice: Choice) -> Recipe | None:
        """A choice as a recipe; None where it has no method at all."""
        named = zip(self.units, choice.methods, strict=True)
        methods = {name: method for unit, method in named if method is not None for name in unit.blocks}
        return Recipe(methods) if methods else None

    def speed(self, choice: Choice) -> float:
        """Expected speed of the network, in plain's."""
        # On a busy machine parts may seem to save more than the whole takes.
        return self.seconds / max(self.seconds - choice.seconds, LEFT * self.seconds)


def front(choices: Iterable[Choice]) -> list[Choice]:
    """Those of which no other one saves as much time with less error."""
    least, kept = math.inf, []
    for choice in sorted(choices, key=lambda c: (-c.seconds, c.error)):
        if choice.error < least:
            least = choice.error
            kept.append(choice)
    kept.reverse()
    return [*kept[: -1 : -(-len(kept) // KEPT)], kept[-1]]


def record(
    pipe: Any,
    prompts: str | Sequence[str] | Callable[[], Any] | None = None,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
) -> Tuning:
    """Records a plain run of a pipeline."""
    networks = find_networks(pipe)
    if any(patch_of(network.module) for network in networks):
        raise ValueError("tune measures against the plain model: remove_patch first")
    if (isinstance(pipe, nn.Module) or not callable(pipe)) and not callable(prompts):
        raise TypeError(
            f"{type(pipe).__name__} draws nothing by itself: give its pipeline, or a function that draws"
        )
    texts = texts_of(prompts)
    sizes = {
        name: options.integer(name, value, least=1)
        for name, value in (("height", height), ("width", width))
        if value is not None
    }
    if steps is not None:
        sizes["num_inference_steps"] = options.integer("steps", steps, least=1)

    def draw() -> Any:
        if callable(prompts):
            return prompts()
        generator = torch.Generator().manual_seed(0)
        return pipe(texts, generator=generator, output_type="np", **sizes)

    # That of a pipeline that decides about pictures is the last one to run, after its ControlNets.
    calls: list[tuple[ImageNetwork, Call, dict[str, Call]]] = []
    inside: dict[str, Call] = {}
    units = {network: units_of(network) for network in networks}

    with ExitStack() as hooks, torch.no_grad():
        for network in networks:

            def keep(
                module: nn.Module, args: Any, kwargs: Any, output: Any, network: ImageNetwork = network
            ) -> None:
                calls.append((network, (args, kwargs), dict(inside)))
                inside.clear()

            hooks.callback(network.module.register_forward_hook(keep, with_kwargs=True).remove)
            for unit in units[network]:

                def look(module: nn.Module, args: Any, kwargs: Any, unit: Unit = unit) -> None:
                    inside[unit.blocks[0]] = args, kwargs

                hooks.callback(unit.module.register_forward_pre_hook(look, with_kwargs=True).remove)
        draw()
    if not calls:
        raise ValueError(f"nothing was drawn: {', '.join(map(str, networks))} did not run")
    network = calls[-1][0]
    own = [(call, parts) for of, call, parts in calls if of is network]
    first = max(0, len(own) - RECORDED) // 2
    own = own[first : first + RECORDED]
    tuning = Tuning(pipe, network, units[network], [call for call, _ in own], guidance_of(pipe), draw)
    tuning.inputs = own[-1][1]
    with torch.no_grad():
        tuning.plain = tuning.outputs()
        tuning.seconds = least(tuning.outputs, tuning.plain[0].device) / len(own)
    return tuning


def guidance_of(pipe: Any) -> float:
    """How much the last run of a pipeline weighed its prompt; 1 where it had no guidance."""
    return float(pipe.guidance_scale) if getattr(pipe, "do_classifier_free_guidance", False) else 1.0


def texts_of(prompts: Any) -> list[str]:
    """Prompts as a list."""
    if prompts is None or callable(prompts):
        return list(PROMPTS)
    if not isinstance(prompts, Iterable):
        raise options.wrong_type("prompts", "a text, several or a function that draws", prompts)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    for text in texts:
        if not isinstance(text, str):
            raise options.wrong_type("each of prompts", "a text", text)
    if not texts:
        raise ValueError("prompts is empty: there is nothing to draw")
    return texts


def units_of(network: ImageNetwork) -> list[Unit]:
    """What may have a method of its own and does a share of the work."""
    units: list[tuple[Unit, float]] = []

    def same(site: Site) -> int:
        return id(site.module if site.container is network.module else site.container)

    for _, group in groupby(network.sites, key=same):
        sites = list(group)
        tokens = max(1, TOKENS // 4 ** sites[0].level)
        work = work_of(sites, tuple(sites[0].block.parts)).flops(tokens, tokens)
        units.append((Unit(tuple(map(network.path, sites)), sites[0].container), work))
    total = sum(work for _, work in units)
    return [unit for unit, work in units if work >= LEAST * total]


def measure(tuning: Tuning, methods: Sequence[Method], progress: bool = True) -> Iterator[Tuning]:
    """Tries each method in each transformer, and yields after each one that was not known."""
    left = [(u, m) for u in tuning.units for m in methods if u.key(m) not in tuning.trials]
    for unit, method in shown(left) if progress else left:
        with torch.no_grad():
            try:
                with patched(tuning.pipe, Recipe(dict.fromkeys(unit.blocks, method))):
                    error, seconds = tuning.error(), tuning.clock(unit)
            except ValueError:  # it cannot be had there
                error = seconds = math.inf
            saved = tuning.clock(unit) - seconds
        tuning.trials[unit.key(method)] = Trial(error, saved)
        yield tuning


def least(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, without what only the first one does."""
    call()
    return min(timed(call, device)[1] for _ in range(ROUNDS))


def _first(output: Any) -> Tensor:
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first


def shown(trials: Iterable[Trials]) -> Iterable[Trials]:
    """Trials with a bar, where tqdm is installed."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return trials
    bar: Iterable[Trials] = tqdm(trials, desc="tune", unit="trial")
    return bar
