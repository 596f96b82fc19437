"""tune: how many tokens each layer merges, searched on the user's model and pictures.

What merging does in a layer depends on what has merged before it, so errors of layers do not add, and each
schedule is judged as a whole. The search begins with the best of some that are made by hand. In each trial a
layer is given another number, and a second layer the least that the operations then allow.
"""

from __future__ import annotations

import json
import math
import random
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..hosts.family import Network
from ..hosts.hooks import patch_of
from ..hosts.vision import VisionFamily
from ..hosts.vits import find_networks
from ..methods import options
from ..methods.cost import Work, layer_work
from ..methods.layers_patch import LayersPatch
from ..methods.schedule import R, parse_r
from ..tools.trials import shown
from .patch import apply_patch, remove_patch

# So many exchanges are drawn for one that was not judged yet.
DRAWS = 100


class Schedule(list[int | float]):
    """What merges in each layer, for `model.r`. `print` shows it as a table.

        schedule = tome.Schedule.load("schedule.json")
        model.r = schedule

    Args:
        r: a number of tokens, or a share of them, for each layer.
        about: what is known of it, such as what `tune` has measured, by name: plain JSON.

    Raises:
        TypeError, ValueError: `r` is no list that `parse_r` takes, or `about` is no dict of JSON.
    """

    def __init__(self, r: Iterable[int | float] = (), about: Mapping[str, Any] | None = None) -> None:
        if isinstance(r, Mapping | str) or not isinstance(r, Iterable):
            raise options.wrong_type("r", "a list, a number or a share for each layer", r)
        each = list(r)
        super().__init__(parse_r(len(each), each))
        if not isinstance(about, Mapping | None) or not all(isinstance(key, str) for key in about or {}):
            raise options.wrong_type("about", "a dict by names", about)
        try:
            self.about: dict[str, Any] = json.loads(json.dumps(dict(about or {})))
        except (TypeError, ValueError, RecursionError):
            raise options.wrong_type("about", "a dict of plain JSON", about) from None

    def __str__(self) -> str:
        about, left = dict(self.about), self.about.get("left")
        if isinstance(left, list) and len(left) == len(self):
            del about["left"]
        else:  # not of this schedule
            left = [""] * len(self)
        rows = [("layer", "r", "left"), *zip(range(1, len(self) + 1), self, left, strict=True)]
        lines = [f"{layer:>5}  {r:>5}  {n!s:>5}".rstrip() for layer, r, n in rows]
        known = [f"{key.replace('_', ' ')} {value}" for key, value in about.items()]
        return "\n".join([*lines, ", ".join(known)] if known else lines)

    def save(self, path: str | Path) -> None:
        """Writes the schedule to a file, as JSON."""
        data = {"r": list(self), "about": self.about}
        Path(path).write_text(json.dumps(data) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Schedule:
        """Reads what `save` has written. Files of strangers are safe: there is no code in them.

        Raises:
            OSError, ValueError, TypeError: it cannot be read, is no JSON, or no schedule.
        """
        data = options.read_json(path, "a schedule")
        if not isinstance(data, dict) or not isinstance(data.get("r"), list) or data.keys() - {"r", "about"}:
            raise TypeError(
                f'a schedule is described by {{"r": [8, 4, 2], "about": {{}}}}, got {options.shown(data)}'
            )
        return Schedule(data["r"], data.get("about"))


def tune(
    model: nn.Module,
    images: Tensor | Sequence[Tensor] | Callable[[], Any],
    flops: float = 0.5,
    *,
    trials: int = 200,
    progress: bool = True,
) -> Schedule:
    """Finds how many tokens each layer is to merge, so that a model returns what is nearest to plain.

        schedule = tome.tune(model, images, flops=0.5)  # some 100 of them, prepared for the model
        tome.apply_patch(model)
        model.r = schedule
        schedule.save("schedule.json")

    Pictures need no labels, and nothing is trained. The result is for this model and this size of pictures,
    and never further from plain than a constant r, `(r, -0.5)`, `(r, -1.0)`, a share, or the same r in the
    first half or three quarters of the layers, each at these operations.

    Args:
        model: holds one vision transformer. It is left as it was: a patched one is judged with the options
            of its patch, another one with the default ones.
        images: `[B, 3, H, W]`, or several such batches; or, for models that take more than images, a function
            that runs the model and returns what is to stay near. By default that is each tensor that the
            model returns.
        flops: the operations of its blocks that may be left, a share of those without merging.
        trials: how often the model is run on all images, beside the schedules made by hand.
        progress: whether to show a bar, where tqdm is installed.

    Returns:
        A list for `model.r`. Its `about` has the share of the operations that is left, the relative error of
        what the model returns (root of the mean square), and that of the best schedule made by hand.

    Raises:
        TypeError: an option of the wrong type, or nothing was returned that has a row for each picture.
        ValueError: an option out of range, operations that no schedule leaves, a model in training mode, or
            one that holds no or several vision transformers.
    """
    limit = options.number("flops", flops)
    if not 0 < limit < 1:
        raise ValueError(f"flops must be above 0 and below 1, the share that is left, got {limit:g}")
    trials = options.integer("trials", trials, least=0)
    networks = find_networks(model)
    if len(networks) > 1:
        names = ", ".join(map(str, networks))
        raise ValueError(
            f"{type(model).__name__} holds several vision transformers, pass one of them: {names}"
        )
    if model.training:
        raise ValueError("tune compares what a model returns: call model.eval() first")
    with merging(model, networks[0]) as patch:
        judge = Judge(model, networks[0].module, images)
        operations = Operations.of(networks[0], patch, judge.run)
        best, start = search(judge, operations, limit, shown(range(trials)) if progress else range(trials))
    if math.isinf(judge(best)):
        raise ValueError("nothing can be judged: there are no pictures, or what comes out is not finite")
    figures = {
        "flops": operations.share(best),
        "error": math.sqrt(judge(best)),
        "error_by_hand": math.sqrt(judge(start)),
    }
    about = {key: float(f"{value:.4g}") for key, value in figures.items()}
    return Schedule(best, {**about, "left": operations.left(best)})


def search(
    judge: Judge, operations: Operations, limit: float, trials: Iterable[int]
) -> tuple[list[int], list[int]]:
    """The best schedule at no more than a share of the operations, and the best of those made by hand."""
    starts = list(made_by_hand(operations, limit))
    if not starts:
        least = operations.share([operations.tokens] * len(operations.works))
        raise ValueError(f"no schedule leaves {limit:g} of the operations: {least:.3g} is the least")
    best = start = min(starts, key=judge)
    chance = random.Random(0)
    for _ in trials:
        drawn = (exchanged(best, operations, limit, chance) for _ in range(DRAWS))
        new = next((r for r in drawn if r is not None and tuple(r) not in judge.known), None)
        if new is None:
            break
        best = min(best, new, key=judge)
    return best, start


@contextmanager
def merging(model: nn.Module, network: Network[VisionFamily]) -> Iterator[LayersPatch]:
    """The patch of a model's network, whose own r may change meanwhile; one for the time, if it has none."""
    module = network.module
    patched = patch_of(module) is not None
    if not patched:
        apply_patch(model)
    patch: LayersPatch = patch_of(module)
    own = vars(module).get("r")  # the model that holds it may have it instead
    # What the user's own forward has merged is to stay what `source` shows.
    traced, patch.trace_source = patch.trace_source, False
    try:
        yield patch
    finally:
        patch.trace_source = traced
        vars(module).pop("r", None)
        if own is not None:
            module.r = own
        if not patched:
            remove_patch(model)


class Judge:
    """How far what a model returns with a schedule is from plain: mean square of the relative errors."""

    def __init__(self, model: nn.Module, network: nn.Module, images: Any) -> None:
        batches = [images] if isinstance(images, Tensor) else images
        is_some = (
            isinstance(batches, list | tuple) and batches and all(isinstance(b, Tensor) for b in batches)
        )
        if not callable(images) and not is_some:
            raise options.wrong_type("images", "a tensor, a list of tensors or a function", images)
        self.run = images if callable(images) else lambda: [model(batch) for batch in batches]
        self.network: Any = network
        self.known: dict[tuple[int | float, ...], float] = {}
        self.plain = self.returned([0])
        if not self.plain:
            raise TypeError("the model returned no floating point tensor with a row for each picture")

    def __call__(self, r: Sequence[int | float]) -> float:
        if tuple(r) not in self.known:
            errors = [
                (merged - plain).norm(dim=1) / plain.norm(dim=1).clamp_min(1e-12)
                for merged, plain in zip(self.returned(r), self.plain, strict=True)
            ]
            error = float(torch.cat(errors).square().mean())
            self.known[tuple(r)] = math.inf if math.isnan(error) else error
        return self.known[tuple(r)]

    def returned(self, r: Sequence[int | float]) -> list[Tensor]:
        """What the model returns with a schedule, a row for each picture."""
        self.network.r = list(r)
        with torch.no_grad():
            return [tensor.float().flatten(1) for tensor in tensors_in(self.run())]


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The floating point tensors that a model returned, in a container of any kind."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.dim() > 1:
            yield output
    elif isinstance(output, Mapping | list | tuple):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from tensors_in(part)


@dataclass(frozen=True)
class Operations:
    """What the blocks of a vision transformer cost for a picture, by what merges in them."""

    works: tuple[Work, ...]  # of each layer
    tokens: int
    fixed: int  # how many of them never merge

    @classmethod
    def of(cls, network: Network[VisionFamily], patch: LayersPatch, run: Callable[[], Any]) -> Operations:
        """Those of a patched network, which runs on pictures when `run` is called."""
        shapes: list[torch.Size] = []

        def look(block: nn.Module, args: Any, output: Any) -> None:
            shapes.extend(patch.turned(tokens).shape for tokens in tensors_in(output))

        handle = network.sites[0].module.register_forward_hook(look)
        try:
            with torch.no_grad():
                run()
        finally:
            handle.remove()
        if not shapes:
            raise ValueError(f"{network} did not run")
        _, tokens, channels = shapes[0]
        works = tuple(layer_work(site, channels) for site in network.sites)
        return cls(works, tokens, patch.protected + patch.last)

    def merged(self, r: Sequence[int | float]) -> list[int]:
        """How many tokens a schedule merges in each layer: at most half of those that may."""
        free, each = self.tokens - self.fixed, []
        for number in r:
            each.append(min(number if isinstance(number, int) else int(number * free), free // 2))
            free -= each[-1]
        return each

    def left(self, r: Sequence[int | float]) -> list[int]:
        """How many tokens are left after each layer."""
        return [self.tokens - n for n in accumulate(self.merged(r))]

    def share(self, r: Sequence[int | float]) -> float:
        """Of the operations without merging."""
        left = self.left(r)
        before = [self.tokens, *left]
        total = sum(map(Work.flops, self.works, before, left))
        return total / sum(work.flops(self.tokens, self.tokens) for work in self.works)

    def least(self, schedule: Callable[[int], R], limit: float) -> list[int] | None:
        """The schedule of the least number that leaves no more than a share, or None."""

        def made(number: int) -> list[int]:
            return self.merged(parse_r(len(self.works), schedule(number)))

        numbers = range(self.tokens)
        number = bisect_left(numbers, True, key=lambda number: self.share(made(number)) <= limit)
        return made(number) if number in numbers else None


def made_by_hand(operations: Operations, limit: float) -> Iterator[list[int]]:
    """Schedules as people write them, at no more than a share of the operations."""
    layers, tokens = len(operations.works), operations.tokens
    ways: tuple[Callable[[int], R], ...] = (
        lambda r: r,
        lambda r: (r, -0.5),
        lambda r: (r, -1.0),
        lambda r: r / (2 * tokens),
        lambda r: [r] * (layers // 2),
        lambda r: [r] * (3 * layers // 4),
    )
    for way in ways:
        made = operations.least(way, limit)
        if made is not None:
            yield made


def exchanged(
    r: Sequence[int], operations: Operations, limit: float, chance: random.Random
) -> list[int] | None:
    """A schedule with another number in one layer, and in a second one the least that meets the limit."""
    new, mean = list(r), sum(r) // len(r)
    one, other = chance.choices(range(len(r)), k=2)
    new[one] = max(0, new[one] + chance.choice((-1, 1)) * chance.randint(1, max(1, mean)))
    return operations.least(lambda number: [*new[:other], number, *new[other + 1 :]], limit)
