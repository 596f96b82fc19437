"""Pictures of what merged."""

from __future__ import annotations

import colorsys
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..maths.token_map import TokenMap
from ..methods import options
from .extras import need
from .trace import Plan

if TYPE_CHECKING:
    from PIL import Image

# Hues this share of the circle apart never come near each other (the golden ratio).
HUE_STEP = 0.618034
# Smaller tokens leave no room for their colour between their borders.
LEAST = 8


def make_visualization(
    img: Image.Image, plan: Plan, sample: int = -1, pixels: int | None = None
) -> Image.Image:
    """Paints each group of merged tokens in its mean colour, with a border of a colour of its own.

    A dot of that colour marks the token that the others merged into. Tokens that merged with nothing show
    the picture as it is.

        with tomesd.trace(pipe, steps=[10]) as plans:
            image = pipe("a cat").images[0]
        tomesd.make_visualization(image, plans[0]).save("merged.png")

    Args:
        img: what the model drew.
        plan: what merged in a block, from `trace`.
        sample: which of the samples that the network was called with. The last one is what the prompt of
            the last picture asks for; with guidance, samples without prompt come before.
        pixels: side of a token in the result; by default its size in `img`, but at least 8.

    Returns:
        A picture of `plan.w * pixels` x `plan.h * pixels`.

    Raises:
        ImportError: Pillow is not installed.
        TypeError: `img` is no PIL image, `plan` no `Plan`, or a number no integer.
        ValueError: an image of another shape than the tokens', a sample that is not there, no pixels.
    """
    if not isinstance(img, need("PIL.Image", "make_visualization").Image):
        raise TypeError(f"img must be a PIL image, got {type(img).__name__}")
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be one of those that trace lists, got {type(plan).__name__}")
    sample = options.integer("sample", sample)
    h, w, samples = plan.h, plan.w, plan.map.index.shape[0]
    # The last token of a row or column may reach past the image.
    if abs(img.width * h - img.height * w) >= max(img.size):
        raise ValueError(f"{w} x {h} tokens are not of an image of {img.width} x {img.height} pixels")
    if not -samples <= sample < samples:
        raise ValueError(f"sample must be in [{-samples}, {samples}), got {sample}")
    side = max(LEAST, round(img.width / w)) if pixels is None else options.integer("pixels", pixels, least=1)
    img = img.convert("RGB").resize((w * side, h * side))
    index, keep = plan.map.index[sample], plan.map.keep[sample]
    merged = plan.map.sizes[sample][index] > 1
    receives = torch.zeros_like(merged).index_fill(0, keep, True)
    # Numbered as they come, groups below each other often get hues that hardly differ.
    shuffled = torch.randperm(plan.map.groups, generator=torch.Generator().manual_seed(0))[index]
    painted, hue = paint(img, shuffled.view(h, w))
    middle = (2 * torch.arange(side) + 1 - side).abs() * 4 <= side
    dot = middle[:, None] & middle
    dots = (receives.view(h, 1, w, 1) & dot[:, None]).view(h * side, w * side, 1)
    marked = torch.where(dots, hue, painted)
    return to_image(torch.where(spread(merged.view(h, w), img)[..., None], marked, to_tensor(img)))


def paint(img: Image.Image, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Mean colours of groups with borders in their hues, and the hues alone: float `[H, W, 3]`, 0 to 255.

    `groups` is the number of each token's group, int64 `[rows, columns]`, from 0 on, none left out.
    """
    label = spread(groups, img)
    count = int(label.max()) + 1
    pixels = to_tensor(img)
    total = torch.zeros(count, 3).index_add(0, label.flatten(), pixels.flatten(0, 1))
    mean = total / label.flatten().bincount(minlength=count)[:, None]
    hues = [colorsys.hsv_to_rgb(i * HUE_STEP % 1, 0.8, 1.0) for i in range(count)]
    hue = 255 * torch.tensor(hues)[label]
    return torch.where(_border(label)[..., None], hue, mean[label]), hue


def rebuilt(img: Image.Image, merged: TokenMap, rows: int, columns: int) -> Image.Image:
    """The image with each of `rows` x `columns` patches, which divide it, as the mean of its group's.

    The map is of one sample; class and register tokens may come before the patches.
    """
    pixels = to_tensor(img)
    size = img.height // rows, img.width // columns
    patches = pixels.unfold(0, size[0], size[0]).unfold(1, size[1], size[1]).flatten(0, 1)[None]
    others = patches.new_zeros(1, merged.tokens - rows * columns, *patches.shape[2:])
    mean = merged.unmerge(merged.merge(torch.cat([others, patches], 1)))[0, others.shape[1] :]
    return to_image(mean.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1))


def spread(values: Tensor, img: Image.Image) -> Tensor:
    """Values of tokens `[rows, columns]` -> of the pixels that these cover, `[H, W]`."""
    y = torch.arange(img.height) * values.shape[0] // img.height
    x = torch.arange(img.width) * values.shape[1] // img.width
    return values[y[:, None], x]


def to_tensor(img: Image.Image) -> Tensor:
    """The pixels of an image, float `[H, W, 3]`, 0 to 255."""
    pixels = torch.frombuffer(bytearray(img.convert("RGB").tobytes()), dtype=torch.uint8)
    return pixels.view(img.height, img.width, 3).float()


def to_image(pixels: Tensor) -> Image.Image:
    """The image of pixels `[H, W, 3]`, 0 to 255."""
    need("numpy", "make_visualization")  # which torch and Pillow exchange pixels by
    picture: Image.Image = need("PIL.Image").fromarray(pixels.round().to(torch.uint8).numpy())
    return picture


def _border(label: Tensor) -> Tensor:
    """The pixels with a neighbour of another group, `[H, W]`."""
    around = F.pad(label[None].float(), (1, 1, 1, 1), mode="replicate")[0]
    sides = around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:]
    return torch.stack([side != label for side in sides]).any(0)
