"""Error of self-attention itself, by real weights: each method at equal products of queries and keys.

    python scripts/bench attention                       both models
    python scripts/bench attention --models dinov2 --fit     how the linear unmerge may be fitted

Two judges. The shipped model's two finest levels, over the steps of a run, and DINOv2 ViT-S/14 on photographs
of scikit-image at 672 pixels (2,304 patches, of which it looks at few). Figures are distances of attention's
output from the plain one's relative to its norm, means over blocks, steps and pictures. For DINOv2 also that
of the final features, with the method in all of its attentions.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import dinov2
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tomesd.commands import common
from tomesd.commands.common import Parser, aligned, guarded, need, say
from tomesd.commands.pipelines import EMOJI_MODEL
from tomesd.hosts.image import Image
from tomesd.maths import linear
from tomesd.maths.attention import key_bias
from tomesd.maths.probes import add_missed
from tomesd.maths.token_map import TokenMap
from tomesd.methods.merge import Merge
from tomesd.methods.merge_keys import MergeKeys
from tomesd.methods.sample_keys import SampleKeys

PROGRAM = "python scripts/bench attention"
MODELS = ("emoji", "dinov2")
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee")
SIDE = 672
STEPS = (0, 3, 6, 9)
PROMPTS = ("cat face", "pizza", "rocket", "owl")


class Layers(NamedTuple):
    """The weights of an attention, which is `softmax(scale * q k') v` in each head between linear layers."""

    q: Tensor  # [heads * D, C]
    q_bias: Tensor | None  # [heads * D]
    k: Tensor  # [heads * D, C]
    v: Tensor  # [heads * D, C]
    out: Tensor  # [E, heads * D]
    heads: int
    scale: float


@dataclass
class Case:
    """One self-attention and its tokens: `block` before and `x` after the norm, `[B, N, C]`."""

    judge: str
    block: Tensor
    x: Tensor
    layers: Layers
    biases: tuple[Tensor | None, Tensor | None, Tensor | None]  # of keys, values and outputs
    h: int
    w: int
    step: int  # which is what seeds depend on
    prefix: int = 0

    def attend(self, x: Tensor, keys: Tensor | None = None, sizes: Tensor | None = None) -> Tensor:
        """Attention of tokens to others, which count as often as their sizes."""
        keys, w = x if keys is None else keys, self.layers
        q = F.linear(x, w.q, w.q_bias)
        k, v = F.linear(keys, w.k, self.biases[0]), F.linear(keys, w.v, self.biases[1])
        heads = [z.unflatten(-1, (w.heads, -1)).transpose(1, 2) for z in (q, k, v)]
        bias = None if sizes is None else key_bias(sizes, x.dtype)
        y = F.scaled_dot_product_attention(*heads, attn_mask=bias, scale=w.scale)
        return F.linear(y.transpose(1, 2).flatten(2), w.out, self.biases[2])

    @property
    def image(self) -> Image:
        return Image(self.h, self.w, float(self.step))

    def plan(self, method: Any) -> TokenMap:
        """Which tokens merge; those before the patches of the image do not."""
        found = method.plan(self.block[:, self.prefix :], self.image)
        first = torch.arange(self.prefix).expand(found.index.shape[0], -1)
        return TokenMap(*(torch.cat([first, part + self.prefix], 1) for part in (found.index, found.keep)))

    def whole(self, y: Tensor, method: SampleKeys | MergeKeys) -> Tensor:
        """Adds what fewer keys missed, learned from probes."""
        probes = method.probes_of(self.image)
        if probes is None:
            return y
        probes = probes + self.prefix
        given = self.x[:, probes[0]]
        return add_missed(y, self.x, probes, given, self.attend(given, self.x) - y[:, probes[0]])


Way = Callable[[Case, float], Tensor]


def merge(case: Case, ratio: float, unmerge: Any = None, weigh: bool = True) -> Tensor:
    token_map = case.plan(Merge(ratio))
    merged = token_map.merge(case.x)
    y = case.attend(merged, sizes=token_map.sizes if weigh else None)
    return token_map.unmerge(y) if unmerge is None else unmerge(token_map, case.x, merged, y)


def sample(case: Case, ratio: float, probes: int = 64) -> Tensor:
    method = SampleKeys(ratio, probes=probes)
    return case.whole(case.attend(case.x, case.plan(method).merge(case.x, "drop")), method)


def merge_keys(case: Case, ratio: float, probes: int = 64) -> Tensor:
    method = MergeKeys(ratio, probes=probes)
    token_map = case.plan(method)
    return case.whole(case.attend(case.x, token_map.merge(case.x), token_map.sizes), method)


WAYS: dict[str, Way] = {
    'Merge, prop_attn=False, unmerge="copy"': lambda case, ratio: merge(case, ratio, weigh=False),
    'Merge, unmerge="copy"': merge,
    "Merge": lambda case, ratio: merge(case, ratio, linear.unmerge_linear),
    "SampleKeys, probes=0": lambda case, ratio: sample(case, ratio, 0),
    "SampleKeys": sample,
    "MergeKeys, probes=0": lambda case, ratio: merge_keys(case, ratio, 0),
    "MergeKeys": merge_keys,
}


def fitted(
    ridge: float = 0.1, tokens: int = 1 << 20, intercept: bool = True, sizes: bool = False
) -> Callable[[TokenMap, Tensor, Tensor, Tensor], Tensor]:
    """A linear unmerge by one ridge and without a judge, for the table of how to fit."""

    def unmerge(token_map: TokenMap, x: Tensor, merged: Tensor, y: Tensor) -> Tensor:
        every = -(-merged.shape[1] // tokens)
        given, wanted, weight = merged[:, ::every], y[:, ::every], token_map.sizes[:, ::every, None].float()
        weight = weight if sizes else torch.ones_like(weight)
        if intercept:
            share = weight / weight.sum(1, keepdim=True)
            given = given - (share * given).sum(1, keepdim=True)
            wanted = wanted - (share * wanted).sum(1, keepdim=True)
        gram = (weight * given).mT @ given
        size = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        root = torch.linalg.cholesky(gram + ridge * size * torch.eye(gram.shape[1]))
        apart = x - token_map.unmerge(merged)
        return token_map.unmerge(y) + apart @ torch.cholesky_solve((weight * given).mT @ wanted, root)

    return unmerge


def by_head(case: Case, ratio: float) -> Tensor:
    """A fit of each head's output on its queries, which needs to see inside of attention."""
    whole, w = case, case.layers
    token_map = whole.plan(Merge(ratio))
    merged = token_map.merge(case.x)
    inner = w._replace(out=torch.eye(w.q.shape[0]))
    inside = Case(case.judge, case.block, case.x, inner, (*case.biases[:2], None), case.h, case.w, case.step)
    y = inside.attend(merged, sizes=token_map.sizes).unflatten(-1, (w.heads, -1))
    queries, all_queries = (F.linear(z, w.q, w.q_bias).unflatten(-1, (w.heads, -1)) for z in (merged, case.x))
    outputs = [
        fitted()(token_map, all_queries[:, :, i], queries[:, :, i], y[:, :, i]) for i in range(w.heads)
    ]
    return F.linear(torch.cat(outputs, dim=2), w.out, case.biases[2])


FITS: dict[str, Way] = {
    **{f"ridge {r}": lambda c, ratio, r=r: merge(c, ratio, fitted(r)) for r in (0.01, 0.03, 0.1, 0.3, 1.0)},
    **{
        f"ridge 0.1, {n} tokens": lambda c, ratio, n=n: merge(c, ratio, fitted(0.1, n))
        for n in (128, 256, 512)
    },
    "ridge 0.1, no intercept": lambda c, ratio: merge(c, ratio, fitted(intercept=False)),
    "ridge 0.1, weighed by sizes": lambda c, ratio: merge(c, ratio, fitted(sizes=True)),
    "ridge 0.1, head by head": by_head,
    "as it is: 0.01 or 0.3, 213 tokens or more, judged by half as many": WAYS["Merge"],
}


def emoji_cases() -> Iterator[Case]:
    """Self-attention of the two finest levels of the shipped model, while it draws."""
    pipe = need("diffusers").DiffusionPipeline.from_pretrained(EMOJI_MODEL, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    found: list[Case] = []
    calls: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(0))

    def watch(block: nn.Module) -> None:
        tokens: list[Tensor] = []

        def note(attn: Any, args: Any, output: Tensor) -> None:
            (n, step), x = (args[0].shape[1], len(calls) - 1), args[0]
            if n >= 1024 and step in STEPS:
                layers = [layer.weight for layer in (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0])]
                q, k, v, out = layers
                side = int(n**0.5)
                biases = None, None, attn.to_out[0].bias
                weights = Layers(q, None, k, v, out, attn.heads, attn.scale)
                found.append(Case(f"emoji, {n:,} tokens", tokens[-1], x, weights, biases, side, side, step))

        block.norm1.register_forward_pre_hook(lambda module, args: tokens.append(args[0]))
        block.attn1.register_forward_hook(note)

    for module in pipe.unet.modules():
        if type(module).__name__ == "BasicTransformerBlock":
            watch(module)
    generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    pipe(
        list(PROMPTS), num_inference_steps=10, guidance_scale=3.0, generator=generators, output_type="latent"
    )
    yield from found


def dinov2_network() -> tuple[nn.Module, list[Any], list[Tensor]]:
    """The network, its layers and the photographs."""
    network, pictures = dinov2.transformers_model().eval(), dinov2.photographs(PHOTOGRAPHS, SIDE)
    return network, list(getattr(network, "encoder", network).get_submodule("layer")), pictures


def dinov2_case(layer: Any, number: int, block: Tensor, x: Tensor) -> Case:
    """Self-attention of a layer on tokens."""
    attn = layer.attention
    q, k, v, out = attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj
    heads = attn.config.num_attention_heads
    weights = Layers(q.weight, q.bias, k.weight, v.weight, out.weight, heads, (x.shape[2] // heads) ** -0.5)
    side = SIDE // dinov2.PATCH
    return Case("DINOv2", block, x, weights, (k.bias, v.bias, out.bias), side, side, number, prefix=1)


def dinov2_errors(ways: dict[str, Way], ratios: Sequence[float]) -> dict[tuple[str, float], list[float]]:
    """Errors of attention and of the final features."""
    network, layers, pictures = dinov2_network()
    blocks: dict[int, Tensor] = {}
    active: list[tuple[Way, float]] = []
    cases: list[Case] = []
    for number, layer in enumerate(layers):

        def enter(module: nn.Module, args: Any, number: int = number) -> None:
            blocks[number] = args[0]

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any, number: int = number) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            case = dinov2_case(layers[number], number, blocks[number], x)
            if not active:
                cases.append(case)
                return None
            way, ratio = active[0]
            return (way(case, ratio), *output[1:]) if isinstance(output, tuple) else way(case, ratio)

        layer.norm1.register_forward_pre_hook(enter)
        layer.attention.register_forward_hook(leave, with_kwargs=True)
    plain = [network(picture).last_hidden_state for picture in pictures]
    errors = errors_of(cases, ways, ratios)
    for (_, ratio, name), values in list(errors.items()):
        active.append((ways[name], ratio))
        ends = [
            distance(network(picture).last_hidden_state, y)
            for picture, y in zip(pictures, plain, strict=True)
        ]
        active.clear()
        errors["DINOv2's features", ratio, name] = ends
        assert values
    return errors


def distance(y: Tensor, plain: Tensor) -> float:
    return float(((y - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)).mean())


def errors_of(cases: Sequence[Case], ways: dict[str, Way], ratios: Sequence[float]) -> Any:
    errors: dict[tuple[str, float, str], list[float]] = {}
    for case in cases:
        plain = case.attend(case.x)
        for ratio in ratios:
            for name, way in ways.items():
                errors.setdefault((case.judge, ratio, name), []).append(distance(way(case, ratio), plain))
    return errors


@torch.no_grad()
def run(arguments: Sequence[str] | None) -> int:
    parser = Parser(PROGRAM, __doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--ratios", nargs="+", type=common.ratio, default=(0.5, 0.75))
    parser.add_argument("--fit", action="store_true", help="ways to fit the linear unmerge instead")
    args: argparse.Namespace = parser.parse_args(arguments)
    ways = FITS if args.fit else WAYS
    errors: dict[Any, list[float]] = {}
    if "emoji" in args.models:
        say("the shipped model")
        errors |= errors_of(list(emoji_cases()), ways, args.ratios)
    if "dinov2" in args.models:
        say("DINOv2")
        errors |= dinov2_errors(ways, args.ratios)
    judges = list(dict.fromkeys(judge for judge, *_ in errors))
    columns = [(judge, ratio) for judge in judges for ratio in args.ratios]
    lines = [["", *(f"{judge} {ratio:g}" for judge, ratio in columns)]]
    for name in ways:
        lines.append(
            [name, *(f"{statistics.mean(errors[judge, ratio, name]):.4f}" for judge, ratio in columns)]
        )
    print(aligned(lines))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded(PROGRAM, lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
