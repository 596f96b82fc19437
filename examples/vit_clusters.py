"""Draws which patches of a photo DINOv2 merges, layer by layer, and what of the photo is left.

    python examples/vit_clusters.py --images my.jpg                 # timm's weights, from the hub
    python scripts/bench dinov2 --out dinov2.pth                    # or the same ones without it
    python examples/vit_clusters.py --weights dinov2.pth

For each photo: above, the groups of merged patches in their mean colour after some layers; below, the photo
rebuilt from one mean patch for each group.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import skimage.data
import timm
import torch
from PIL import Image, ImageOps

import tomesd.vit as tome
from tomesd.commands.common import Parser, UserError, first_line, guarded, positive, ratio
from tomesd.commands.plot import new_picture
from tomesd.tools.vis import rebuilt

PROGRAM = "examples/vit_clusters.py"
PATCH, LAYERS = 14, 12


def photo(name: str, size: int) -> Image.Image:
    """A file, or one of scikit-image's photos, cut to a square of `size` pixels."""
    try:
        image = Image.open(name) if Path(name).exists() else Image.fromarray(getattr(skimage.data, name)())
    except (AttributeError, OSError, TypeError):
        raise UserError(f"argument --images: {name} is no picture, and no photo of scikit-image") from None
    return ImageOps.fit(image.convert("RGB"), (size, size), method=Image.Resampling.BICUBIC)


def whole_patches(text: str) -> int:
    """Pixels that whole patches cover."""
    return positive(text) // PATCH * PATCH or PATCH


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(PROGRAM, __doc__)
    photos = ["chelsea", "rocket", "coffee"]
    parser.add_argument("--images", nargs="+", default=photos, help="files, or photos of scikit-image")
    parser.add_argument(
        "--size", type=whole_patches, default=448, help="pixels, cut to a multiple of 14 (448)"
    )
    parser.add_argument("--share", type=ratio, default=0.95, help="of the tokens, merged at the end (0.95)")
    parser.add_argument(
        "--layers",
        type=int,
        choices=range(1, LAYERS + 1),
        nargs="+",
        default=[3, 6, 9, 12],
        metavar="LAYER",
        help="layers to draw, 1 to 12",
    )
    parser.add_argument("--weights", type=Path, help="file of timm's weights")
    parser.add_argument("--out", type=new_picture, default="clusters.jpg")
    args = parser.parse_args(arguments)

    source = {"file": str(args.weights)} if args.weights else None
    name = "vit_small_patch14_dinov2.lvd142m"
    try:
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=source, img_size=args.size)
    except (OSError, RuntimeError) as error:
        raise UserError(f"no weights from {args.weights or 'the hub'}: {first_line(error)}") from None
    tome.apply_patch(model.eval(), trace_source=True)
    side = args.size // PATCH
    model.r = round(args.share * side**2 / len(model.blocks))
    mean, std = (np.array(model.pretrained_cfg[name]) for name in ("mean", "std"))

    rows, columns = 2 * len(args.images), 1 + len(args.layers)
    size = (2.4 * columns, 2.4 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="compressed")
    for axis in axes.flat:
        axis.axis("off")
    for i, name in enumerate(args.images):
        image = photo(name, args.size)
        pixels = (np.asarray(image) / 255 - mean) / std
        with torch.inference_mode():
            model(torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None])
        axes[2 * i, 0].imshow(image)
        for layer, (above, below) in zip(args.layers, axes[2 * i : 2 * i + 2, 1:].T, strict=True):
            merged = tome.source(model, layer - 1)
            above.imshow(tome.make_visualization(image, merged, PATCH))
            above.set_title(f"layer {layer}: {merged.groups} of {merged.tokens} tokens", fontsize=8)
            below.imshow(rebuilt(image, merged, side, side))
    figure.savefig(args.out, dpi=110)
    print(f"{args.out}: r = {model.r}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(PROGRAM, main))
