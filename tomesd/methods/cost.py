"""What a method saves: FLOPs from layer shapes, and seconds measured on stand-ins, once for each shape.

Nothing of the host is called for this: stand-ins of the same layer shapes are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from operator import index
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..hosts.family import Site, submodule
from ..hosts.image import Image
from ..maths.devices import timed
from ..maths.probes import number_of_probes
from ..maths.token_map import TokenMap

# CLIP's context length, which cross-attention is taken to have.
TEXT_TOKENS = 77
# With more tokens than this self-attention outweighs windowed matching by far, and measuring would take long.
ALWAYS = 8192
ROUNDS = 7
# Seconds after which no further round begins.
PATIENCE = 0.3

# How many rows a layer sees: a number, all tokens of the image, or those that a method leaves.
Rows = int | Literal["all", "left"]
AnyMethod: TypeAlias = Any  # a method, which imports this module: it has `ratio`, `plan` and `left`


@dataclass(frozen=True)
class Work:
    """What runs on the tokens of an image: shapes of the layers, and nothing of their values."""

    linears: tuple[tuple[Rows, int, int], ...] = ()  # rows, channels in, channels out
    attentions: tuple[tuple[Rows, Rows, int, int], ...] = ()  # queries, keys, heads, channels of a head
    merges: int = 0  # how often tokens are merged and given back
    probes: int = 0  # the most tokens that run the same again, with all keys

    def flops(self, tokens: int, left: int) -> float:
        """Floating point operations for an image of so many tokens, of which so many are left."""
        probes = number_of_probes(self.probes, tokens) if left < tokens else 0
        return self._flops(tokens, left) + (self._flops(probes, tokens) if probes else 0)

    def _flops(self, tokens: int, left: int) -> float:
        total = sum(2.0 * count(rows, tokens, left) * a * b for rows, a, b in self.linears)
        for queries, keys, heads, channels in self.attentions:
            total += 4 * count(queries, tokens, left) * count(keys, tokens, left) * heads * channels
        return total


def count(rows: Rows, tokens: int, left: int) -> int:
    return rows if isinstance(rows, int) else tokens if rows == "all" else left


def work_of(
    sites: Iterable[Site], parts: Sequence[str], queries: Literal["all", "left"] = "left", merges: int = 1
) -> Work:
    """What the `parts` (of `attn`, `cross`, `mlp`) of some blocks are; their keys are those left."""
    linears: list[tuple[Rows, int, int]] = []
    attentions: list[tuple[Rows, Rows, int, int]] = []
    for site in sites:
        for name in parts:
            part: Any = site.part(name)
            if part is None:
                continue
            if name == "mlp":
                linears += _linears(part, "left")
                continue
            keys: Rows = TEXT_TOKENS if site.sees_text(name) else "left"
            row = site.block.parts[name]
            middle: list[Rows] = [keys] * (len(row.layers) - 2)
            seen: list[Rows] = [queries, *middle, queries]
            layers = [
                _linears(submodule(part, path), rows) for path, rows in zip(row.layers, seen, strict=True)
            ]
            linears += chain.from_iterable(layers)
            heads = getattr(part, row.heads, None)
            if heads and layers[-1]:
                attentions.append((queries, keys, heads, layers[-1][0][1] // heads))
    return Work(tuple(linears), tuple(attentions), merges)


def layer_work(site: Site, channels: int) -> Work:
    """What a block of a vision transformer is: attention, and the rest on the tokens left after it."""
    before: Rows = "left" if site.block.middle == "" else "all"
    # With what it holds beside attention proper, such as the layer after it.
    attn = submodule(site.module, site.block.attn.path.split(".")[0])
    others = [] if attn is site.module else [part for part in site.module.children() if part is not attn]
    linears = [*_linears(attn, before), *(shape for part in others for shape in _linears(part, "left"))]
    return Work(tuple(linears), ((before, before, 1, channels),))


def _linears(module: nn.Module | None, rows: Rows) -> list[tuple[Rows, int, int]]:
    if module is None:
        return []
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        packed: Any = module  # or adapted: its weights need not be of that shape
        return [(rows, packed.in_features, packed.out_features)]
    found = [shapes for child in module.children() for shapes in _linears(child, rows)]
    own = (parameter.shape for parameter in module.parameters(recurse=False) if parameter.dim() > 1)
    return [*((rows, shape[1], shape[0]) for shape in own), *found]


@dataclass(frozen=True)
class Timing:
    """Seconds of some work without and with merging, the planning included."""

    plain: float
    merged: float

    @property
    def pays(self) -> bool:
        return self.merged < self.plain

    def __str__(self) -> str:
        return f"measured {self.merged * 1000:.3g} ms with merging, {self.plain * 1000:.3g} ms without"


class PlanIfItPays:
    """Plans by a method where that makes its work faster, else merges nothing (`auto=True`)."""

    def __init__(self, method: AnyMethod, work: Work) -> None:
        self.method = method
        # A seed takes no time.
        self.question = work, replace(method, seed=0) if hasattr(method, "seed") else method

    def __call__(self, x: Tensor, image: Image) -> TokenMap:
        # torch.compile may take the sides of an image as unknown; the answer is for these ones.
        shape = index(image.h), index(image.w), index(x.shape[0])
        if x.device.type == "meta" or pays(*self.question, *shape, x.dtype, x.device):
            plan: TokenMap = self.method.plan(x, image)
            return plan
        return TokenMap.identity(x.shape[1], x.device)

    def loss(self, h: int, w: int, batch: int, weight: Tensor) -> str | None:
        """Why nothing merges in images of this size, or None if it does."""
        question = *self.question, h, w, batch, weight.dtype, weight.device
        if weight.device.type == "meta" or pays(*question):
            return None
        return f"it would be slower: {timing(*question)}"


def pays(
    work: Work, method: AnyMethod, h: int, w: int, batch: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether a method makes this work on an image of `h * w` tokens faster."""
    large = h * w > ALWAYS and method.ratio >= 0.25 and getattr(method, "matching", None) != "exact"
    if not work.linears or (large and any(isinstance(keys, str) for _, keys, *_ in work.attentions)):
        return True
    return timing(work, method, h, w, batch, dtype, device).pays


@cache
def timing(
    work: Work, method: AnyMethod, h: int, w: int, batch: int, dtype: torch.dtype, device: torch.device
) -> Timing:
    """Measures some work on an image, in turns, and keeps the minima: a process measures each shape once."""
    # What counts, traces or fakes the host's operations has nothing to do with these.
    with _disable_current_modes(), torch.no_grad():
        ways = _ways(work, method, h, w, batch, dtype, device)
        for way in ways:
            way()
        taken: list[tuple[float, ...]] = []
        while len(taken) < ROUNDS and sum(map(sum, taken)) < PATIENCE:
            taken.append(tuple(timed(way, device)[1] for way in ways))
    plain, merged = (min(seconds) for seconds in zip(*taken, strict=True))
    return Timing(plain, merged)


def _ways(
    work: Work, method: AnyMethod, h: int, w: int, batch: int, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Two callables that do the work of one image without and with merging."""

    def fill(*shape: int) -> Tensor:
        return torch.arange(math.prod(shape), device=device).sin().to(dtype).view(shape)

    n = h * w
    x = fill(batch, n, work.linears[0][1])
    weights = {(a, b): fill(b, a) for _, a, b in work.linears}

    def layers(n: int, left: int) -> Callable[[], None]:
        inputs = {(kind, a): fill(batch, count(kind, n, left), a) for kind, a, _ in work.linears}
        heads = {
            (kind, h, c): fill(batch, h, count(kind, n, left), c)
            for *both, h, c in work.attentions
            for kind in both
        }

        def run() -> None:
            for kind, a, b in work.linears:
                F.linear(inputs[kind, a], weights[a, b])
            for queries, keys, h, c in work.attentions:
                k = heads[keys, h, c]
                F.scaled_dot_product_attention(heads[queries, h, c], k, k)

        return run

    run_all, run_left = layers(n, n), layers(n, method.left(h, w))
    run_probes = layers(probes, n) if (probes := number_of_probes(work.probes, n)) else None
    image = Image(h, w, device=device)  # what blocks share is made once for all of them

    def merged() -> None:
        token_map = method.plan(x, image)
        for _ in range(work.merges):
            token_map.unmerge(token_map.merge(x))
        if not work.merges:
            token_map.merge(x, "drop")
        run_left()
        if run_probes is not None:
            run_probes()

    return run_all, merged
