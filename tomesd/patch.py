"""apply_patch and remove_patch: merging through forward hooks alone.

No forward of a host's block is restated. A hook on each container of blocks (a `Transformer2DModel`) reads
the size of its image and lays out who receives. In each block a hook on `norm1` keeps the block's input, one
on `attn1` plans the merge by it, and hooks on `attn1`, `attn2` and `ff` merge what goes in and unmerge what
comes out. All hooks are bound methods of the classes below, owned by one `NetworkPatch` on the network, so
that deepcopy, pickle and removal take everything along.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .config import MergeConfig
from .families import Family, Site, find_networks, find_sites
from .hooks import Args, Argument, Kwargs, recompile
from .matching import match_exact, match_windowed
from .partition import Grid, cell_offsets
from .token_map import TokenMap

OWNER = "_tomesd"
# Caches of diffusers that give attn1's output of another step, which has other merged tokens.
CACHES = ("pyramid_attention_broadcast", "faster_cache_block")

Model = TypeVar("Model")


def apply_patch(
    model: Model,
    ratio: float = 0.5,
    max_downsample: int | None = None,
    sx: int = 2,
    sy: int = 2,
    use_rand: bool = True,
    merge_attn: bool = True,
    merge_crossattn: bool = False,
    merge_mlp: bool = False,
    *,
    seed: int = 0,
    matching: Literal["exact", "windowed"] = MergeConfig.matching,
) -> Model:
    """Makes a Stable Diffusion model merge similar tokens before attention and give them back after it.

    A patched model is re-patched. Options and model are checked before anything is touched. Code that
    torch.compile has made is discarded, as it would not see the patch.

    Args:
        model: a diffusers pipeline (its ControlNets are patched too), a bare network, or a CompVis LDM.
        ratio: share of the tokens that merge away, in `[0, 1)`, at most `1 - 1 / (sx * sy)`.
        max_downsample: merge at levels up to this downsampling of the latent image: 1, 2, 4 or 8; None
            for the finest level at which each network has attention (1 in SD 1.5 and 2, 2 in SDXL).
        sx: width in tokens of the cells that keep one token (dst) each to merge into.
        sy: height of these cells.
        use_rand: pick the dst of each cell by a hash of (seed, timestep, cell), else always the top left.
        merge_attn: merge for self-attention.
        merge_crossattn: merge for cross-attention.
        merge_mlp: merge for the feed-forward layers.
        seed: the seed of that hash. No random generator is read or moved.
        matching: `"windowed"` compares tokens within windows of 16 x 16, `"exact"` over the whole image.

    Returns:
        The same model.

    Raises:
        TypeError: an option of the wrong type, or a model that is neither module nor pipeline.
        ValueError: an option out of range, an unknown model, or a network with nothing to merge.

    Source: Bolya and Hoffman, Token Merging for Fast Stable Diffusion, 2023.
    """
    config = MergeConfig(
        ratio, max_downsample, sx, sy, use_rand, merge_attn, merge_crossattn, merge_mlp, seed, matching
    )
    targets = []
    for name, network, family in find_networks(model):
        sites = list(find_sites(network, family))
        chosen = [site for site in sites if left_alone(site, sites, config) is None]
        if sites and not chosen:
            levels = ", ".join(str(level) for level in sorted({site.downsample for site in sites}))
            raise ValueError(
                f"nothing to merge in {name or type(network).__name__} with max_downsample={max_downsample}: "
                f"its transformer blocks stand at downsample {levels}"
            )
        targets.append((network, family, chosen))
    if not any(chosen for _, _, chosen in targets):
        kinds = ", ".join(type(network).__name__ for network, _, _ in targets)
        raise ValueError(f"nothing to merge: no transformer blocks in {kinds}")
    for network, family, chosen in targets:
        _detach(network)
        if chosen:
            setattr(network, OWNER, NetworkPatch(network, family, chosen, config))
    recompile()
    return model


def remove_patch(model: Model) -> Model:
    """Takes every trace of `apply_patch` off a model and returns it; unpatched models are left as they are.

    Raises:
        TypeError: the model is neither module nor pipeline.
        ValueError: it holds no network of a known family.
    """
    patched_before = [_detach(network) for _, network, _ in find_networks(model)]
    if any(patched_before):
        recompile()
    return model


@contextmanager
def patched(model: Model, *args: Any, **kwargs: Any) -> Iterator[Model]:
    """`with patched(pipe, ratio=0.5):` applies `apply_patch` inside the block and removes it after."""
    apply_patch(model, *args, **kwargs)
    try:
        yield model
    finally:
        remove_patch(model)


def patch_of(network: nn.Module) -> NetworkPatch | None:
    """The patch that is on a network, if any."""
    return vars(network).get(OWNER)


def left_alone(site: Site, sites: list[Site], config: MergeConfig) -> str | None:
    """Why a block of a network with these `sites` is not merged, or None if it is."""
    limit = config.max_downsample
    if limit is None:
        limit = min(other.downsample for other in sites)
    if site.downsample > limit:
        return f"downsample {site.downsample} > max_downsample {limit}"
    if getattr(site.block, "norm1", None) is None or getattr(site.block, "attn1", None) is None:
        return "has no norm1 and attn1 to plan at"
    if not any(getattr(site.block, part, None) is not None for part in config.parts):
        return f"has no {' or '.join(config.parts)}"
    return None


@dataclass(frozen=True, eq=False)
class Layout:
    """The image of one call of a container, and who receives there: `dst` is `[1 or B, cells]`."""

    grid: Grid
    dst: Tensor


class NetworkPatch:
    """All that tomesd holds on one network: the options and the hooks."""

    def __init__(self, network: nn.Module, family: Family, sites: list[Site], config: MergeConfig) -> None:
        self.config = config
        self.timestep: Tensor | float = 0
        self.argument = Argument(network, family.timestep)
        self.handles: list[RemovableHandle] = []
        self.handles.append(network.register_forward_pre_hook(self.read_timestep, with_kwargs=True))
        containers: dict[nn.Module, ContainerPatch] = {}
        for site in sites:
            if site.container not in containers:
                containers[site.container] = ContainerPatch(self, site.container, family)
            containers[site.container].attach(site)

    def read_timestep(self, network: nn.Module, args: Args, kwargs: Kwargs) -> None:
        timestep = self.argument.get(args, kwargs)
        if isinstance(timestep, Tensor):
            timestep = timestep.detach()  # deepcopy refuses tensors that have a history
        self.timestep = 0 if timestep is None else timestep

    def layout(self, image: Tensor) -> Layout:
        """Where the tokens of an image `[B, C, h, w]` receive."""
        config = self.config
        grid = Grid(image.shape[-2], image.shape[-1], config.sy, config.sx)
        if not config.use_rand:
            return Layout(grid, grid.dst(torch.zeros(1, 1, dtype=torch.int64, device=image.device)))
        timestep = self.timestep
        if isinstance(timestep, Tensor) and timestep.numel() > 1:
            # One timestep per sample; a video network gives all frames of a sample the same.
            each, rest = divmod(image.shape[0], timestep.numel())
            timestep = timestep.flatten()[:1] if rest else timestep.flatten().repeat_interleave(each)
        offset = cell_offsets(grid.cells, grid.sy * grid.sx, config.seed, timestep, image.device)
        return Layout(grid, grid.dst(offset))

    def plan(self, x: Tensor, layout: Layout) -> TokenMap:
        """Which of the tokens `x` `[B, h * w, C]` of an image merge."""
        grid = layout.grid
        r = grid.r(self.config.ratio)
        if r == 0:
            return TokenMap.identity(x.shape[1], x.device)
        if self.config.matching == "windowed":
            return match_windowed(x, grid, layout.dst, r)
        return match_exact(x, grid.partition(layout.dst), r)


class ContainerPatch:
    """Lays out each image that a container is called with, and hands the layout to its blocks.

    Where the container passes a dict through to `attn1` and `attn2`, the layout travels in it. So what
    activation checkpointing recomputes is given the layout of its own forward again, and a block that is
    compiled by itself sees the size of the image as an argument, not as a constant. CompVis' containers pass
    nothing through; there blocks look up the last call's.
    """

    def __init__(self, owner: NetworkPatch, container: nn.Module, family: Family) -> None:
        self.owner = owner
        self.image = Argument(container, family.image)
        self.carrier = Argument(container, family.carrier) if family.carrier else None
        self.last: Layout | None = None
        owner.handles.append(container.register_forward_pre_hook(self.lay_out, with_kwargs=True))

    def lay_out(self, container: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        layout = self.owner.layout(self.image.get(args, kwargs))
        if self.carrier is None:
            self.last = layout
            return args, kwargs
        return self.carrier.put(args, kwargs, {**(self.carrier.get(args, kwargs) or {}), OWNER: layout})

    def attach(self, site: Site) -> None:
        patch = BlockPatch(self, site)
        hooks = {"attn1": patch.enter_attn1, "attn2": patch.enter_attn2, "ff": patch.enter_ff}
        handles, block = self.owner.handles, site.block
        handles.append(block.get_submodule("norm1").register_forward_pre_hook(patch.keep_input))
        for name, enter in hooks.items():
            part = getattr(block, name, None)
            if part is not None:
                handles.append(part.register_forward_pre_hook(enter, with_kwargs=True))
                if name in self.owner.config.parts:
                    handles.append(part.register_forward_hook(patch.unmerge))
        handles.append(block.register_forward_hook(patch.forget))


class BlockPatch:
    """Merges and unmerges around the parts of one block, by a plan made from the block's input."""

    def __init__(self, container: ContainerPatch, site: Site) -> None:
        self.container = container
        self.name = site.name
        self.parts = container.owner.config.parts
        self.x: Tensor | None = None
        self.map: TokenMap | None = None

    def keep_input(self, norm: nn.Module, args: Args) -> None:
        # Not at the block itself: what CompVis' checkpointing recomputes begins after it.
        self.x = args[0]

    def enter_attn1(self, attn: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        layout = kwargs.get(OWNER, self.container.last)
        kwargs = self._without_layout(kwargs)
        self._plan(layout)
        if "attn1" not in self.parts:
            return args, kwargs
        hooks = getattr(getattr(attn, "_diffusers_hook", None), "hooks", {})
        for cache in CACHES:
            if cache in hooks:
                raise ValueError(
                    f"tomesd: {self.name}.attn1 is cached by diffusers' {cache}, which gives back the tokens "
                    "of another step: use either the cache or merge_attn=True"
                )
        mask = kwargs.get("attention_mask")
        if mask is not None and kwargs.get("encoder_hidden_states") is None:
            kwargs["attention_mask"] = self._merge_mask(mask)
        return self._merge(args), kwargs

    def enter_attn2(self, attn: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        kwargs = self._without_layout(kwargs)
        if "attn2" not in self.parts:
            return args, kwargs
        if kwargs.get("ip_adapter_masks") is not None:
            raise ValueError(
                "tomesd: ip_adapter_masks belong to all tokens of the image and cannot be used with "
                "merge_crossattn=True: patch without it"
            )
        return self._merge(args), kwargs

    def enter_ff(self, ff: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        if "ff" not in self.parts:
            return args, kwargs
        if not self._map.fits(args[0]) and not self._map.is_identity:
            raise ValueError(
                f"tomesd: {self.name}.ff was given {list(args[0].shape[:2])} of the block's tokens: "
                "merge_mlp=True and chunked feed-forward exclude each other, use one of them"
            )
        return self._merge(args), kwargs

    def unmerge(self, part: nn.Module, args: Args, output: Tensor) -> Tensor:
        return output if self._map.is_identity else self._map.unmerge(output)

    def forget(self, block: nn.Module, args: Args, output: Any) -> None:
        self.x = self.map = None

    @property
    def _map(self) -> TokenMap:
        if self.map is None:
            raise RuntimeError(
                f"tomesd: a part of {self.name} was called without its block: call the whole network, or "
                "remove_patch first"
            )
        return self.map

    def _plan(self, layout: Layout | None) -> None:
        x, self.x = self.x, None
        if x is None or layout is None or x.shape[1] != layout.grid.h * layout.grid.w:
            tokens = "no tokens" if x is None else f"{x.shape[1]} tokens"
            seen = "no image" if layout is None else f"an image of {layout.grid.h} x {layout.grid.w}"
            raise RuntimeError(
                f"tomesd: {self.name} was given {tokens} and {seen}: call the whole network, not a part of "
                "it, or remove_patch first"
            )
        self.map = self.container.owner.plan(x, layout)

    def _merge(self, args: Args) -> Args:
        return args if self._map.is_identity else (self._map.merge(args[0]), *args[1:])

    def _merge_mask(self, mask: Tensor) -> Tensor:
        """Merges a mask or bias of the keys, `[B, N]` or `[B, 1, N]`; the least visible token decides."""
        token_map = self._map
        if mask.shape[-1] != token_map.tokens or mask.dim() > 3 or (mask.dim() == 3 and mask.shape[1] != 1):
            raise ValueError(
                f"tomesd: {self.name} got a self-attention mask of shape {list(mask.shape)}; only masks of "
                f"its keys, [B, {token_map.tokens}] or [B, 1, {token_map.tokens}], can be merged"
            )
        least = -token_map.merge(-mask.to(torch.float32).flatten(1), "amax")
        return least.to(mask.dtype).view(*mask.shape[:-1], token_map.groups)

    @staticmethod
    def _without_layout(kwargs: Kwargs) -> Kwargs:
        return {name: value for name, value in kwargs.items() if name != OWNER}


def _detach(network: nn.Module) -> bool:
    """Takes the patch off a network; whether there was one."""
    owner = patch_of(network)
    if owner is None:
        return False
    for handle in owner.handles:
        handle.remove()
    delattr(network, OWNER)
    return True
