"""tune: a method for each transformer that gives the nearest pictures for the time, by the user's weights.

A plain run is recorded. Then each transformer has each method alone: what error that makes in the network's
output after guidance, and what time it saves. Errors of different blocks are nearly independent, so their
squares add; with times that add as well, the best choice for all is a small knapsack. It is measured as a
whole in the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..maths.devices import timed
from ..methods import options
from ..methods.merge import Merge
from ..methods.merge_keys import MergeKeys
from ..methods.method import Method
from ..methods.recipe import Recipe
from ..methods.sample_keys import SampleKeys
from ..methods.stage import MergeStage
from ..patch import patched
from .extras import need
from .trials import ROUNDS, Choice, Tuning, measure, record

# What each transformer is tried with.
METHODS: tuple[Method, ...] = (
    *(Merge(ratio) for ratio in (0.5, 0.75)),
    Merge(0.9375, sx=4, sy=4),
    Merge(0.75, parts=("attn", "cross")),
    *(SampleKeys(ratio) for ratio in (0.5, 0.75, 0.9, 0.95)),
    *(SampleKeys(ratio, probes=32) for ratio in (0.75, 0.9)),
    *(MergeKeys(ratio) for ratio in (0.5, 0.75)),
    *(MergeStage(ratio) for ratio in (0.5, 0.75)),
)
# How far a wish may be missed when all is measured, how far surpassed, and how often that is mended.
SLACK, NEAR, TRIES = {"speed": 0.02, "error": 0.02, "psnr": 0.005}, 0.05, 4


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
    methods: Iterable[Method] | None = None,
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
    options.boolean("progress", progress)
    known = check_methods(methods)
    given = {"speed": speed, "error": error, "psnr": psnr}
    wish = Wish.of({name: limit for name, limit in given.items() if limit is not None})
    tuning = record(pipe, prompts, height, width, steps)
    for _ in measure(tuning, known, progress):
        pass
    return solve(tuning, known, wish)


def check_methods(methods: Iterable[Method] | None) -> tuple[Method, ...]:
    """What to try."""
    if methods is None:
        return METHODS
    if not isinstance(methods, Iterable) or isinstance(methods, str):
        raise options.wrong_type("methods", "several methods, such as [Merge(0.5)]", methods)
    known = tuple(methods)
    for method in known:
        if not isinstance(method, Method):
            raise options.wrong_type("each of methods", "a method such as Merge(0.5)", method)
    if not known:
        raise ValueError("methods is empty: there is nothing to try")
    return known


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
        if math.isinf(limit):
            raise ValueError(f"{name} must be a finite number, got {limit:g}")
        return cls(name, limit)


def solve(tuning: Tuning, methods: Sequence[Method], wish: Wish) -> Recipe:
    """The recipe that meets a wish, which is measured as a whole."""
    choices = tuning.choices(methods)
    fastest = choices[-1]
    aim, pictures = wish.limit, None
    if wish.name == "psnr":
        pictures, aim = pictures_of(tuning.draw()), 10 ** (-wish.limit / 20)
    met: dict[Choice, Recipe] = {}
    seen: dict[Choice, float] = {}  # and what was measured of it
    for _ in range(TRIES):
        fit = [c for c in choices if (tuning.speed(c) >= aim if wish.name == "speed" else c.error <= aim**2)]
        if not fit and seen and wish.name == "speed":  # it was slower than expected: the most that there is
            fit = [fastest]
        # Of the most speed that an error allows, or the least error that a speed allows.
        choice = None if not fit else fit[0] if wish.name == "speed" else fit[-1]
        recipe = None if choice is None else tuning.recipe(choice)
        if choice is None or recipe is None or choice in seen:
            break
        about = verify(tuning, recipe, pictures)
        expected = {"expected_speed": tuning.speed(choice), "expected_error": math.sqrt(choice.error)}
        figures = {key: float(f"{value:.4g}") for key, value in {**about, **expected}.items()}
        recipe = Recipe(recipe, figures)
        got = seen[choice] = about[wish.name]
        slack = SLACK[wish.name] * wish.limit
        if got <= wish.limit + slack if wish.name == "error" else got >= wish.limit - slack:
            met[choice] = recipe
            if abs(got / wish.limit - 1) < NEAR:
                break
        aim *= 10 ** ((got - wish.limit) / 20) if wish.name == "psnr" else wish.limit / got
    if met:  # of those that meet it the one that gives most of the other
        best = min if wish.name == "speed" else max
        return met[best(met, key=lambda choice: choice.seconds)]
    can = f"the fastest is expected to be {tuning.speed(fastest):.3g} times as fast, with an error of "
    can += f"{fastest.error**0.5:.2g}"
    if wish.name != "speed" and len(choices) > 1:
        can = f"the least error of a choice that saves time is {choices[1].error ** 0.5:.2g}; {can}"
    if seen:
        nearest = min(seen.values()) if wish.name == "error" else max(seen.values())
        can = f"the nearest of {len(seen)} that were tried has {nearest:.3g}; {can}"
    raise ValueError(f"no choice of {len(methods)} methods meets {wish.name}={wish.limit:g}: {can}")


def verify(tuning: Tuning, recipe: Recipe, pictures: Tensor | None = None) -> dict[str, float]:
    """Speed and error of a whole recipe, and with plain `pictures` how near its own are to them, in dB."""
    device, plain, tuned = tuning.plain[0].device, math.inf, math.inf
    with torch.no_grad():
        for _ in range(ROUNDS):
            plain = min(plain, timed(tuning.outputs, device)[1])
            with patched(tuning.pipe, recipe):
                tuned = min(tuned, timed(tuning.outputs, device)[1])
        with patched(tuning.pipe, recipe):
            about = {"speed": plain / tuned, "error": math.sqrt(tuning.error())}
            if pictures is not None:
                errors = (pictures_of(tuning.draw()) - pictures).square().flatten(1).mean(1)
                about["psnr"] = float(-10 * errors.clamp_min(1e-12).log10().mean())
    return about


def pictures_of(drawn: Any) -> Tensor:
    """What a pipeline drew, as floats of 0 to 1."""
    drawn = getattr(drawn, "images", getattr(drawn, "frames", drawn))
    np = need("numpy", "pictures_of")
    array = np.stack([np.asarray(picture) for picture in drawn])
    return torch.from_numpy(array / (255 if array.dtype == np.uint8 else 1)).float()
