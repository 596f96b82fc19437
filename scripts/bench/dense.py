"""How near are the patches of a merged vision transformer to plain ones? DINOv2 ViT-S/14 on photographs.

    python scripts/bench dense                              336 pixels, a minute on one core
    python scripts/bench dense --side 518 --r 41 75 103 55:-1

For each r and each way to give tokens back: the distance of the final features of all patches from plain
ones relative to their norm, and the share of patches to which, of all plain ones, that of the same place is
nearest by cosine. Means over photographs of scikit-image.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, get_args

import dinov2
import torch
import torch.nn.functional as F
from eval_vit import known_setting, parse_setting
from torch import Tensor

import tomesd.vit as tome
from tomesd.commands.common import Parser, aligned, guarded
from tomesd.methods.layers_patch import Unmerge

PROGRAM = "python scripts/bench dense"
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")


def judge(patches: Tensor, plain: Tensor) -> tuple[float, float]:
    """The error of patches `[B, N, C]`, and how many are nearest to their own plain one."""
    error = (patches - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)
    nearest = (F.normalize(patches, dim=-1) @ F.normalize(plain, dim=-1).mT).argmax(-1)
    return float(error.mean()), float((nearest == torch.arange(plain.shape[1])).float().mean())


@torch.inference_mode()
def run(arguments: Sequence[str] | None) -> int:
    parser = Parser(PROGRAM, __doc__)
    parser.add_argument("--side", type=dinov2.side, default=336, help="pixels, a multiple of 14 (336)")
    parser.add_argument(
        "--r", type=known_setting, nargs="+", default=["17", "32", "43", "23:-1"], help="8, 8:-1 or 8,8,4"
    )
    args: argparse.Namespace = parser.parse_args(arguments)
    network: Any = dinov2.timm_model(args.side)
    pictures = torch.cat(dinov2.photographs(PHOTOGRAPHS, args.side))
    plain = network.forward_features(pictures)[:, network.num_prefix_tokens :]
    ways = get_args(Unmerge)
    lines = [["r", "tokens left", *(f"{what}, {way}" for what in ("error", "same") for way in ways)]]
    for r in args.r:
        figures = []
        for way in ways:
            tome.apply_patch(network, trace_source=True, unmerge=way).r = parse_setting(r)
            figures.append(judge(network.forward_features(pictures)[:, network.num_prefix_tokens :], plain))
        left = f"{tome.source(network).groups} of {tome.source(network).tokens}"
        columns = zip(*figures, strict=True)
        lines.append([r, left, *(f"{figure:.4f}" for column in columns for figure in column)])
    print(aligned(lines))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded(PROGRAM, lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
