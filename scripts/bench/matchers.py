"""Other ways to say which tokens of a vision transformer merge, beside ours: from formulas, in plain torch.

    alternating  every other token may leave, the most alike do, as in ToMe: ours
    energy       tokens that resemble many others merge, the others are kept (Tran et al., PiToMe, 2024)
    sizes        the smaller half may leave, in the later layers (after Lee and Choi, ATM, 2025)
    attention    what the class token attends to least goes: half of it is dropped, half merges with the most
                 alike of the rest (Chen et al., DiffRate, 2023, without the rates that it learns)
    ward         alternating, by what merging adds to the variance within groups (Ward, 1963)
    ranked       alternating, each with the most alike, and of these pairs those that ward wants most

All merge as many tokens in each layer and weigh them in attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tomesd import TokenMap
from tomesd.commands.common import UserError
from tomesd.maths.alternating import Step
from tomesd.methods import layers


class Given(NamedTuple):
    """What a way may look at, of the tokens that may merge."""

    likeness: Tensor  # cosines [B, N, N]
    sizes: Tensor  # [B, N]
    attention: Tensor | None  # of the class token to each, [B, N]
    r: int
    depth: float  # from 0 to 1


# Which tokens leave and which receive, [B, S] and [B, D], and how much each would join each, [B, S, D].
Sides = tuple[Tensor, Tensor, Tensor]


def alternating(given: Given) -> Sides:
    likeness = given.likeness
    places = torch.arange(likeness.shape[1], device=likeness.device).expand(len(likeness), -1)
    return sides(likeness, places[:, 1::2], places[:, ::2])  # as ours do behind one class token


def sides(likeness: Tensor, src: Tensor, dst: Tensor) -> Sides:
    rows = likeness.gather(1, src[..., None].expand(-1, -1, likeness.shape[2]))
    return src, dst, rows.gather(2, dst[:, None].expand(-1, src.shape[1], -1))


def by_energy(given: Given) -> Sides:
    margin, likeness = 0.9 - 0.9 * given.depth, given.likeness
    energy = torch.where(likeness >= margin, likeness, (likeness - margin).exp() - 1).mean(2)
    chosen = energy.argsort(dim=1, descending=True)[:, : 2 * given.r]
    return sides(likeness, chosen[:, ::2], chosen[:, 1::2])


def by_sizes(given: Given) -> Sides:
    if given.depth < 0.5:
        return alternating(given)
    order = given.sizes.argsort(dim=1, stable=True)
    half = order.shape[1] // 2
    return sides(given.likeness, order[:, :half], order[:, half:])


def by_attention(given: Given) -> Sides:
    assert given.attention is not None
    order = given.attention.argsort(dim=1)
    return sides(given.likeness, order[:, : given.r], order[:, given.r :])


def by_ward(given: Given) -> Sides:
    a, b = given.sizes[:, :, None], given.sizes[:, None]
    return alternating(given._replace(likeness=(given.likeness - 1) * a * b / (a + b)))


def by_rank(given: Given) -> Sides:
    src, dst, wish = alternating(given)
    dearer = by_ward(given)[2]
    nearest = wish.argmax(2, keepdim=True)
    return src, dst, torch.full_like(wish, -torch.inf).scatter(2, nearest, dearer.gather(2, nearest))


WAYS: dict[str, Callable[[Given], Sides]] = {
    "alternating": alternating,
    "energy": by_energy,
    "sizes": by_sizes,
    "attention": by_attention,
    "ward": by_ward,
    "ranked": by_rank,
}


def matched(
    way: str,
    metric: Tensor,
    sizes: Tensor,
    protected: int,
    r: int,
    depth: float,
    attention: Tensor | None = None,
) -> TokenMap:
    """Merges the `r` tokens that want it most, of tokens `[B, N, D]` of which the first ones never merge."""
    n, free = metric.shape[1], F.normalize(metric[:, protected:].float(), dim=-1)
    given = Given(free @ free.mT, sizes[:, protected:].float(), attention, r, depth)
    src, dst, wish = WAYS[way](given)
    best = wish.max(2)
    first = best.values.argsort(dim=1, descending=True, stable=True)[:, :r]
    joined = dst.gather(1, best.indices.gather(1, first))
    return TokenMap.from_pairs(n, src.gather(1, first) + protected, joined + protected)


def step(way: str, depth: float, qkv: Tensor | None, heads: int) -> Callable[..., Step]:
    """What takes the place of `merge_alternating`, in a layer whose attention had these `[B, N, 3 * C]`."""

    def merge(
        x: Tensor,
        size: Tensor,
        metric: Tensor,
        r: int,
        protected: int = 0,
        last: int = 0,
        mode: str = "mlerp",
    ) -> Step:
        size = size.expand(len(x), -1)
        attention = None
        if qkv is not None:
            q, k, _ = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).float()
            scores = (q[:, :, :1] @ k.mT)[:, :, 0] * q.shape[-1] ** -0.5 + size[:, None].log()
            attention = scores.softmax(-1).mean(1)[:, protected:]
        token_map = matched(way, metric, size, protected, r, depth, attention)
        if attention is not None:  # what is dropped has no weight in its group
            least = attention.argsort(dim=1)[:, : r // 2] + protected
            size = size.scatter(1, least, 0)
        tokens = token_map.merge(x, mode, size)
        return Step(token_map, tokens, token_map.merge(x, "drop"), token_map.merge(size, "sum"))

    return merge


@contextmanager
def merging(model: nn.Module, way: str) -> Iterator[None]:
    """Meanwhile tokens of a patched model merge in this way."""
    shipped: Any = layers.LayerHooks._merge
    seen: dict[int, Tensor] = {}
    attentions = []
    if way == "attention":
        attentions = [block.attn for block in getattr(model, "blocks", [])]
        if not attentions:
            raise UserError("the attention of the class token is seen in models of timm only")

    def merge(self: Any, own: Any, x: Tensor) -> Step | None:
        heads = attentions[self.layer].num_heads if attentions else 0
        matcher = step(way, self.layer / self.patch.layers, seen.get(self.layer), heads)
        with patch.object(layers, "merge_alternating", matcher):
            merged: Step | None = shipped(self, own, x)
        return merged

    def look(layer: int) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda part, args, qkv: seen.update({layer: qkv})

    with ExitStack() as stack:
        for layer, attention in enumerate(attentions):
            stack.callback(attention.qkv.register_forward_hook(look(layer)).remove)
        stack.enter_context(patch.object(layers.LayerHooks, "_merge", merge))
        yield
