"""explain: what a patch does to each transformer block of a model."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

from torch import nn

from .families import Family, find_networks, find_sites
from .partition import Grid
from .patch import left_alone, patch_of

# CLIP's context length; it enters the share saved by merge_crossattn only.
TEXT_TOKENS = 77


@dataclass(frozen=True)
class Row:
    """One transformer block: its tokens before and after merging, and the share of its FLOPs saved."""

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
        A table that prints well; its `rows` hold the figures. FLOPs are estimated from layer shapes and
        the cost of matching is not counted.

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
        before = after = grid_h * grid_w
        reason: str | None = "not patched"
        flops = whole = _flops(site.block, before, before, ())
        if owner is not None:
            config = owner.config
            reason = left_alone(site, sites, config)
            if reason is None:
                after = before - Grid(grid_h, grid_w, config.sy, config.sx).r(config.ratio)
                flops = _flops(site.block, before, after, config.parts)
        name = f"{prefix}.{site.name}" if prefix else site.name
        rows.append(Row(name, site.downsample, before, after, whole, 1 - flops / whole, reason))
    return rows


def _flops(block: nn.Module, before: int, after: int, merged: tuple[str, ...]) -> float:
    """FLOPs of one sample in a block, whose `merged` parts see `after` of `before` tokens."""
    total = 0.0
    for name in ("attn1", "attn2"):
        attn = getattr(block, name, None)
        if attn is None:
            continue
        n = after if name in merged else before
        # CompVis' attention does not say what it is, its block does.
        crosses = getattr(
            attn, "is_cross_attention", name == "attn2" or getattr(block, "disable_self_attn", False)
        )
        keys = TEXT_TOKENS if crosses else n
        total += 2 * n * (_parameters(attn.to_q) + _parameters(attn.to_out))
        total += 2 * keys * (_parameters(attn.to_k) + _parameters(attn.to_v))
        total += 4 * n * keys * attn.to_q.out_features
    return total + 2 * (after if "ff" in merged else before) * _parameters(block.get_submodule("ff"))


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() > 1)


def _native_size(network: nn.Module) -> tuple[int, int]:
    """Size of the latent image that a network was made for; 64 x 64 where it does not say."""
    size = getattr(getattr(network, "config", None), "sample_size", None) or 64
    return (size, size) if isinstance(size, int) else tuple(size)
