"""Draws which patches of a photo DINOv2 merges, layer by layer, and what of the photo is left.

    python examples/vit_clusters.py --images my.jpg                 # timm's weights, from the hub
    python scripts/bench dinov2 --out dinov2.pth                    # or the same ones without it
    python examples/vit_clusters.py --weights dinov2.pth

For each photo: above, the groups of merged patches in their mean colour after some layers; below, the photo
rebuilt from one mean patch for each group.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import skimage.data
import timm
import torch
from PIL import Image, ImageOps

import tomesd.vit as tome
from tomesd.tools.vis import rebuilt

PATCH = 14


def photo(name: str, size: int) -> Image.Image:
    """A file, or one of scikit-image's photos, cut to a square of `size` pixels."""
    if Path(name).exists():
        image = Image.open(name).convert("RGB")
    else:
        image = Image.fromarray(getattr(skimage.data, name)())
    return ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    photos = ["chelsea", "rocket", "coffee"]
    parser.add_argument("--images", nargs="+", default=photos, help="files, or photos of scikit-image")
    parser.add_argument("--size", type=int, default=448, help="pixels, a multiple of 14")
    parser.add_argument("--share", type=float, default=0.95, help="of the tokens, merged at the end (0.95)")
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 6, 9, 12], help="layers to draw, from 1")
    parser.add_argument("--weights", type=Path, help="file of timm's weights")
    parser.add_argument("--out", type=Path, default=Path("clusters.jpg"))
    args = parser.parse_args(arguments)

    source = {"file": str(args.weights)} if args.weights else None
    name = "vit_small_patch14_dinov2.lvd142m"
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=source, img_size=args.size)
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


if __name__ == "__main__":
    main()
