"""explain: what a patch does to each transformer block of a model."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

from torch import nn

from ..hosts.family import Site
from ..hosts.hooks import patch_of
from ..hosts.unets import find_networks
from ..methods.choice import ImageNetwork
from ..methods.cost import pays, trial, work_of
from ..methods.method import Method
from ..patch import NetworkPatch

# Images in a batch, for which auto is asked: both guidance halves of one.
BATCH = 2


@dataclass(frozen=True)
class Row:
    """One transformer block at one image size.

    Args:
        name: its path in the model.
        downsample: how many times smaller its image of tokens is than the latent image.
        before: its tokens.
        after: the tokens that its method leaves; with `SampleKeys` the keys.
        flops: of the whole block without a method, for one sample.
        saved: share of them that its method saves.
        left_alone: why it has no method, or None.
        method: its method, or None.
    """

    name: str
    downsample: int
    before: int
    after: int
    flops: float
    saved: float
    left_alone: str | None = None
    method: Method | None = None


@dataclass(frozen=True)
class Explanation:
    """What is merged where, at one image size. `str()` gives the table."""

    height: int
    width: int
    rows: tuple[Row, ...]

    @property
    def saved(self) -> float:
        """Share of the FLOPs of these blocks that merging saves; the rest of the model is not counted."""
        total = sum(row.flops for row in self.rows)
        return sum(row.flops * row.saved for row in self.rows) / total if total else 0.0

    def __str__(self) -> str:
        head = ("block", "downsample", "method", "tokens", "left", "FLOPs saved", "left alone because")
        cells = [head]
        for row in self.rows:
            cells.append(
                (
                    row.name,
                    str(row.downsample),
                    "-" if row.method is None else str(row.method),
                    str(row.before),
                    str(row.after) if row.left_alone is None else "-",
                    f"{row.saved:.0%}" if row.left_alone is None else "-",
                    row.left_alone or "",
                )
            )
        widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells
        ]
        merged = sum(row.left_alone is None for row in self.rows)
        lines.append(
            f"{merged} of {len(self.rows)} blocks compute less at {self.width} x {self.height} pixels: an "
            f"estimated {self.saved:.0%} of the FLOPs of these blocks saved"
        )
        return "\n".join(line.rstrip() for line in lines)


def explain(model: object, height: int | None = None, width: int | None = None) -> Explanation:
    """Tells for each transformer block how many tokens merge and what that saves, or why it is left alone.

    Args:
        model: what was given to `apply_patch`; an unpatched model is explained as such.
        height: of the image in pixels; by default what the model was made for.
        width: of the image in pixels; by default `height`, or what the model was made for.

    Returns:
        A table that prints well; its `rows` hold the figures. FLOPs are estimated from layer shapes, and
        the cost of matching is not counted. With `auto` it is measured whether merging pays, for a batch of
        two.

    Raises:
        TypeError: the model is neither module nor pipeline.
        ValueError: it holds no network of a known family, or the size is not positive.
    """
    networks = find_networks(model)
    scale = getattr(model, "vae_scale_factor", 8)
    native = _native_size(networks[0].module)
    if width is None:
        width = native[1] * scale if height is None else height
    if height is None:
        height = native[0] * scale
    for name, side in (("height", height), ("width", width)):
        if not isinstance(side, Integral) or isinstance(side, bool) or side < scale:
            raise ValueError(f"{name} must be an integer of at least {scale} pixels, got {side!r}")
    rows = []
    for network in networks:
        side = network.family.side(network.module)
        rows += _rows(network, height // scale // side, width // scale // side)
    return Explanation(height, width, tuple(rows))


def _rows(network: ImageNetwork, h: int, w: int) -> list[Row]:
    patch: NetworkPatch | None = patch_of(network.module)
    rows = []
    for site in network.sites:
        size = tuple(-(-side // site.downsample) for side in (h, w))
        tokens = left = size[0] * size[1]
        whole = work_of([site], tuple(site.block.parts)).flops(tokens, tokens)
        method, saved = "not patched" if patch is None else patch.chosen[site.name], 0.0
        if isinstance(method, Method) and patch is not None and patch.auto:
            method = _loss(site, network, patch, method, *size) or method
        if isinstance(method, Method):
            left = method.left(*size)
            work = method.work([site])
            saved = (work.flops(tokens, tokens) - work.flops(tokens, left)) / whole
        reason, used = (None, method) if isinstance(method, Method) else (method, None)
        path = network.path(site)
        rows.append(Row(path, site.downsample, tokens, left, whole, saved, reason, used))
    return rows


def _loss(
    site: Site, network: ImageNetwork, patch: NetworkPatch, method: Method, h: int, w: int
) -> str | None:
    """Why `auto` leaves a block alone, or None if its method pays there."""
    weight = next(site.module.parameters())
    if weight.device.type == "meta":
        return None
    own = [
        other
        for other in network.sites
        if other.container is site.container and patch.chosen[other.name] == method
    ]
    (group,) = (group for group in method.groups(own) if site in group)
    question = method.work(group), method, h, w, BATCH, weight.dtype, weight.device
    return None if pays(*question) else f"it would be slower: {trial(*question)}"


def _native_size(network: nn.Module) -> tuple[int, int]:
    """Size of the latent image that a network was made for; 64 x 64 where it does not say."""
    size = getattr(getattr(network, "config", None), "sample_size", None) or 64
    return (size, size) if isinstance(size, int) else tuple(size)
