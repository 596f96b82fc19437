"""How much faster do timm's vision transformers run with merged tokens, and how much faster could they?

    python scripts/bench vit --csv vit.csv --plot vit.png     everything; meant for a GPU
    python scripts/bench vit --quick                          one small model, a minute on two cores
    python scripts/bench vit --models vit_large_patch16@384 --rs 23 23,-1 --batches 8 --compiled
    python scripts/bench vit --plot-only vit.csv --plot vit.png

Compared in one run, interleaved, with random weights that all ways share: plain (no patch, fused attention),
ours (tomesd.vit, with each of --variants) and ideal (tokens cut by slicing in the middle of each block, to as
many as ours has, with no matching, no bias and nothing given back). A speedup is plain / way and a share is
(plain - way) / (plain - ideal), of medians; it is left out where the ideal saves less than a twentieth. The
error is how far the output is from plain's, relative to its norm; of accuracy it says nothing.

By default r is 0.96 * tokens / layers, rounded: 16 for ViT-B and 8 for ViT-L at 224, 23 for ViT-L at 384, as
in the paper of ToMe. About half of the tokens are left in the middle and few at the end; the last layer may
merge fewer than r, as at most half of the tokens merge at once.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm

import tomesd.vit as tome
from tomesd.commands.common import (
    DTYPES,
    Parser,
    Row,
    UserError,
    environment,
    figures_table,
    guarded,
    new_file,
    positive,
    threads,
    view,
    write_csv,
)
from tomesd.commands.models import smooth
from tomesd.commands.pipelines import pick_device
from tomesd.commands.plot import new_picture
from tomesd.commands.runs import Run, measure, report

PROGRAM = "python scripts/bench vit"
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "prop_attn=False": {"prop_attn": False},
    "as-ToMe": {"metric": "keys", "mode": "mean"},
}
MODELS = ["vit_base_patch16", "vit_large_patch16", "vit_base_patch14_dinov2@518"]
# The first compiles and allocates, the second still finds cold caches.
WARM_UP = 2
WHAT = ("model", "size", "dtype", "batch", "compiled", "r", "tokens", "middle", "left")
FIGURES = ("median_s", "p20_s", "p80_s", "images_per_s", "speedup", "error", "share", "peak_mib")
FORMATS = {"images_per_s": ".1f", "speedup": ".3f", "error": ".4f", "share": ".3f", "peak_mib": ".0f"}


def merged(model: nn.Module, r: str, **options: Any) -> Any:
    """A view of the model that merges by `r`, a number or `r,inflection`."""
    number, _, inflection = r.partition(",")
    ours = tome.apply_patch(view(model), **options)
    ours.r = (int(number), float(inflection)) if inflection else int(number)
    return ours


def sliced(model: nn.Module, counts: list[int]) -> Any:
    """A view of the model that keeps the first `counts[i]` tokens after the attention of block i."""
    cut = view(model)
    for block, count in zip(cut.blocks, counts, strict=True):
        if type(block).__name__ != "Block":
            raise ValueError(f"the ideal is written for timm's Block, not for {type(block).__name__}")
        block.forward = functools.partial(sliced_forward, block, count)
    return cut


def sliced_forward(block: Any, count: int, x: Tensor) -> Tensor:
    x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
    x = x[:, :count]
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


@torch.inference_mode()
def token_counts(model: Any, r: str, tokens: int, image: Tensor) -> list[int]:
    """How many tokens ours has after each layer."""
    traced = merged(model, r, trace_source=True)
    traced(image)
    layers = range(len(model.blocks))
    # The forward of Block is restated above; should timm change its own, this shows.
    torch.testing.assert_close(sliced(model, [tokens for _ in layers])(image), model(image))
    return [tome.source(traced, layer).groups for layer in layers]


def bench(config: tuple[Any, ...], args: argparse.Namespace, bar: tqdm) -> list[Row]:
    """A row for each way to run one model."""
    (name, size), dtype, batch, r, compiled = config
    full = name if timm.is_model(name) else f"{name}_224"
    torch.manual_seed(0)  # here, so that eager and compiled are given the same
    model: Any = timm.create_model(full, img_size=size).to(args.device, getattr(torch, dtype)).eval()
    images = smooth(batch, 3, size, size, scale=32, noise=0.1).to(args.device, getattr(torch, dtype))
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    if r == "auto":
        r = str(round(0.96 * tokens / len(model.blocks)))
    counts = token_counts(model, r, tokens, images[:1])
    ways: dict[str, Any] = {"plain": model}
    ways |= {f"ours, {variant}": merged(model, r, **VARIANTS[variant]) for variant in args.variants}
    ways["ideal"] = sliced(model, counts)
    if compiled:
        # What was compiled before counts against the limit of recompilations. And without guards on hooks
        # torch runs what it compiled for one view for another that differs in nothing but hooks.
        torch.compiler.reset()
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        ways = {way: torch.compile(network) for way, network in ways.items()}
    runs = [Run(way, lambda network=network: network) for way, network in ways.items()]
    with torch.inference_mode():
        measure(runs, ((images,), {}), args.device, args.rounds, bar, WARM_UP)
    figures = report({run.name: run.seconds for run in runs if not run.note}, dict.fromkeys(ways, "ideal"))
    what = {"model": name, "size": size, "dtype": dtype, "batch": batch, "compiled": compiled, "r": r}
    what |= {"tokens": tokens, "middle": counts[len(counts) // 2 - 1], "left": counts[-1]}
    return [{**what, **row_of(run, figures.get(run.name, {}), batch)} for run in runs]


def row_of(run: Run, figures: Row, batch: int) -> Row:
    row: Row = {"way": run.name, **{name: figures.get(name) for name in ("median_s", "p20_s", "p80_s")}}
    row["images_per_s"] = batch / row["median_s"] if figures else None
    row |= {"speedup": figures.get("speed"), "error": run.error, "share": figures.get("share_median")}
    return {**row, "peak_mib": run.peak, "note": run.note}


def known_model(text: str) -> str:
    """A name of timm, with or without `_224`, and perhaps `@` and a side in pixels."""
    name, at, side = text.partition("@")
    if not (timm.is_model(name) or timm.is_model(f"{name}_224")):
        raise argparse.ArgumentTypeError(f"timm has no model {name}")
    if at and not side.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a name nor name@size, such as {name}@384")
    return text


def run_all(args: argparse.Namespace) -> list[Row]:
    split = [model.partition("@") for model in args.models]
    models = [(name, side) for name, _, at in split for side in ([int(at)] if at else args.sizes)]
    modes = [False, True] if args.compiled else [False]
    configs = list(itertools.product(models, args.dtypes, args.batches, args.rs, modes))
    where = environment(args.device, "timm")
    rows: list[Row] = []
    total = len(configs) * (len(args.variants) + 2) * (WARM_UP + args.rounds + 1)
    with tqdm(total=total, unit="run") as bar:
        for config in configs:
            bar.set_postfix_str(str(config))
            new = bench(config, args, bar)
            title = ", ".join(f"{key} {value}" for key, value in new[0].items() if key in WHAT)
            bar.write(f"{title}\n{figures_table('way', FIGURES, new, FORMATS)}\n")
            rows += [{**row, **where} for row in new]
            if args.csv:  # each time, as a long run may be stopped
                write_csv(rows, args.csv)
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    return rows


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Bars of the speedup of each way, a panel for each device, dtype and kind of running."""
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["median_s"]]
    for row in rows:
        kind = "compiled" if row["compiled"] == "True" else "eager"
        row["panel"] = f"{row['device']}, torch {row['torch']}, {row['dtype']}, {kind}"
        row["group"] = f"{row['model']}\n{row['size']} px, r = {row['r']}\nbatch {row['batch']}"
    panels, ways, groups = (list(dict.fromkeys(r[key] for r in rows)) for key in ("panel", "way", "group"))
    size = (max(7, 1.6 * len(groups)), 0.6 + 3 * len(panels))
    figure, axes = plt.subplots(len(panels), figsize=size, squeeze=False, layout="constrained")
    width = 0.8 / len(ways)
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        here = [row for row in rows if row["panel"] == panel]
        for i, way in enumerate(ways):
            # What was measured twice is drawn as it was measured last.
            bars = list({row["group"]: row for row in here if row["way"] == way}.values())
            x = [groups.index(row["group"]) + (i - (len(ways) - 1) / 2) * width for row in bars]
            columns = ("p80_s", "median_s", "p20_s", "speedup")
            *seconds, speed = torch.tensor([[float(row[key]) for row in bars] for key in columns])
            low, middle, high = (speed * seconds[1] / taken for taken in seconds)
            spread = torch.stack([middle - low, high - middle]).numpy()
            colour = {"plain": "0.8", "ideal": "0.5"}.get(way, f"C{i - 1}")
            axis.bar(x, middle, width, yerr=spread, label=way, color=colour, capsize=2, ecolor="0.2")
        axis.axhline(1, color="0.4", linewidth=0.8)
        axis.set_title(panel, fontsize=9)
        axis.set(ylabel="speed, plain = 1", xticks=range(len(groups)), xlim=(-0.5, len(groups) - 0.5))
        axis.set_xticklabels(groups, fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ways))
    figure.savefig(path, dpi=150)


def run(arguments: Sequence[str] | None) -> int:
    parser = Parser(PROGRAM, __doc__)
    parser.add_argument(
        "--models", type=known_model, nargs="+", default=MODELS, help="names of timm, or name@size"
    )
    parser.add_argument(
        "--sizes", type=positive, nargs="+", default=[224, 384], help="for models without @size"
    )
    parser.add_argument("--batches", type=positive, nargs="+", default=[1, 8, 64])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--rs", nargs="+", default=["auto"], help="auto, r or r,inflection")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS)[:2])
    parser.add_argument("--compiled", action="store_true", help="through torch.compile as well")
    parser.add_argument("--rounds", type=positive, default=10)
    parser.add_argument("--threads", type=threads, help="CPU threads of torch")
    parser.add_argument("--device", default="auto", help="(the best there is)")
    parser.add_argument("--csv", type=new_file, help="write all figures there")
    parser.add_argument("--plot", type=new_picture, help="draw the speedups there")
    parser.add_argument("--plot-only", type=Path, nargs="+", metavar="CSV", help="only draw these")
    parser.add_argument("--quick", action="store_true", help="ViT-S at 224, batch 8, float32, 5 rounds")
    args = parser.parse_args(arguments)
    if args.rounds < 2:
        raise UserError("--rounds has to be at least 2")
    if args.plot_only and not args.plot:
        raise UserError("--plot-only needs --plot")
    if args.quick:
        args.models, args.batches, args.dtypes, args.rounds = ["vit_small_patch16@224"], [8], ["float32"], 5
    if args.threads:
        torch.set_num_threads(args.threads)
    args.device = str(pick_device(args.device))
    timm.layers.set_fused_attn(True)
    if args.plot_only:
        rows = [row for path in args.plot_only for row in csv.DictReader(path.read_text().splitlines())]
    else:
        rows = [
            {key: "" if value is None else str(value) for key, value in row.items()} for row in run_all(args)
        ]
    if args.plot:
        plot(rows, args.plot)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded(PROGRAM, lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
