"""How much of the ideal saving does merging take?

    python scripts/bench.py                       one SD 1.5 full-resolution self-attention
    python scripts/bench.py --unet --sizes 96     the whole SD 1.5 UNet, full size, random weights

Compared in one run, interleaved: plain (fused attention on all tokens), ideal (tokens cut by slicing and
given back by repetition, no matching at all), ours with each kind of matching, and tomesd 0.1.3; at block
level also with a plan made before. A figure is the share of the ideal saving that a way takes,
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
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from tqdm import tqdm

import tomesd
from tomesd.matching import match_exact, match_windowed
from tomesd.partition import Grid, cell_offsets

CHANNELS, HEADS, BATCH = 320, 8, 2
Ways = dict[str, Callable[[], object]]


class Sliced:
    """What a TokenMap would do if finding out what to merge, and merging, were free."""

    is_identity = False

    def __init__(self, n: int, r: int) -> None:
        self.n, self.m = n, n - r

    def fits(self, x: Tensor) -> bool:
        return x.shape[1] == self.n

    def merge(self, x: Tensor) -> Tensor:
        return x[:, : self.m]

    def unmerge(self, y: Tensor) -> Tensor:
        return torch.cat([y] * -(-self.n // self.m), dim=1)[:, : self.n]


def tokens(side: int) -> Tensor:
    """Tokens that resemble their neighbours, as those of an image do: `[2, side * side, 320]`."""
    coarse = torch.randn(BATCH, CHANNELS, max(1, side // 8), max(1, side // 8))
    smooth = nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    return (smooth + 0.3 * torch.randn_like(smooth)).flatten(2).mT.contiguous()


def block_ways(side: int, dtype: torch.dtype, args: argparse.Namespace) -> Ways:
    """Every way to compute one self-attention."""
    x = tokens(side).to(args.device, dtype)
    attention = Attention(CHANNELS, heads=HEADS, dim_head=CHANNELS // HEADS).to(args.device, dtype)
    r = int(args.ratio * side * side)
    grid = Grid(side, side)
    old = peers.load("tomesd", alias="tomesd_0_1_3").merge.bipartite_soft_matching_random2d
    generator = torch.Generator(x.device).manual_seed(0)

    def dst() -> Tensor:
        return grid.dst(cell_offsets(grid.cells, 4, seed=0, device=x.device))

    def through(plan: tomesd.TokenMap | Sliced) -> Tensor:
        return plan.unmerge(attention(plan.merge(x)))

    def tomesd_0_1_3() -> Tensor:
        merge, unmerge = old(x, side, side, 2, 2, r, generator=generator)
        return unmerge(attention(merge(x)))

    made = match_windowed(x, grid, dst(), r)
    return {
        "plain": lambda: attention(x),
        "ideal": lambda: through(Sliced(side * side, r)),
        "tomesd 0.1.3": tomesd_0_1_3,
        "exact": lambda: through(match_exact(x, grid.partition(dst()), r)),
        "windowed": lambda: through(match_windowed(x, grid, dst(), r)),
        "plan reused": lambda: through(made),
    }


def unet_ways(side: int, dtype: torch.dtype, args: argparse.Namespace) -> Ways:
    """Every way to run one step of the whole UNet on both guidance halves."""
    # The configuration of SD 1.5 is the default but for the width of its text.
    unet = UNet2DConditionModel(cross_attention_dim=768, sample_size=side).to(args.device, dtype).eval()
    old = peers.load("tomesd", alias="tomesd_0_1_3")
    x = torch.randn(BATCH, 4, side, side, device=args.device, dtype=dtype)
    text = torch.randn(BATCH, 77, 768, device=args.device, dtype=dtype)
    timestep = torch.tensor(500, device=args.device)

    def cut(unet: nn.Module) -> None:
        tomesd.apply_patch(unet, args.ratio)
        unet._tomesd.plan = lambda x, layout: Sliced(x.shape[1], int(args.ratio * x.shape[1]))

    def way(
        patch: Callable[[nn.Module], object], remove: Callable[[nn.Module], object]
    ) -> Callable[[], Tensor]:
        def run() -> Tensor:
            patch(unet)
            output = unet(x, timestep, text).sample
            remove(unet)
            return output

        return run

    ours = tomesd.remove_patch
    return {
        "plain": way(ours, ours),
        "ideal": way(cut, ours),
        "tomesd 0.1.3": way(lambda unet: old.apply_patch(unet, args.ratio), old.remove_patch),
        "exact": way(lambda unet: tomesd.apply_patch(unet, args.ratio, matching="exact"), ours),
        "windowed": way(lambda unet: tomesd.apply_patch(unet, args.ratio, matching="windowed"), ours),
    }


def measure(ways: Ways, rounds: int, bar: tqdm) -> dict[str, list[float]]:
    """Seconds of each way, taken in turns; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            bar.set_postfix_str(name)
            begin = time.perf_counter()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
            bar.update()
    return seconds


def report(taken: dict[str, list[float]]) -> list[dict[str, object]]:
    """A row for each way."""
    median = {name: statistics.median(times) for name, times in taken.items()}
    least = {name: min(times) for name, times in taken.items()}
    rows = []
    for name, times in taken.items():
        quantiles = statistics.quantiles(times, n=5)
        rows.append(
            {
                "way": name,
                "median_s": f"{median[name]:.4f}",
                "p20_s": f"{quantiles[0]:.4f}",
                "p80_s": f"{quantiles[-1]:.4f}",
                "min_s": f"{least[name]:.4f}",
                "speed": f"{median['plain'] / median[name]:.2f}",
                "share_median": f"{share(median, name):.3f}",
                "share_min": f"{share(least, name):.3f}",
            }
        )
    return rows


def share(seconds: dict[str, float], name: str) -> float:
    return (seconds["plain"] - seconds[name]) / (seconds["plain"] - seconds["ideal"])


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--unet", action="store_true", help="the whole UNet")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 128], help="sides of the latents")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, help="write all figures there")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds has to be at least 2")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    make = unet_ways if args.unet else block_ways
    rows = []
    bar = tqdm(
        total=len(args.sizes) * len(args.dtypes) * (args.rounds + 1) * (5 if args.unet else 6), unit="run"
    )
    with bar, torch.inference_mode():
        for dtype in args.dtypes:
            for side in args.sizes:
                what = {"dtype": dtype, "latents": f"{side}x{side}", "ratio": args.ratio}
                taken = measure(make(side, getattr(torch, dtype), args), args.rounds, bar)
                rows += [{**what, **row} for row in report(taken)]
    where = f"{args.device} on {platform.machine()}, {torch.get_num_threads()} threads"
    environment = f"torch {torch.__version__}, {where}, commit {commit()}"
    print("  ".join(f"{column:>12}" for column in rows[0]))
    for row in rows:
        print("  ".join(f"{value!s:>12}" for value in row.values()))
    print(environment)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], "environment"])
            writer.writeheader()
            writer.writerows({**row, "environment": environment} for row in rows)


if __name__ == "__main__":
    sys.exit(main())
