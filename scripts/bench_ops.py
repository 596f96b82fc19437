"""What the two hot operations of a TokenMap cost against other ways to compute them.

    python scripts/bench_ops.py [--sizes 64 128] [--dtype float32] [--threads 1]

Milliseconds (minimum of interleaved runs) for 2 x side^2 tokens of 320 channels, of which a half merges.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F

from tomesd import TokenMap


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128], help="sides of the latents")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    for side in args.sizes:
        n, m, c = side * side, side * side // 2, 320
        order = torch.rand(2, n).argsort(1)
        dst = order[:, m:].gather(1, torch.randint(n - m, (2, m)))
        token_map = TokenMap.from_pairs(n, order[:, :m], dst)
        x = torch.randn(2, n, c).to(getattr(torch, args.dtype))
        y = token_map.merge(x)
        table, groups = x.flatten(0, 1), y.flatten(0, 1)
        flat = (token_map.index + token_map.groups * torch.arange(2)[:, None]).flatten()
        sizes = token_map.sizes.flatten()
        spread = flat[:, None].expand(-1, c)
        wide = token_map.index[..., None].expand(-1, -1, c)
        rows = flat.sort(stable=True).indices
        ways = {
            "merge": lambda x=x, t=token_map: t.merge(x),
            "  embedding_bag, mode mean": lambda r=rows, t=table, s=sizes: F.embedding_bag(
                r, t, s.cumsum(0) - s, mode="mean"
            ),
            "  index_add and division": lambda g=groups, f=flat, t=table, s=sizes: (
                torch.zeros_like(g).index_add_(0, f, t).div_(s[:, None])
            ),
            "  scatter_reduce, expanded index": lambda g=groups, i=spread, t=table: torch.zeros_like(
                g
            ).scatter_reduce(0, i, t, "mean", include_self=False),
            "unmerge": lambda y=y, t=token_map: t.unmerge(y),
            "  y[flat]": lambda g=groups, f=flat: g[f],
            "  torch.gather, expanded index": lambda y=y, i=wide: y.gather(1, i),
        }
        least = dict.fromkeys(ways, float("inf"))
        for _ in range(args.rounds):
            for name, way in ways.items():
                begin = time.perf_counter()
                way()
                least[name] = min(least[name], time.perf_counter() - begin)
        print(f"{side} x {side} latents, {args.dtype}, {args.threads} thread(s)")
        for name, seconds in least.items():
            print(f"  {name:36}{seconds * 1000:8.2f}")


if __name__ == "__main__":
    main()
