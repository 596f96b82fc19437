"""What the hot operations cost against other ways to compute the same.

    python scripts/bench ops [--threads 1] [--device cuda --dtype bfloat16]

Milliseconds, minima of interleaved runs. Merging: 2 x side^2 tokens of 320 channels, of which a half merges.
Attention: 8 images in ViT-B's 12 heads of 64 channels, with keys that stand for several tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tomesd import TokenMap
from tomesd.commands.common import (
    DTYPES,
    Parser,
    environment,
    guarded,
    new_file,
    positive,
    threads,
    timed,
    write_csv,
)
from tomesd.commands.pipelines import pick_device
from tomesd.maths.attention import biased_attention
from tomesd.maths.linear import unmerge_linear

PROGRAM = "python scripts/bench ops"
Ways = dict[str, Callable[[], Tensor]]


def merging(side: int, dtype: torch.dtype, device: str) -> Ways:
    n, m, c = side * side, side * side // 2, 320
    order = torch.rand(2, n, device=device).argsort(1)
    dst = order[:, m:].gather(1, torch.randint(n - m, (2, m), device=device))
    token_map = TokenMap.from_pairs(n, order[:, :m], dst)
    x = torch.randn(2, n, c, device=device).to(dtype)
    y = token_map.merge(x)
    table, groups = x.flatten(0, 1), y.flatten(0, 1)
    flat = (token_map.index + token_map.groups * torch.arange(2, device=device)[:, None]).flatten()
    sizes = token_map.sizes.flatten()
    spread = flat[:, None].expand(-1, c)
    wide = token_map.index[..., None].expand(-1, -1, c)
    rows = flat.sort(stable=True).indices
    return {
        "merge": lambda: token_map.merge(x),
        "  embedding_bag, mode mean": lambda: F.embedding_bag(
            rows, table, sizes.cumsum(0) - sizes, mode="mean"
        ),
        "  index_add and division": lambda: (
            torch.zeros_like(groups).index_add_(0, flat, table).div_(sizes[:, None])
        ),
        "  scatter_reduce, expanded index": lambda: torch.zeros_like(groups).scatter_reduce(
            0, spread, table, "mean", include_self=False
        ),
        "unmerge": lambda: token_map.unmerge(y),
        "  y[flat]": lambda: groups[flat],
        "  torch.gather, expanded index": lambda: y.gather(1, wide),
        "  linear": lambda: unmerge_linear(token_map, x, y, y),
    }


def attention(tokens: int, dtype: torch.dtype, device: str) -> Ways:
    q, k, v = torch.randn(3, 8, 12, tokens, 64, device=device).to(dtype)
    size = torch.randint(1, 20, (8, tokens), device=device)
    bias = size.float().log()[:, None, None, :].to(dtype)

    def by_values() -> Tensor:
        weight = size[:, None, :, None].to(dtype).expand(-1, 12, -1, -1)
        values = torch.cat([v * weight, weight, v.new_zeros(*v.shape[:-1], 7)], -1)
        out = F.scaled_dot_product_attention(F.pad(q, (0, 8)), F.pad(k, (0, 8)), values, scale=64**-0.5)
        return out[..., :64] / out[..., 64:65]

    return {
        "attention": lambda: F.scaled_dot_product_attention(q, k, v),
        "  proportional, by a mask": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=bias),
        "  proportional, by channels of q and k": lambda: biased_attention(q, k, v, bias),
        "  proportional, by values and division": by_values,
        "  proportional, not fused": lambda: (q @ k.mT * 64**-0.5 + bias).softmax(-1) @ v,
    }


def measure(ways: Ways, rounds: int, device: str) -> dict[str, float]:
    least = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            least[name] = min(least[name], timed(way, device)[1])
    return least


def run(arguments: Sequence[str] | None) -> int:
    parser = Parser(PROGRAM, __doc__)
    parser.add_argument("--sizes", type=positive, nargs="*", default=[64, 128], help="sides of the latents")
    parser.add_argument(
        "--tokens", type=positive, nargs="*", default=[197, 577, 1025], help="tokens of the images"
    )
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=threads, default=1)
    parser.add_argument("--rounds", type=positive, default=15)
    parser.add_argument("--csv", type=new_file, help="write them there")
    args = parser.parse_args(arguments)
    args.device = str(pick_device(args.device))
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    cases = {f"{side} x {side} latents": (merging, side) for side in args.sizes}
    cases |= {f"{tokens} tokens": (attention, tokens) for tokens in args.tokens}
    where, rows = {"dtype": args.dtype, **environment(args.device)}, []
    for title, (build, size) in cases.items():
        print(f"{title}, {args.dtype}, {args.device}, {args.threads} thread(s)")
        with torch.inference_mode():
            for name, seconds in measure(build(size, dtype, args.device), args.rounds, args.device).items():
                print(f"  {name:42}{seconds * 1000:8.2f}")
                rows.append(
                    {"case": title, "operation": name.strip(), "milliseconds": seconds * 1000, **where}
                )
    if args.csv:
        write_csv(rows, args.csv)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded(PROGRAM, lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
