"""Which tokens of a vision transformer merge: ours against other ways to match them, by real weights.

    python scripts/bench matching                            crops of photographs of scikit-image
    python scripts/bench matching --images FOLDER --r 16 24:-1

DINOv2 ViT-S/14. Relative errors of the class token and of the patches on their own grid, against the plain
model, in per cent: root of the mean square over pictures. All ways compare the same channels;
scripts/bench/matchers.py says whose they are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import dinov2
import torch
from eval_vit import known_setting, parse_setting
from matchers import WAYS, merging
from torch import Tensor, nn

import tomesd.vit as tome
from tomesd.commands.common import Parser, UserError, aligned, guarded, positive

PROGRAM = "python scripts/bench matching"
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")


def photographs(folder: Path | None, crops: int, side: int) -> Tensor:
    """Random square crops of photographs, `[n, 3, side, side]`, as DINOv2 takes them."""
    import numpy as np
    from PIL import Image

    if folder is None:
        import skimage.data

        found = [Image.fromarray(getattr(skimage.data, name)()) for name in PHOTOGRAPHS]
    else:
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        if not files:
            raise UserError(f"--images {folder} holds no .jpg, .jpeg or .png")
        found = [Image.open(file).convert("RGB") for file in files]
    draw = np.random.default_rng(0)
    rows = []
    for photo in found:
        for _ in range(crops):
            edge = int(min(photo.size) * draw.uniform(0.5, 1))
            x, y = (int(draw.integers(length - edge + 1)) for length in photo.size)
            crop = photo.crop((x, y, x + edge, y + edge)).resize((side, side), Image.Resampling.BICUBIC)
            rows.append(torch.from_numpy(np.asarray(crop).copy()).permute(2, 0, 1) / 255)
    return dinov2.normalised(torch.stack(rows))


@torch.inference_mode()
def features(model: nn.Module, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Class tokens and patches."""
    tokens = torch.cat([model.forward_features(part) for part in pictures.split(16)])
    return tokens[:, 0], tokens[:, 1:].flatten(1)


def run(arguments: Sequence[str] | None) -> int:
    parser = Parser(PROGRAM, __doc__)
    parser.add_argument("--images", type=Path, help="a folder (photographs of scikit-image)")
    parser.add_argument("--crops", type=positive, default=8, help="of each photograph (8)")
    parser.add_argument("--size", type=dinov2.side, default=224, help="pixels, a multiple of 14 (224)")
    parser.add_argument(
        "--r", type=known_setting, nargs="+", default=["10", "16", "16:-1"], help="as of eval-vit"
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--metric", choices=["tokens", "keys"], default="tokens", help="what is compared")
    args = parser.parse_args(arguments)
    model = dinov2.timm_model(args.size)
    pictures = photographs(args.images, args.crops, args.size)
    plain = features(model, pictures)
    tome.apply_patch(model, metric=args.metric)
    lines = [[f"{len(pictures)} pictures", "r", "class token", "patches"]]
    for r in args.r:
        model.r = parse_setting(r)
        for way in args.ways:
            with merging(model, way):
                merged = features(model, pictures)
            errors = (
                (ours - own).norm(dim=1) / own.norm(dim=1) for ours, own in zip(merged, plain, strict=True)
            )
            lines.append([way, r, *(f"{100 * error.square().mean().sqrt():.2f}" for error in errors)])
            print("  ".join(lines[-1]), flush=True)
    print(aligned(lines))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded(PROGRAM, lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
