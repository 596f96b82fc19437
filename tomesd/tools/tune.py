"""tune: a method for each transformer that gives the nearest pictures for the time, by the user's weights.

A plain run is recorded. Then each transformer has each method alone: what error that makes in the network's
output after guidance, and what time it saves. Errors of different blocks are nearly independent, so their
squares add; with times that add as well, the best choice for all is a small knapsack. It is measured as a
whole in the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from ..hosts.family import Site
from ..hosts.hooks import patch_of
from ..hosts.unets import find_networks
from ..methods import options
from ..methods.choice import ImageNetwork
from ..methods.cost import seconds_of, work_of
from ..methods.merge import Merge
from ..methods.merge_keys import MergeKeys
from ..methods.method import Method
from ..methods.recipe import Recipe
from ..methods.sample_keys import SampleKeys
from ..methods.stage import MergeStage
from ..patch import patched

# What each transformer is tried with.
METHODS: tuple[Method, ...] = (
    *(Merge(ratio) for ratio in (0.5, 0.75)),
    *(SampleKeys(ratio) for ratio in (0.5, 0.75, 0.9)),
    *(MergeKeys(ratio) for ratio in (0.5, 0.75)),
    *(MergeStage(ratio) for ratio in (0.5, 0.75)),
)
PROMPTS = ("a photograph of a cat", "a painting of a house by the sea")
RECORDED = 3  # steps of a run
ROUNDS = 3
# Of the finest level, by which work is compared.
TOKENS = 4096
# Transformers that do less of the work of all than this are left alone.
LEAST = 0.01
# How many ways to share out the time are kept; the rest lies between them.
KEPT = 2000
# How far a wish may be missed when all is measured, and how often it is mended.
SLACK, TRIES = 0.02, 4


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
    calls: list[Call]  # recorded ones of the network
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
        """Mean square of the relative error of the network as it is patched now."""
        pairs = zip(self.outputs(), self.plain, strict=True)
        squares = [((a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)) ** 2 for a, b in pairs]
        return float(torch.cat(squares).mean())

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
        return self.seconds / max(self.seconds - choice.seconds, 1e-9)


def front(choices: Iterable[Choice]) -> list[Choice]:
    """Those of which no other one saves as much time with less error."""
    least, kept = math.inf, []
    for choice in sorted(choices, key=lambda c: (-c.seconds, c.error)):
        if choice.error < least:
            least = choice.error
            kept.append(choice)
    kept.reverse()
    return [*kept[: -1 : -(-len(kept) // KEPT)], kept[-1]]


def tune(
    pipe: Any,
    prompts: str | Sequence[str] | Callable[[], Any] | None = None,
    *,
    speed: float | None = None,
    error: float | None = None,
    psnr: float | None = None,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    methods: Sequence[Method] | None = None,
    progress: bool = True,
) -> Recipe:
    """Finds a method for each transformer of a pipeline by measuring on its own weights.

        recipe = tomesd.tune(pipe, ["a cat", "a house"], speed=2.0)
        tomesd.apply_patch(pipe, recipe)
        recipe.save("recipe.json")

    The result is for this model, size, device and kernel of attention. It takes as long as some hundred steps
    of the network. Tune before torch.compile. ControlNets are left alone.

    Args:
        pipe: a diffusers pipeline with a network of a known family, not patched.
        prompts: what to draw meanwhile, a few; or, for pipelines that take more than prompts, a function that
            draws with `pipe` and returns what it drew.
        speed: how many times as fast as plain the network is to be, with the least error; by default 2.
        error: instead, how large the relative error of its output after guidance may be, in the least time.
        psnr: instead, how near in dB pictures are to be to plain ones, in the least time.
        height: of the pictures in pixels; by default what the model was made for.
        width: of the pictures in pixels.
        steps: of the sampler; by default those of the pipeline.
        methods: what to try, beside nothing.
        progress: whether to show a bar, where tqdm is installed.

    Returns:
        A recipe for `apply_patch`. Its `about` tells what is expected of it and what it did as a whole.

    Raises:
        TypeError: an option of the wrong type, or two wishes.
        ValueError: an option out of range; a pipeline that is patched or has nothing to patch; a wish that
            cannot be met, with what can.
    """
    known = check_methods(methods)
    given = {"speed": speed, "error": error, "psnr": psnr}
    wish = Wish.of({name: limit for name, limit in given.items() if limit is not None})
    tuning = record(pipe, prompts, height, width, steps)
    for _ in measure(tuning, known, progress):
        pass
    return solve(tuning, known, wish)


def check_methods(methods: Sequence[Method] | None) -> tuple[Method, ...]:
    """What to try."""
    for method in methods or ():
        if not isinstance(method, Method):
            raise options.wrong_type("each of methods", "a method such as Merge(0.5)", method)
    return METHODS if methods is None else tuple(methods)


class Wish(NamedTuple):
    """What a recipe is to reach."""

    name: str = "speed"
    limit: float = 2.0

    @classmethod
    def of(cls, given: dict[str, float]) -> Wish:
        """The one that was given.

        Raises:
            TypeError: there are several, or it is no number.
            ValueError: it is out of range.
        """
        if len(given) > 1:
            raise TypeError(f"one wish at a time: {' and '.join(given)} were given")
        if not given:
            return cls()
        ((name, value),) = given.items()
        limit, least_of = options.number(name, value), 1 if name == "speed" else 0
        if not limit > least_of:
            raise ValueError(f"{name} must be above {least_of}, got {limit:g}")
        return cls(name, limit)


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
    if isinstance(pipe, nn.Module) and not callable(prompts):
        raise TypeError("a network draws nothing by itself: give its pipeline, or a function that draws")
    texts = [prompts] if isinstance(prompts, str) else prompts
    sizes = {"height": height, "width": width, "num_inference_steps": steps}

    def draw() -> Any:
        if callable(prompts):
            return prompts()
        given = {name: value for name, value in sizes.items() if value is not None}
        generator = torch.Generator().manual_seed(0)
        return pipe(list(texts or PROMPTS), generator=generator, output_type="np", **given)  # type: ignore[arg-type]

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
    some = sorted({round(i * (len(own) - 1) / (RECORDED - 1)) for i in range(RECORDED)})
    tuning = Tuning(pipe, network, units[network], [own[i][0] for i in some], guidance_of(pipe), draw)
    tuning.inputs = own[some[len(some) // 2]][1]
    with torch.no_grad():
        tuning.plain = tuning.outputs()
        tuning.seconds = least(tuning.outputs, tuning.plain[0].device) / len(some)
    return tuning


def guidance_of(pipe: Any) -> float:
    """How much the last run of a pipeline weighed its prompt; 1 where it had no guidance."""
    return float(pipe.guidance_scale) if getattr(pipe, "do_classifier_free_guidance", False) else 1.0


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
    for unit, method in _shown(left) if progress else left:
        with torch.no_grad():
            try:
                with patched(tuning.pipe, Recipe(dict.fromkeys(unit.blocks, method))):
                    error, seconds = tuning.error(), tuning.clock(unit)
            except ValueError:  # it cannot be had there
                error = seconds = math.inf
            saved = tuning.clock(unit) - seconds
        tuning.trials[unit.key(method)] = Trial(error, saved)
        yield tuning


def solve(tuning: Tuning, methods: Sequence[Method], wish: Wish) -> Recipe:
    """The recipe that meets a wish, which is measured as a whole."""
    choices = tuning.choices(methods)
    fastest = choices[-1]
    aim, pictures = wish.limit, None
    if wish.name == "psnr":
        pictures, aim = pictures_of(tuning.draw()), 10 ** (-wish.limit / 20)
    for _ in range(TRIES):
        fit = [c for c in choices if (tuning.speed(c) >= aim if wish.name == "speed" else c.error <= aim**2)]
        # Of the most speed that an error allows, or the least error that a speed allows.
        choice = None if not fit else fit[0] if wish.name == "speed" else fit[-1]
        recipe = None if choice is None else tuning.recipe(choice)
        if choice is None or recipe is None:
            break
        about = verify(tuning, recipe, pictures)
        expected = {"expected_speed": tuning.speed(choice), "expected_error": math.sqrt(choice.error)}
        recipe.about = {key: float(f"{value:.4g}") for key, value in {**about, **expected}.items()}
        got = about[wish.name]
        if got >= wish.limit * (1 - SLACK) if wish.name != "error" else got <= wish.limit * (1 + SLACK):
            return recipe
        aim *= 10 ** ((got - wish.limit) / 20) if wish.name == "psnr" else wish.limit / got
    can = (
        f"the fastest is {tuning.speed(fastest):.3g} times as fast, with an error of {fastest.error**0.5:.2g}"
    )
    if wish.name != "speed" and len(choices) > 1:
        can = f"the least error of a choice that saves time is {choices[1].error ** 0.5:.2g}; {can}"
    raise ValueError(f"no choice of {len(methods)} methods meets {wish.name}={wish.limit:g}: {can}")


def verify(tuning: Tuning, recipe: Recipe, pictures: Tensor | None = None) -> dict[str, float]:
    """Speed and error of a whole recipe, and with plain `pictures` how near its own are to them, in dB."""
    device, plain, tuned = tuning.plain[0].device, math.inf, math.inf
    with torch.no_grad():
        for _ in range(ROUNDS):
            plain = min(plain, seconds_of(tuning.outputs, device))
            with patched(tuning.pipe, recipe):
                tuned = min(tuned, seconds_of(tuning.outputs, device))
        with patched(tuning.pipe, recipe):
            about = {"speed": plain / tuned, "error": math.sqrt(tuning.error())}
            if pictures is not None:
                errors = (pictures_of(tuning.draw()) - pictures).square().flatten(1).mean(1)
                about["psnr"] = float(-10 * errors.clamp_min(1e-12).log10().mean())
    return about


def pictures_of(drawn: Any) -> Tensor:
    """What a pipeline drew, as floats of 0 to 1."""
    drawn = getattr(drawn, "images", getattr(drawn, "frames", drawn))
    array = np.stack([np.asarray(picture) for picture in drawn])
    return torch.from_numpy(array / (255 if array.dtype == np.uint8 else 1)).float()


def least(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, without what only the first one does."""
    call()
    return min(seconds_of(call, device) for _ in range(ROUNDS))


def _first(output: Any) -> Tensor:
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first


def _shown(trials: list[tuple[Unit, Method]]) -> Iterable[tuple[Unit, Method]]:
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return trials
    bar: Iterable[tuple[Unit, Method]] = tqdm(trials, desc="tune", unit="trial")
    return bar
