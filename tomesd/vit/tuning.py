"""tune: how many tokens each layer merges, searched on the user's model and pictures.

What merging does in a layer depends on what has merged before it, so errors of layers do not add, and each
schedule is judged as a whole. The search begins with the best of some shapes. Then a layer is given another
number, and a second one the least that the operations then allow. Most of what is drawn so is worse than what
is there, and a few pictures show it: only what is nearer on them is judged on twice as many.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..hosts.family import Network
from ..hosts.hooks import patch_of
from ..hosts.networks import find_networks
from ..hosts.vision import VisionFamily
from ..methods import options
from ..methods.cost import Work, layer_work
from ..methods.layers_patch import LayersPatch
from ..methods.schedule import R, parse_r
from ..tools.trials import shown
from .patch import apply_patch, remove_patch
from .schedules import Schedule

# So many exchanges are drawn for one that was not judged yet.
DRAWS = 100
# Pictures that are judged at once.
BATCH = 16
# So many pictures it takes to say whom one of them resembles, and how sharply that is told.
COMPANY, TEMPERATURE = 64, 0.1
# A logarithm of next to nothing.
NOTHING = -1e9

Images = Tensor | Callable[[], Any]


def tune(
    model: nn.Module,
    images: Images | Sequence[Images],
    flops: float = 0.5,
    *,
    trials: int = 50,
    progress: bool = True,
) -> Schedule:
    """Finds how many tokens each layer is to merge, so that a model returns what is nearest to plain.

        schedule = tome.tune(model, images, flops=0.5)  # some 500 of them, prepared for the model
        tome.apply_patch(model)
        model.r = schedule
        schedule.save("schedule.json")

    Pictures need no labels, and nothing is trained. The result is for this model and this size of pictures.
    A vector for each picture (features, logits) is judged by whom the picture resembles among the others, if
    there are 64 of them at least, and all else by its relative error.

    Args:
        model: holds one vision transformer. It is left as it was: a patched one is judged with the options
            of its patch, another one with the default ones.
        images: `[B, 3, H, W]`, or several such batches; or, for models that take more than images, functions
            that run the model on a batch each and return what is to stay near. By default that is each
            tensor that the model returns.
        flops: the operations of its blocks that may be left, a share of those without merging.
        trials: how long to search: as long as it takes to run the model so often on all images.
        progress: whether to show a bar, where tqdm is installed.

    Returns:
        A list for `model.r`. Its `about` has the share of the operations that is left, the relative error of
        what the model returns (the mean over pictures), and that of the schedule that the search began with:
        the best of constant, falling and rising ones, and of some that merge in the first layers only.

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
        operations = Operations.of(networks[0], patch, judge.batches[0])
        best, start = search(judge, operations, limit, shown(range(trials)) if progress else range(trials))
    if math.isinf(judge(best)):
        raise ValueError("nothing can be judged: what the model returns is not finite, or has no rows")
    figures = {
        "flops": operations.share(best),
        "error": judge(best),
        "error_by_hand": judge(start),
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
    best = start = reduce(judge.nearer, starts)
    chance, seen, until = random.Random(0), set(map(tuple, starts)), judge.ran
    for _ in trials:
        until += len(judge.batches)
        while judge.ran < until:
            drawn = (exchanged(best, operations, limit, chance) for _ in range(DRAWS))
            twice = (exchanged(r, operations, limit, chance) if chance.random() < 0.5 else r for r in drawn)
            new = next((r for r in twice if tuple(r) not in seen), None)
            if new is None:
                return best, start
            seen.add(tuple(new))
            best = judge.nearer(best, new)
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


class Resemblance:
    """Whom each picture resembles among all others, by features: softmax of cosines, standardised.

    What is done with features looks at what tells pictures apart, and not at what all of them have.

    Args:
        features: of all pictures, `[P, D]`.
    """

    def __init__(self, features: Tensor) -> None:
        std, self.mean = torch.std_mean(features, dim=0)
        self.scale = std.reciprocal().where(std > 0, 0)
        self.plain = self._unit(features)

    def lost(self, features: Tensor, first: int) -> Tensor:
        """How far others of the pictures from number `first` on are from that: KL divergence, `[n]`."""
        plain = self._shares(self.plain[first : first + len(features)], first)
        shares = self._shares(self._unit(features), first)
        return F.kl_div(shares, plain, reduction="none", log_target=True).sum(1)

    def _unit(self, features: Tensor) -> Tensor:
        return F.normalize((features - self.mean) * self.scale, dim=1)

    def _shares(self, unit: Tensor, first: int) -> Tensor:
        themselves = torch.arange(first, first + len(unit), device=unit.device)[:, None]
        return (unit @ self.plain.mT / TEMPERATURE).scatter(1, themselves, NOTHING).log_softmax(1)


class Judge:
    """How far what a model returns with a schedule is from plain, the mean over pictures.

    Vectors for each picture count by whom the picture resembles, if there are some to resemble; all else,
    such as features of patches, by its relative error.
    """

    def __init__(self, model: nn.Module, network: nn.Module, images: Any) -> None:
        given = list(images) if isinstance(images, list | tuple) else [images]
        if not given or not all(isinstance(batch, Tensor) or callable(batch) for batch in given):
            raise options.wrong_type("images", "a tensor, a function or a list of them", images)
        self.batches: list[Callable[[], Any]] = []
        for batch in given:
            if isinstance(batch, Tensor):
                self.batches += [partial(model, part) for part in batch.split(BATCH) if len(part)]
            else:
                self.batches.append(batch)
        if not self.batches:
            raise ValueError("nothing can be judged: there are no pictures")
        self.network: Any = network
        self.chance, self.ran = random.Random(0), 0
        self.known: dict[tuple[tuple[int | float, ...], int], Tensor] = {}
        self.plain = [self.returned([0], i) for i in range(len(self.batches))]
        if not all(self.plain):
            raise TypeError("the model returned no floating point tensor with a row for each picture")
        if len({len(returned) for returned in self.plain}) > 1:
            raise TypeError("the model returned more tensors for some of the pictures than for others")
        pictures = [len(returned[0]) for returned in self.plain]
        self.first = [0, *accumulate(pictures)]
        self.vectors = [
            number
            for number, output in enumerate(zip(*self.plain, strict=True))
            if all(x.dim() == 2 and len(x) == n for x, n in zip(output, pictures, strict=True))
        ]
        if self.first[-1] < COMPANY:
            self.vectors = []
        plain = [self._vectors_of(returned) for returned in self.plain] if self.vectors else []
        self.company = Resemblance(torch.cat(plain)) if plain else None

    def __call__(self, r: Sequence[int | float], batches: Iterable[int] | None = None) -> float:
        each = range(len(self.batches)) if batches is None else batches
        error = float(torch.cat([self.errors(r, i) for i in each]).mean())
        return math.inf if math.isnan(error) else error

    def nearer(self, old: list[int], new: list[int]) -> list[int]:
        """The new one if it is nearer to plain on a batch, on twice as many, and so on until all."""
        order = self.chance.sample(range(len(self.batches)), len(self.batches))
        count = 1
        while self(new, order[:count]) < self(old, order[:count]):
            if count >= len(order):
                return new
            count *= 2
        return old

    def errors(self, r: Sequence[int | float], batch: int) -> Tensor:
        """Those of what is returned for a batch, a row each."""
        key = tuple(r), batch
        if key not in self.known:
            self.ran += 1
            returned = self.returned(r, batch)
            outputs = enumerate(zip(returned, self.plain[batch], strict=True))
            errors = [
                relative_error(merged, plain)
                for number, (merged, plain) in outputs
                if number not in self.vectors
            ]
            if self.company is not None:
                errors.append(self.company.lost(self._vectors_of(returned), self.first[batch]))
            self.known[key] = torch.cat(errors)
        return self.known[key]

    def _vectors_of(self, returned: Sequence[Tensor]) -> Tensor:
        """Of each picture, side by side."""
        return torch.cat([returned[number] for number in self.vectors], dim=1)

    def returned(self, r: Sequence[int | float], batch: int) -> list[Tensor]:
        """What the model returns with a schedule, a row for each picture."""
        self.network.r = list(r)
        with torch.no_grad():
            return [tensor.float() for tensor in tensors_in(self.batches[batch]())]


def relative_error(merged: Tensor, plain: Tensor) -> Tensor:
    """Of each row, `[n]`."""
    distance, norm = (x.flatten(1).norm(dim=1) for x in (merged - plain, plain))
    error: Tensor = distance / norm.clamp_min(1e-12)
    return error


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

        numbers = range(self.tokens * len(self.works))
        number = bisect_left(numbers, True, key=lambda number: self.share(made(number)) <= limit)
        return made(number) if number in numbers else None


def made_by_hand(operations: Operations, limit: float) -> Iterator[list[int]]:
    """Schedules in shapes that people give them, at no more than a share of the operations."""
    layers = len(operations.works)
    shapes: tuple[Callable[[float], float], ...] = (
        lambda depth: 1,
        lambda depth: 1.5 - depth,
        lambda depth: 2 - 2 * depth,
        lambda depth: 0.08**depth,
        lambda depth: depth < 0.5,
        lambda depth: depth < 0.75,
        lambda depth: 0.5 + depth,
    )
    for shape in shapes:
        weights = [shape((layer + 0.5) / layers) for layer in range(layers)]
        made = operations.least(partial(spread, weights), limit)
        if made is not None:
            yield made


def spread(weights: Sequence[float], total: int) -> list[int]:
    """So many tokens over layers by their weights."""
    return [round(total * weight / sum(weights)) for weight in weights]


def exchanged(r: Sequence[int], operations: Operations, limit: float, chance: random.Random) -> list[int]:
    """A schedule with another number in one layer, and in a second one the least that meets the limit."""
    new, mean = list(r), sum(r) // len(r)
    one, other = chance.choices(range(len(r)), k=2)
    new[one] = max(0, new[one] + chance.choice((-1, 1)) * chance.randint(1, max(1, mean)))
    return operations.least(lambda number: [*new[:other], number, *new[other + 1 :]], limit) or list(r)
