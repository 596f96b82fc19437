"""Pictures of which patches of an image merged."""

from __future__ import annotations

import colorsys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..token_map import TokenMap

if TYPE_CHECKING:
    from PIL import Image

# Hues this share of the circle apart never come near each other (the golden ratio).
HUE_STEP = 0.618034


def make_visualization(
    img: Image.Image, source: Tensor | TokenMap, patch_size: int = 16, class_token: bool = True
) -> Image.Image:
    """Paints each group of merged patches in its mean colour, with a border of a colour of its own.

    Args:
        img: what the model saw, before normalisation.
        source: `tomesd.vit.source(model)`, or its dense matrix `[1, M, N]` or `[M, N]`.
        patch_size: side of a patch in pixels.
        class_token: whether tokens other than patches (class, registers) come before them.

    Returns:
        A picture of the size of `img`.

    Raises:
        TypeError: the image is no PIL image.
        ValueError: a source of several images, or one whose tokens are not the patches of this image.
    """
    from PIL import Image

    if not isinstance(img, Image.Image):
        raise TypeError(f"img must be a PIL image, got {type(img).__name__}")
    if patch_size < 1:
        raise ValueError(f"patch_size must be at least 1, got {patch_size}")
    index = source.index if isinstance(source, TokenMap) else _index(source)
    if index.shape[0] != 1:
        raise ValueError(f"the source must be of one image, got {index.shape[0]}: pass source[i : i + 1]")
    rows, columns = img.height // patch_size, img.width // patch_size
    prefix = index.shape[1] - rows * columns
    if prefix < 0 or (prefix > 0) != class_token:
        raise ValueError(
            f"an image of {img.width} x {img.height} pixels has {columns} x {rows} patches of {patch_size}, "
            f"the source has {index.shape[1]} tokens with class_token={class_token}"
        )
    groups = index[0, prefix:].cpu().unique(return_inverse=True)[1].view(rows, columns)
    y = torch.arange(img.height) * rows // img.height
    x = torch.arange(img.width) * columns // img.width
    label = groups[y[:, None], x]  # [H, W]
    pixels = torch.frombuffer(bytearray(img.convert("RGB").tobytes()), dtype=torch.uint8).view(
        *label.shape, 3
    )
    count = int(label.max()) + 1
    total = torch.zeros(count, 3).index_add(0, label.flatten(), pixels.flatten(0, 1).float())
    mean = total / label.flatten().bincount(minlength=count)[:, None]
    hues = [colorsys.hsv_to_rgb(i * HUE_STEP % 1, 0.8, 1.0) for i in range(count)]
    painted = torch.where(_border(label)[..., None], 255 * torch.tensor(hues)[label], mean[label])
    return Image.fromarray(painted.round().to(torch.uint8).numpy())


def _index(source: Tensor) -> Tensor:
    if source.dim() == 2:
        source = source[None]
    if source.dim() != 3:
        raise ValueError(f"the source must be [1, M, N] or [M, N], got {list(source.shape)}")
    return source.argmax(dim=1)


def _border(label: Tensor) -> Tensor:
    """The pixels with a neighbour of another group, `[H, W]`."""
    down = label[1:] != label[:-1]
    right = label[:, 1:] != label[:, :-1]
    border = torch.zeros_like(label, dtype=torch.bool)
    border[1:] |= down
    border[:-1] |= down
    border[:, 1:] |= right
    border[:, :-1] |= right
    return border
