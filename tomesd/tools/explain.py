"""explain: what a patch does to each transformer block of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..hosts.hooks import patch_of
from ..hosts.unets import find_networks
from ..methods import options
from ..methods.choice import ImageNetwork
from ..methods.cost import PlanIfItPays, work_of
from ..methods.method import Method
from ..patch import NetworkPatch

# Images in a batch, for which auto is asked: both guidance halves of one.
BATCH = 2


@dataclass(frozen=True)
class Row:
    """One transformer block at one image size."""

    name: str  # its path in the model
    downsample: int  # how many times smaller its image of tokens is than the latent image
    before: int  # its tokens
    after: int  # the tokens that its method leaves; with `SampleKeys` the keys
    flops: float  # of the whole block without a method, for one sample
    saved: float  # the share of them that its method saves
    left_alone: str | None = None  # why it has no method
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
        cells: list[tuple[str, ...]] = [
            ("block", "downsample", "method", "tokens", "left", "FLOPs saved", "left alone because")
        ]
        for row in self.rows:
            done = (str(row.after), f"{row.saved:.0%}") if row.left_alone is None else ("-", "-")
            method = "-" if row.method is None else str(row.method)
            place = row.name, str(row.downsample), method, str(row.before)
            cells.append((*place, *done, row.left_alone or ""))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
        merged = sum(row.after < row.before for row in self.rows)
        lines.append(
            f"{merged} of {len(self.rows)} blocks compute less at {self.width} x {self.height} pixels: an "
            f"estimated {self.saved:.0%} of the FLOPs of these blocks saved"
        )
        return "\n".join(lines)


def explain(model: object, height: int | None = None, width: int | None = None) -> Explanation:
    """Tells for each transformer block how many tokens merge and what that saves, or why it is left alone.

        print(tomesd.explain(pipe, 768))  # at 768 x 768 pixels

    Args:
        model: what was given to `apply_patch`; an unpatched model is explained as such.
        height: of the image in pixels; by default what the model was made for.
        width: of the image in pixels; by default `height`, or what the model was made for.

    Returns:
        A table that prints well; its `rows` hold the figures. FLOPs are estimated from layer shapes, and
        the cost of matching is not counted. With `auto` it is measured whether merging pays, for a batch of
        two.

    Raises:
        TypeError: the model is neither module nor pipeline, or a side is no integer.
        ValueError: it holds no network of a known family, or a side is too small.
    """
    networks = find_networks(model)
    scale: int = getattr(model, "vae_scale_factor", 8)
    native = getattr(getattr(networks[0].module, "config", None), "sample_size", None) or 64
    sides: tuple[int, int] = (native, native) if isinstance(native, int) else tuple(native)
    if width is None:
        width = sides[1] * scale if height is None else height
    if height is None:
        height = sides[0] * scale
    least = scale * max(network.family.side(network.module) for network in networks)
    height, width = options.integer("height", height, least), options.integer("width", width, least)
    rows: list[Row] = []
    for network in networks:
        side = network.family.side(network.module)
        rows += _rows(network, height // scale // side, width // scale // side)
    return Explanation(height, width, tuple(rows))


def _rows(network: ImageNetwork, h: int, w: int) -> Iterator[Row]:
    patch: NetworkPatch | None = patch_of(network.module)
    for site in network.sites:
        rows, columns = (-(-side // site.downsample) for side in (h, w))
        tokens = left = rows * columns
        whole = work_of([site], tuple(site.block.parts)).flops(tokens, tokens)
        method, saved = "not patched" if patch is None else patch.chosen[site.name], 0.0
        plan = None if patch is None else patch.plans.get(site.name)
        if isinstance(plan, PlanIfItPays):
            method = plan.loss(rows, columns, BATCH, next(site.module.parameters())) or method
        if isinstance(method, Method):
            left, work = method.left(rows, columns), method.work([site])
            saved = (work.flops(tokens, tokens) - work.flops(tokens, left)) / (whole or 1)
        reason, used = (None, method) if isinstance(method, Method) else (method, None)
        yield Row(network.path(site), site.downsample, tokens, left, whole, saved, reason, used)
