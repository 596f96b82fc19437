"""Which tokens of a vision transformer merge: ours against other ways to match them, by real weights.

    python scripts/bench matching                            crops of photographs of scikit-image
    python scripts/bench matching --images FOLDER --r 16 24:-1

DINOv2 ViT-S/14. Relative errors of the class token and of the patches on their own grid, against the plain
model, in per cent: root of the mean square over pictures. All ways compare the same channels, merge as many
tokens in each layer by the same rule, and weigh them in attention.

    alternating  every other token may leave, the most alike do, as in ToMe: ours
    energy       tokens that resemble many others merge, the others are kept (Tran et al., PiToMe, 2024)
    sizes        the smaller half may leave, in the later layers (after Lee and Choi, ATM, 2025)
    ward         alternating, by what merging adds to the variance within groups (Ward, 1963)
    ranked       alternating, each with the most alike, and of these pairs those that ward wants most
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dinov2
import torch
import torch.nn.functional as F
from eval_vit import parse_setting
from torch import Tensor, nn

import tomesd.vit as tome
from tomesd import TokenMap
from tomesd.commands.common import Parser, UserError, aligned, guarded, positive
from tomesd.methods import layers

PROGRAM = "python scripts/bench matching"
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
# Which tokens leave and which receive, [B, S] and [B, D], and how much each would join each, [B, S, D].
Sides = tuple[Tensor, Tensor, Tensor]


def alternating(likeness: Tensor, sizes: Tensor, r: int, depth: float) -> Sides:
    places = torch.arange(likeness.shape[1]).expand(len(likeness), -1)
    return sides(likeness, places[:, 1::2], places[:, ::2])  # as ours do behind one class token


def sides(likeness: Tensor, src: Tensor, dst: Tensor) -> Sides:
    rows = likeness.gather(1, src[..., None].expand(-1, -1, likeness.shape[2]))
    return src, dst, rows.gather(2, dst[:, None].expand(-1, src.shape[1], -1))


def by_energy(likeness: Tensor, sizes: Tensor, r: int, depth: float) -> Sides:
    margin = 0.9 - 0.9 * depth
    energy = torch.where(likeness >= margin, likeness, (likeness - margin).exp() - 1).mean(2)
    chosen = energy.argsort(dim=1, descending=True)[:, : 2 * r]
    return sides(likeness, chosen[:, ::2], chosen[:, 1::2])


def by_sizes(likeness: Tensor, sizes: Tensor, r: int, depth: float) -> Sides:
    if depth < 0.5:
        return alternating(likeness, sizes, r, depth)
    order = sizes.argsort(dim=1, stable=True)
    half = order.shape[1] // 2
    return sides(likeness, order[:, :half], order[:, half:])


def by_ward(likeness: Tensor, sizes: Tensor, r: int, depth: float) -> Sides:
    a, b = sizes[:, :, None].float(), sizes[:, None].float()
    return alternating((likeness - 1) * a * b / (a + b), sizes, r, depth)


def by_rank(likeness: Tensor, sizes: Tensor, r: int, depth: float) -> Sides:
    src, dst, wish = alternating(likeness, sizes, r, depth)
    dearer = by_ward(likeness, sizes, r, depth)[2]
    nearest = wish.argmax(2, keepdim=True)
    return src, dst, torch.full_like(wish, -torch.inf).scatter(2, nearest, dearer.gather(2, nearest))


WAYS: dict[str, Callable[[Tensor, Tensor, int, float], Sides]] = {
    "alternating": alternating,
    "energy": by_energy,
    "sizes": by_sizes,
    "ward": by_ward,
    "ranked": by_rank,
}


def matched(way: str, metric: Tensor, sizes: Tensor, protected: int, r: int, depth: float) -> TokenMap:
    """Merges the `r` tokens that want it most, of tokens `[B, N, D]` of which the first ones never merge."""
    n, free = metric.shape[1], F.normalize(metric[:, protected:], dim=-1)
    src, dst, wish = WAYS[way](free @ free.mT, sizes[:, protected:], r, depth)
    best = wish.max(2)
    first = best.values.argsort(dim=1, descending=True, stable=True)[:, :r]
    joined = dst.gather(1, best.indices.gather(1, first))
    return TokenMap.from_pairs(n, src.gather(1, first) + protected, joined + protected)


def merging(way: str) -> Callable[[Any, layers.LayerCall, Tensor], Tensor]:
    """A `LayerHooks._merge` that matches in this way."""

    def merge(self: Any, own: layers.LayerCall, x: Tensor) -> Tensor:
        patch, (b, n, _) = self.patch, x.shape
        r = min(int(own.r), (n - patch.protected) // 2)
        if r <= 0:
            return x
        sizes = torch.ones(b, n, dtype=torch.long) if own.size is None else own.size.expand(b, -1)
        metric = x[..., : layers.CHANNELS].float() if own.metric is None else own.metric.float()
        own.map = matched(way, metric, sizes, patch.protected, r, self.layer / patch.layers)
        return own.map.merge(x, patch.method.mode, None if own.size is None else sizes)

    return merge


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
    parser.add_argument("--size", type=positive, default=224, help="pixels, a multiple of 14 (224)")
    parser.add_argument("--r", nargs="+", default=["10", "16", "16:-1"], help="as of eval-vit")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--metric", choices=["tokens", "keys"], default="tokens", help="what is compared")
    args = parser.parse_args(arguments)
    model = dinov2.timm_model(args.size)
    pictures = photographs(args.images, args.crops, args.size)
    plain = features(model, pictures)
    tome.apply_patch(model, metric=args.metric)
    shipped = layers.LayerHooks._merge
    lines = [[f"{len(pictures)} pictures", "r", "class token", "patches"]]
    for r in args.r:
        model.r = parse_setting(r)
        for way in args.ways:
            layers.LayerHooks._merge = merging(way)  # type: ignore[method-assign]
            try:
                merged = features(model, pictures)
            finally:
                layers.LayerHooks._merge = shipped  # type: ignore[method-assign]
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
