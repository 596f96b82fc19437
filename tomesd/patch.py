"""apply_patch and remove_patch: merging through forward hooks alone.

No forward of a host's block is restated. Per block, a hook on `norm1` sees the block's input and plans the
merge; hooks on `attn1`, `attn2` and `ff` merge what goes in and unmerge what comes out. All hooks are bound
methods of the classes below, owned by one `NetworkPatch` on the network, so that deepcopy, pickle and
removal take everything along.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .config import MergeConfig
from .families import Family, Site, find_networks, find_sites
from .matching import match_exact, match_windowed
from .partition import Grid, cell_offsets
from .token_map import TokenMap

OWNER = "_tomesd"
Model = TypeVar("Model")
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


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

    A patched model is re-patched. Everything is checked before anything is touched.

    Args:
        model: a diffusers pipeline (its ControlNets are patched too), a bare network, or a CompVis LDM.
        ratio: share of the tokens that merge away, in `[0, 1)`, at most `1 - 1 / (sx * sy)`.
        max_downsample: merge at levels up to this downsampling of the latent image: 1, 2, 4 or 8; None
            for the finest level at which this network has attention (1 in SD 1.5 and 2, 2 in SDXL).
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
        ValueError: an option out of range, an unknown model, or one with nothing to merge.

    Source: Bolya and Hoffman, Token Merging for Fast Stable Diffusion, 2023.
    """
    config = MergeConfig(
        ratio, max_downsample, sx, sy, use_rand, merge_attn, merge_crossattn, merge_mlp, seed, matching
    )
    plans = []
    for _, network, family in find_networks(model):
        sites = list(find_sites(network, family))
        plans.append((network, family, [site for site in sites if left_alone(site, sites, config) is None]))
    if not any(sites for _, _, sites in plans):
        raise ValueError(_nothing_to_merge(model, config))
    remove_patch(model)
    for network, family, sites in plans:
        if sites:
            setattr(network, OWNER, NetworkPatch(network, family, sites, config))
    _recompile()
    return model


def remove_patch(model: Model) -> Model:
    """Takes every trace of `apply_patch` off a model and returns it; unpatched models are left as they are.

    Raises:
        TypeError: the model is neither module nor pipeline.
        ValueError: it holds no network of a known family.
    """
    for _, network, _ in find_networks(model):
        owner = patch_of(network)
        if owner is not None:
            owner.remove()
            delattr(network, OWNER)
            _recompile()
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
    parts = {"attn1": config.merge_attn, "attn2": config.merge_crossattn, "ff": config.merge_mlp}
    if not any(wanted and getattr(site.block, part, None) is not None for part, wanted in parts.items()):
        return "has none of the parts to merge for"
    return None


class NetworkPatch:
    """All that tomesd holds on one network: the options, the hooks, and what the last call was given."""

    def __init__(self, network: nn.Module, family: Family, sites: list[Site], config: MergeConfig) -> None:
        self.config = config
        self.family = family
        self.timestep: Tensor | float = 0
        self.handles: list[RemovableHandle] = []
        self.handles.append(network.register_forward_pre_hook(self.read_timestep, with_kwargs=True))
        images: dict[nn.Module, Image] = {}
        for site in sites:
            if site.container not in images:
                images[site.container] = Image()
                read = images[site.container].read_size
                self.handles.append(site.container.register_forward_pre_hook(read, with_kwargs=True))
            self.handles += BlockPatch(self, images[site.container], site.name).attach(site.block)

    def read_timestep(self, network: nn.Module, args: Args, kwargs: Kwargs) -> None:
        timestep = args[1] if len(args) > 1 else kwargs.get(self.family.timestep)
        self.timestep = 0 if timestep is None else timestep

    def plan(self, x: Tensor, image: Image) -> TokenMap:
        """Which of the tokens `x` `[B, h * w, C]` of an image merge."""
        config = self.config
        grid = Grid(image.h, image.w, config.sy, config.sx)
        r = min(int(config.ratio * x.shape[1]), grid.max_r)
        if r == 0:
            return TokenMap.identity(x.shape[1], x.device)
        offset = self._offset(grid, x)
        if config.matching == "windowed":
            return match_windowed(x, grid, grid.dst(offset), r)
        return match_exact(x, grid.partition(offset), r)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _offset(self, grid: Grid, x: Tensor) -> Tensor:
        if not self.config.use_rand:
            return torch.zeros(1, grid.cells, dtype=torch.int64, device=x.device)
        timestep = self.timestep
        if isinstance(timestep, Tensor) and timestep.numel() > 1:
            # One timestep per sample; a video network gives all frames of a sample the same.
            each, rest = divmod(x.shape[0], timestep.numel())
            timestep = timestep.flatten()[:1] if rest else timestep.flatten().repeat_interleave(each)
        return cell_offsets(grid.cells, grid.sy * grid.sx, self.config.seed, timestep, x.device)


class Image:
    """The size in tokens of the image that a container of blocks was last called with."""

    h = w = 0

    def read_size(self, container: nn.Module, args: Args, kwargs: Kwargs) -> None:
        image = args[0] if args else next(iter(kwargs.values()))
        self.h, self.w = image.shape[-2:]


class BlockPatch:
    """Merges and unmerges around the parts of one block, by the plan made from the block's input."""

    def __init__(self, network: NetworkPatch, image: Image, name: str) -> None:
        self.network = network
        self.image = image
        self.name = name
        self.map: TokenMap | None = None

    def attach(self, block: nn.Module) -> list[RemovableHandle]:
        # norm1 is handed the block's input as it is. Planning there and not at the block keeps the plan
        # inside of what activation checkpointing recomputes, which for LDM is less than the block.
        handles = [block.norm1.register_forward_pre_hook(self.plan)]
        config = self.network.config
        wanted = {"attn1": config.merge_attn, "attn2": config.merge_crossattn, "ff": config.merge_mlp}
        for name, merge in wanted.items():
            part = getattr(block, name, None)
            if merge and part is not None:
                handles.append(
                    part.register_forward_pre_hook(getattr(self, f"merge_{name}"), with_kwargs=True)
                )
                handles.append(part.register_forward_hook(self.unmerge))
        handles.append(block.register_forward_hook(self.forget))
        return handles

    def plan(self, norm: nn.Module, args: Args) -> None:
        x = args[0]
        if x.shape[1] != self.image.h * self.image.w:
            raise RuntimeError(
                f"tomesd: {self.name} got {x.shape[1]} tokens, but its image was last seen as "
                f"{self.image.h} x {self.image.w}: call the whole network, not a block of it"
            )
        self.map = self.network.plan(x, self.image)

    def merge_attn1(self, attn: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        mask = kwargs.get("attention_mask")
        if mask is not None and kwargs.get("encoder_hidden_states") is None:
            kwargs = {**kwargs, "attention_mask": self._merge_mask(mask)}
        return self._merge(args), kwargs

    def merge_attn2(self, attn: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        if kwargs.get("ip_adapter_masks") is not None:
            raise ValueError(
                "tomesd: ip_adapter_masks belong to all tokens of the image and cannot be used with "
                "merge_crossattn=True: patch without it"
            )
        return self._merge(args), kwargs

    def merge_ff(self, ff: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        assert self.map is not None
        if args[0].shape[1] != self.map.tokens:
            raise ValueError(
                f"tomesd: {self.name}.ff was given {args[0].shape[1]} of {self.map.tokens} tokens: "
                "merge_mlp=True and forward chunking over tokens (dim=1) exclude each other, use one of them"
            )
        return self._merge(args), kwargs

    def unmerge(self, part: nn.Module, args: Args, output: Tensor) -> Tensor:
        assert self.map is not None
        return self.map.unmerge(output)

    def forget(self, block: nn.Module, args: Args, output: Any) -> None:
        self.map = None

    def _merge(self, args: Args) -> Args:
        assert self.map is not None
        return (self.map.merge(args[0]), *args[1:])

    def _merge_mask(self, mask: Tensor) -> Tensor:
        """Merges a mask or bias of the keys, `[B, N]` or `[B, 1, N]`; the least visible token decides."""
        assert self.map is not None
        if mask.shape[-1] != self.map.tokens or mask[0].numel() != mask.shape[-1]:
            raise ValueError(
                f"tomesd: {self.name} got a self-attention mask of shape {list(mask.shape)}; only masks of "
                f"its keys, [B, {self.map.tokens}] or [B, 1, {self.map.tokens}], can be merged"
            )
        least = -self.map.merge(-mask.to(torch.float32).flatten(1), "amax")
        return least.to(mask.dtype).view(*mask.shape[:-1], self.map.groups)


def _recompile() -> None:
    # torch.compile does not look for hooks that come or go after it has compiled a module.
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _nothing_to_merge(model: object, config: MergeConfig) -> str:
    levels = {
        f"{name or type(network).__name__}": sorted({s.downsample for s in find_sites(network, family)})
        for name, network, family in find_networks(model)
    }
    found = "; ".join(
        f"{n}: {'at downsample ' + ', '.join(map(str, d)) if d else 'none'}" for n, d in levels.items()
    )
    return (
        f"nothing to merge in {type(model).__name__} with max_downsample={config.max_downsample}. "
        f"Transformer blocks found: {found}"
    )
