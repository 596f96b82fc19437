"""Pictures of which patches of an image merged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..maths.token_map import TokenMap
from ..methods import options
from ..tools.extras import need
from ..tools.vis import paint, to_image

if TYPE_CHECKING:
    from PIL import Image


def make_visualization(
    img: Image.Image, source: Tensor | TokenMap, patch_size: int = 16, class_token: bool = True
) -> Image.Image:
    """Paints each group of merged patches in its mean colour, with a border of a colour of its own.

        tome.make_visualization(image, tome.source(model), patch_size=16).save("merged.png")

    Args:
        img: what the model saw, before normalisation.
        source: `tomesd.vit.source(model)`, or its dense matrix `[1, M, N]` or `[M, N]`.
        patch_size: side of a patch in pixels.
        class_token: whether tokens other than patches (class, registers) come before them.

    Returns:
        A picture of the size of `img`.

    Raises:
        ImportError: Pillow is not installed.
        TypeError: the image is no PIL image, the source no map or matrix, or `patch_size` no integer.
        ValueError: a source of several images, or one whose tokens are not the patches of this image.
    """
    if not isinstance(img, need("PIL.Image", "make_visualization").Image):
        raise TypeError(f"img must be a PIL image, got {type(img).__name__}")
    if not isinstance(source, TokenMap | Tensor):
        raise options.wrong_type("source", "a TokenMap or a matrix", source)
    patch_size = options.integer("patch_size", patch_size, least=1)
    options.boolean("class_token", class_token)
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
    before, counts = index[0, :prefix], index[0].bincount()
    if bool((counts[before] > 1).any()):
        raise ValueError(
            f"of the {index.shape[1]} tokens of the source {prefix} would come before the {columns} x {rows} "
            f"patches of {patch_size} pixels, but they have merged: it is of another image or patch_size"
        )
    groups = index[0, prefix:].cpu().unique(return_inverse=True)[1].view(rows, columns)
    return to_image(paint(img, groups)[0])


def _index(source: Tensor) -> Tensor:
    if source.dim() == 2:
        source = source[None]
    if source.dim() != 3:
        raise ValueError(f"the source must be [1, M, N] or [M, N], got {list(source.shape)}")
    return source.argmax(dim=1)
