"""explain: what a patch does to each transformer block of a model."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

from torch import nn

from . import worth
from .config import MergeConfig
from .families import Family, Site, find_networks, find_sites
from .partition import Grid
from .patch import left_alone, patch_of, work_of
from .worth import Left, Work, pays, question

# Images in a batch, for which auto is asked: both guidance halves of one.
BATCH = 2


@dataclass(frozen=True)
class Row:
    """One transformer block: its tokens before and after merging, and the share of its FLOPs saved.

    With `keys_only` alone `after` are the keys that are left.
    """

    name: str
    downsample: int
    before: int
    after: int
    flops: float
    saved: float
    left_alone: str | None = None


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
        head = ("block", "downsample", "tokens", "merged", "FLOPs saved", "left alone because")
        cells = [head]
        for row in self.rows:
            cells.append(
                (
                    row.name,
                    str(row.downsample),
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
            f"{merged} of {len(self.rows)} blocks merge at {self.width} x {self.height} pixels: an estimated "
            f"{self.saved:.0%} of the FLOPs of these blocks saved"
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
    native = _native_size(networks[0][1])
    if width is None:
        width = native[1] * scale if height is None else height
    if height is None:
        height = native[0] * scale
    for name, side in (("height", height), ("width", width)):
        if not isinstance(side, Integral) or isinstance(side, bool) or side < scale:
            raise ValueError(f"{name} must be an integer of at least {scale} pixels, got {side!r}")
    rows = []
    for prefix, network, family in networks:
        rows += _rows(prefix, network, family, height // scale, width // scale)
    return Explanation(height, width, tuple(rows))


def _rows(prefix: str, network: nn.Module, family: Family, h: int, w: int) -> list[Row]:
    owner = patch_of(network)
    sites = list(find_sites(network, family))
    rows = []
    for site in sites:
        grid_h, grid_w = (-(-side // site.downsample) for side in (h, w))
        left = everything = Left(*3 * [grid_h * grid_w])
        reason: str | None = "not patched"
        config = MergeConfig() if owner is None else owner.config
        if owner is not None:
            reason = left_alone(site, sites, config)
            grid = Grid(grid_h, grid_w, config.sy, config.sx)
            if reason is None and config.auto:
                reason = _loss(site, sites, config, grid)
            if reason is None:
                left = Left.of(grid, config.ratio)
        whole = _flops(site.block, everything, everything, config)
        saved = 1 - _flops(site.block, everything, left, config) / whole
        name = f"{prefix}.{site.name}" if prefix else site.name
        after = left.merged if config.matches else left.keys
        rows.append(Row(name, site.downsample, left.all, after, whole, saved, reason))
    return rows


def _flops(block: nn.Module, everything: Left, left: Left, config: MergeConfig) -> float:
    """FLOPs of one sample in a block of which so many tokens are left in the parts that merge."""
    return sum(
        Work.of([block], (part,), config).flops(left if part in config.parts else everything)
        for part in ("attn1", "attn2", "ff")
    )


def _loss(site: Site, sites: list[Site], config: MergeConfig, grid: Grid) -> str | None:
    """Why `auto` leaves a block alone, or None if merging pays there."""
    weight = next(site.block.parameters())
    if weight.device.type == "meta":
        return None
    kind = BATCH, weight.dtype, weight.device
    work = work_of(site, [other for other in sites if left_alone(other, sites, config) is None], config)
    if pays(work, config, grid.h, grid.w, *kind):
        return None
    return f"merging does not pay: {worth.trial(work, *question(config, grid.h, grid.w), *kind)}"


def _native_size(network: nn.Module) -> tuple[int, int]:
    """Size of the latent image that a network was made for; 64 x 64 where it does not say."""
    size = getattr(getattr(network, "config", None), "sample_size", None) or 64
    return (size, size) if isinstance(size, int) else tuple(size)
