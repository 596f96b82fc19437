"""How much of the ideal saving does merging take? One SD 1.5 full-resolution self-attention, block level.

    python scripts/bench.py [--sizes 64 96 128] [--dtypes float32 bfloat16] [--ratio 0.5] [--csv FILE]

Compared in one run, interleaved: plain (fused attention on all tokens), ideal (attention on tokens cut by
slicing, given back by repetition, no matching at all), ours with each kind of matching and with a plan made
before, and tomesd 0.1.3. Each figure is the share of the ideal saving that a way takes,
(plain - way) / (plain - ideal), of the medians and of the minima; on a busy machine trust the minima.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import peers
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor
from tqdm import tqdm

import tomesd
from tomesd.matching import match_exact, match_windowed
from tomesd.partition import Grid, cell_offsets

CHANNELS, HEADS, BATCH = 320, 8, 2


def tokens(side: int, dtype: torch.dtype, device: str) -> Tensor:
    """Tokens that resemble their neighbours, as those of an image do: `[2, side * side, 320]`."""
    coarse = torch.randn(BATCH, CHANNELS, max(1, side // 8), max(1, side // 8))
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    noisy = smooth + 0.3 * torch.randn_like(smooth)
    return noisy.flatten(2).mT.contiguous().to(device, dtype)


def ways(x: Tensor, attention: Attention, ratio: float) -> dict[str, Callable[[], Tensor]]:
    """Every way to compute the attention, the baselines first."""
    n = x.shape[1]
    side = int(n**0.5)
    r = int(ratio * n)
    grid = Grid(side, side)
    old = peers.load("tomesd", alias="tomesd_0_1_3").merge.bipartite_soft_matching_random2d
    generator = torch.Generator(x.device).manual_seed(0)

    def offsets() -> Tensor:
        return cell_offsets(grid.cells, 4, seed=0, device=x.device)

    def through(plan: tomesd.TokenMap) -> Tensor:
        return plan.unmerge(attention(plan.merge(x)))

    def ideal() -> Tensor:
        y = attention(x[:, : n - r])
        return (
            torch.cat([y, y], dim=1)[:, :n] if 2 * (n - r) >= n else y.repeat(1, -(-n // (n - r)), 1)[:, :n]
        )

    def tomesd_0_1_3() -> Tensor:
        merge, unmerge = old(x, side, side, 2, 2, r, generator=generator)
        return unmerge(attention(merge(x)))

    made = match_windowed(x, grid, grid.dst(offsets()), r)
    return {
        "plain": lambda: attention(x),
        "ideal": ideal,
        "tomesd 0.1.3": tomesd_0_1_3,
        "exact": lambda: through(match_exact(x, grid.partition(grid.dst(offsets())), r)),
        "windowed": lambda: through(match_windowed(x, grid, grid.dst(offsets()), r)),
        "plan reused": lambda: through(made),
    }


def measure(ways: dict[str, Callable[[], Tensor]], rounds: int, bar: tqdm) -> dict[str, list[float]]:
    """Seconds of each way, taken in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            begin = time.perf_counter()
            result = way()
            if result.is_cuda:
                torch.cuda.synchronize()
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - begin)
            bar.update()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 128], help="sides in tokens")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, help="write all figures there")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    bar = tqdm(total=len(args.sizes) * len(args.dtypes) * (args.rounds + 1) * 6, unit="run")
    with bar, torch.inference_mode():
        for dtype in args.dtypes:
            attention = Attention(CHANNELS, heads=HEADS, dim_head=CHANNELS // HEADS)
            attention = attention.to(args.device, getattr(torch, dtype))
            for side in args.sizes:
                x = tokens(side, getattr(torch, dtype), args.device)
                taken = measure(ways(x, attention, args.ratio), args.rounds, bar)
                median = {name: statistics.median(times) for name, times in taken.items()}
                least = {name: min(times) for name, times in taken.items()}
                for name, times in taken.items():
                    quantiles = statistics.quantiles(times, n=5)
                    rows.append(
                        {
                            "dtype": dtype,
                            "tokens": f"{side}x{side}",
                            "ratio": args.ratio,
                            "way": name,
                            "median_s": round(median[name], 5),
                            "p20_s": round(quantiles[0], 5),
                            "p80_s": round(quantiles[-1], 5),
                            "min_s": round(least[name], 5),
                            "share_median": share(median, name),
                            "share_min": share(least, name),
                        }
                    )
    where = f"{args.device} on {platform.machine()}, {torch.get_num_threads()} threads"
    environment = f"torch {torch.__version__}, {where}, commit {commit()}"
    columns = list(rows[0])
    print("  ".join(f"{column:>12}" for column in columns))
    for row in rows:
        print("  ".join(f"{row[column]!s:>12}" for column in columns))
    print(environment)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*columns, "environment"])
            writer.writeheader()
            writer.writerows({**row, "environment": environment} for row in rows)


def share(seconds: dict[str, float], name: str) -> float:
    return round((seconds["plain"] - seconds[name]) / (seconds["plain"] - seconds["ideal"]), 3)


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
