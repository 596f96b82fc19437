"""apply_patch and remove_patch: merging through forward hooks alone.

No forward of a host's block is restated. A hook on each container of blocks (a `Transformer2DModel`) reads
the size of its image and lays out who receives. In each block a hook on `norm1` keeps the block's input, one
on `attn1` plans the merge by it, and hooks on `attn1`, `attn2` and `ff` merge what goes in and unmerge what
comes out. With `keys_only` `attn1` is given a sample of the tokens to take keys and values from; with
`merge_stage` the first block of a container merges and its last one unmerges for all of them. All hooks are
bound methods of the classes below, owned by one `NetworkPatch` on the network, so that deepcopy, pickle and
removal take everything along.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .config import MergeConfig
from .families import Family, Site, find_networks, find_sites
from .hooks import Args, Argument, Kwargs, recompile
from .layout import Layout, Memory
from .partition import Grid
from .token_map import TokenMap
from .worth import Work, is_cross_attention, pays

if TYPE_CHECKING:
    from .trace import Recorder

OWNER = "_tomesd"
# Caches of diffusers that give attention's output of another step, which has other merged tokens.
CACHES = ("pyramid_attention_broadcast", "faster_cache_block", "taylorseer_cache")

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
    merge_stage: bool = MergeConfig.merge_stage,
    reuse: int = MergeConfig.reuse,
    auto: bool = MergeConfig.auto,
    prop_attn: bool = MergeConfig.prop_attn,
    keys_only: bool = MergeConfig.keys_only,
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
        merge_stage: merge once for each transformer (`Transformer2DModel`) and run all its blocks on merged
            tokens; each token then gains what its group has gained. Takes the place of the other three.
        reuse: how long a plan lasts. 0: each block makes its own; 1: all blocks of one size share one in a
            step; k: for k steps of a denoising loop whose timesteps are views of one tensor and whose text is
            the same object in each step, as in pipelines of diffusers; else, and when compiled, for one step.
        auto: leave blocks alone where this would be slower, which is measured once for each shape of
            tokens, in about a second; `explain` tells. So the picture may depend on the machine.
        prop_attn: proportional attention (Bolya et al., 2023): let each key of self-attention count as often
            as tokens have merged into it. Nearer to the plain picture, but no longer what tomesd 0.1.3 draws.
        keys_only: let every token look at a random sample of all tokens, spread evenly and new in each step,
            instead of merging anything for self-attention. As many products of queries and keys are left as
            merging would leave: at ratio 0.5 a quarter of the keys, at 0.9 (cells need not be larger here) a
            hundredth. In the same time much nearer to the plain picture, and there is nothing to match.
            `use_rand=False` takes the same sample in each step.

    Returns:
        The same model.

    Raises:
        TypeError: an option of the wrong type, or a model that is neither module nor pipeline.
        ValueError: an option out of range, an unknown model, or a network with nothing to merge.

    Source: Bolya and Hoffman, Token Merging for Fast Stable Diffusion, 2023.
    """
    config = MergeConfig(
        ratio,
        max_downsample,
        sx,
        sy,
        use_rand,
        merge_attn,
        merge_crossattn,
        merge_mlp,
        seed,
        matching,
        merge_stage,
        reuse,
        auto,
        prop_attn,
        keys_only,
    )
    targets = []
    for name, network, family in find_networks(model):
        sites = list(find_sites(network, family))
        chosen = [site for site in sites if left_alone(site, sites, config) is None]
        if config.prop_attn and family.bias is None:
            raise ValueError(
                f"attention of {name or type(network).__name__} ({family.name}) takes no bias, which "
                "prop_attn needs: patch without it"
            )
        if sites and not chosen:
            unfit = {unfitness(site, config) for site in sites}
            if None not in unfit:
                raise ValueError(
                    f"nothing to merge in {name or type(network).__name__}: each of its transformer blocks "
                    f"{' or '.join(sorted(map(str, unfit)))}"
                )
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
    # Compiled programs take the answer as a constant. Marked here, as marking it loads torch._dynamo.
    torch.compiler.assume_constant_result(pays)
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
        fit = [other.downsample for other in sites if unfitness(other, config) is None]
        limit = min(fit, default=site.downsample)
    if site.downsample > limit:
        return f"downsample {site.downsample} > max_downsample {limit}"
    return unfitness(site, config)


def unfitness(site: Site, config: MergeConfig) -> str | None:
    """What a block lacks to be merged at any level, or None."""
    if getattr(site.block, "norm1", None) is None or getattr(site.block, "attn1", None) is None:
        return "has no norm1 and attn1 to plan at"
    if not any(getattr(site.block, part, None) is not None for part in config.parts):
        return f"has no {' or '.join(config.parts)}"
    if not config.matches and is_cross_attention(site.block, "attn1"):
        return "has the keys of the text in attn1"
    return None


def work_of(site: Site, sites: list[Site], config: MergeConfig) -> Work:
    """What runs on merged tokens at one of the `sites` that merge: parts of its block or of its container."""
    if not config.merge_stage:
        return Work.of([site.block], config.parts, config)
    return Work.of(
        [other.block for other in sites if other.container is site.container], config.parts, config
    )


@dataclass(frozen=True, eq=False)
class Stage:
    """What a whole stage keeps from its first block to its last: tokens as they were, and merged."""

    x: Tensor
    map: TokenMap
    merged: Tensor


@dataclass(eq=False)
class Call:
    """One call of a container."""

    layout: Layout
    stage: Stage | None = None


class NetworkPatch:
    """All that tomesd holds on one network: the options and the hooks."""

    def __init__(self, network: nn.Module, family: Family, sites: list[Site], config: MergeConfig) -> None:
        self.config = config
        self.timestep: Tensor | float = 0
        self.layouts: dict[int, Layout] | None = None  # of the last forward, by level
        self.memory = Memory()
        self.recorders: list[Recorder] = []
        self.arguments = Argument(network, family.timestep), Argument(network, family.text)
        self.handles: list[RemovableHandle] = [
            network.register_forward_pre_hook(self.begin, with_kwargs=True),
            network.register_forward_hook(self.end),
        ]
        for container in dict.fromkeys(site.container for site in sites):
            ContainerPatch(self, family, [site for site in sites if site.container is container])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "recorders": []}  # copies are not traced

    def begin(self, network: nn.Module, args: Args, kwargs: Kwargs) -> None:
        for recorder in self.recorders:
            recorder.begin()
        timestep, text = (argument.get(args, kwargs) for argument in self.arguments)
        self.layouts = {}
        if self.config.reuse > 1 and not torch.compiler.is_compiling():
            self.layouts = self.memory.recall(timestep, text, self.config.reuse)
        if isinstance(timestep, Tensor):
            timestep = timestep.detach()  # deepcopy refuses tensors that have a history
        self.timestep = 0 if timestep is None else timestep

    def end(self, network: nn.Module, args: Args, output: Any) -> None:
        # Else kept for what checkpointing of whole parts of the network recomputes; compiled code would have
        # to give it back from each call.
        if torch.compiler.is_compiling():
            self.layouts = None

    def layout(self, level: int, image: Tensor) -> Layout:
        """Where the tokens of an image `[B, C, h, w]` receive; one layout serves all images of a level."""
        layouts = {} if self.layouts is None else self.layouts  # containers may be called by themselves
        layout = layouts.get(level)
        if layout is None or not layout.fits(image):
            layout = layouts[level] = Layout.of(image, self.config, self.timestep)
        return layout

    def plan(self, x: Tensor, layout: Layout) -> TokenMap:
        """Which of the tokens `x` `[B, h * w, C]` of an image merge."""
        return layout.plan(x, self.config)


class ContainerPatch:
    """Lays out each image that a container is called with, and hands the layout to its blocks.

    Where the container passes a dict through to `attn1` and `attn2`, the layout travels in it. So what
    activation checkpointing recomputes is given the layout of its own forward again, and a block that is
    compiled by itself sees the size of the image as an argument, not as a constant. CompVis' containers pass
    nothing through; there blocks look up the last call's.
    """

    def __init__(self, owner: NetworkPatch, family: Family, sites: list[Site]) -> None:
        container = sites[0].container
        self.owner = owner
        self.level = sites[0].level
        self.image = Argument(container, family.image)
        self.carrier = Argument(container, family.carrier) if family.carrier else None
        self.last: Call | None = None
        owner.handles.append(container.register_forward_pre_hook(self.lay_out, with_kwargs=True))
        if owner.config.merge_stage:
            StagePatch(self, family, sites)
        else:
            for site in sites:
                BlockPatch(self, family, site)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None}  # as in BlockPatch

    def lay_out(self, container: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        call = Call(self.owner.layout(self.level, self.image.get(args, kwargs)))
        if self.carrier is None:
            self.last = call
            return args, kwargs
        return self.carrier.put(args, kwargs, {**(self.carrier.get(args, kwargs) or {}), OWNER: call})

    def plan(self, name: str, x: Tensor | None, call: Call | None, work: Work | None) -> TokenMap:
        """The plan for the tokens `x` `[B, N, C]` of a block; none if merging is not to pay for this work."""
        grid = None if call is None else call.layout.grid
        if x is None or call is None or grid is None or x.shape[1] != grid.h * grid.w:
            tokens = "no tokens" if x is None else f"{x.shape[1]} tokens"
            seen = "no image" if grid is None else f"an image of {grid.h} x {grid.w}"
            raise RuntimeError(
                f"tomesd: {name} was given {tokens} and {seen}: call the whole network, not a part of it, or "
                "remove_patch first"
            )
        config = self.owner.config
        if work is None or x.device.type == "meta" or _pays(work, config, grid, x):
            token_map = self.owner.plan(x, call.layout)
        else:
            token_map = TokenMap.identity(x.shape[1], x.device)
        for recorder in self.owner.recorders:
            recorder.note(name, self.owner.timestep, grid, x.shape[0], token_map)
        return token_map


class BlockPatch:
    """Merges and unmerges around the parts of one block, by a plan made from the block's input."""

    def __init__(self, container: ContainerPatch, family: Family, site: Site) -> None:
        self.container = container
        self.name = site.name
        self.parts = container.owner.config.parts
        self.family = family
        self.work = work_of(site, [site], container.owner.config) if container.owner.config.auto else None
        self.x: Tensor | None = None
        self.map: TokenMap | None = None
        handles, block = container.owner.handles, site.block
        handles.append(block.get_submodule("norm1").register_forward_pre_hook(self.keep_input))
        for name, enter in (("attn1", self.enter_attn1), ("attn2", self.enter_attn2), ("ff", self.enter_ff)):
            part = getattr(block, name, None)
            if part is not None:
                handles.append(part.register_forward_pre_hook(enter, with_kwargs=True))
                if name in self.parts and not (name == "attn1" and container.owner.config.keys_only):
                    handles.append(part.register_forward_hook(self.unmerge))
        handles.append(block.register_forward_hook(self.forget))

    def __getstate__(self) -> dict[str, Any]:
        # A forward that failed leaves tensors, which cannot be copied if they have a history.
        return {**self.__dict__, "x": None, "map": None}

    def keep_input(self, norm: nn.Module, args: Args) -> None:
        # Not at the block itself: what CompVis' checkpointing recomputes begins after it.
        self.x = args[0]

    def enter_attn1(self, attn: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        call, kwargs = _take_call(kwargs)
        call = call or self.container.last
        x, self.x = self.x, None
        self.map = self.container.plan(self.name, x, call, self.work)
        if "attn1" not in self.parts:
            return args, kwargs
        if call is not None and call.layout.keys is not None:
            return args, self._take_keys(attn, args[0], kwargs, call.layout.keys)
        _refuse_caches(attn, f"{self.name}.attn1", "merge_attn=True")
        return self._merge(args), self._merge_bias(args[0], kwargs)

    def enter_attn2(self, attn: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        _, kwargs = _take_call(kwargs)
        if "attn2" not in self.parts:
            return args, kwargs
        _refuse_caches(attn, f"{self.name}.attn2", "merge_crossattn=True")
        _refuse_ip_masks(kwargs, "merge_crossattn=True")
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

    def _take_keys(self, attn: nn.Module, x: Tensor, kwargs: Kwargs, keys: TokenMap) -> Kwargs:
        """Gives self-attention a sample of the tokens to take keys and values from."""
        if self._map.is_identity or kwargs.get(self.family.keys) is not None:
            return kwargs
        if "Fused" in type(getattr(attn, "processor", None)).__name__:
            raise ValueError(
                f"tomesd: {self.name}.attn1 computes queries, keys and values in one layer, which "
                "keys_only=True cannot tell apart: call unfuse_qkv_projections() first"
            )
        bias = self.family.bias
        if bias is not None and kwargs.get(bias) is not None:
            mask = keys.merge(_mask_of_keys(self.name, kwargs[bias], keys), "drop")
            kwargs = {**kwargs, bias: mask.view(*kwargs[bias].shape[:-1], keys.groups)}
        return {**kwargs, self.family.keys: keys.merge(x, "drop")}

    def _merge_bias(self, x: Tensor, kwargs: Kwargs) -> Kwargs:
        weigh = self.container.owner.config.prop_attn
        return _merge_bias(self.name, x, kwargs, self._map, self.family, weigh)

    @property
    def _map(self) -> TokenMap:
        if self.map is None:
            raise RuntimeError(
                f"tomesd: a part of {self.name} was called without its block: call the whole network, or "
                "remove_patch first"
            )
        return self.map

    def _merge(self, args: Args) -> Args:
        # Where nothing merges, chunks of the tokens may come as well.
        return args if self._map.is_identity else (self._map.merge(args[0]), *args[1:])


class StagePatch:
    """Runs all blocks of a container on merged tokens, and gives every token what its group has gained.

    Of merged tokens `m` the blocks make `f(m)`; a token `x` becomes `x + unmerge(f(m) - m)`, so what tells it
    from the rest of its group stays.
    """

    def __init__(self, container: ContainerPatch, family: Family, sites: list[Site]) -> None:
        self.container = container
        self.name = sites[0].name
        self.work = work_of(sites[0], sites, container.owner.config) if container.owner.config.auto else None
        first, last = sites[0].block, sites[-1].block
        self.family = family
        self.tokens = Argument(first, family.tokens)
        self.carrier = Argument(first, family.carrier) if family.carrier else None
        handles = container.owner.handles
        handles.append(first.register_forward_pre_hook(self.merge, with_kwargs=True))
        for site in sites:
            for name, enter in (("attn1", self.enter_attn1), ("attn2", self.enter_attn2)):
                part = getattr(site.block, name, None)
                if part is not None:
                    handles.append(part.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(last.register_forward_hook(self.unmerge, with_kwargs=True))

    def merge(self, block: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        call = self._call(args, kwargs)
        x = self.tokens.get(args, kwargs)
        token_map = self.container.plan(self.name, x, call, self.work)
        assert call is not None  # or there would have been no plan
        call.stage = Stage(x, token_map, token_map.merge(x))
        return self.tokens.put(args, kwargs, call.stage.merged)

    def unmerge(self, block: nn.Module, args: Args, kwargs: Kwargs, output: Tensor) -> Tensor:
        call = self._call(args, kwargs)
        stage = self._stage(call)
        if call is self.container.last:
            self.container.last = None  # it holds tensors
        if stage.map.is_identity:
            return output
        return stage.x + stage.map.unmerge(output - stage.merged)

    def enter_attn1(self, attn: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        call, kwargs = _take_call(kwargs)
        _refuse_caches(attn, f"{self.name}.attn1", "merge_stage=True")
        weigh = self.container.owner.config.prop_attn
        if not weigh and (self.family.bias is None or kwargs.get(self.family.bias) is None):
            return args, kwargs
        token_map = self._stage(call).map
        return args, _merge_bias(self.name, args[0], kwargs, token_map, self.family, weigh)

    def enter_attn2(self, attn: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        _, kwargs = _take_call(kwargs)
        _refuse_caches(attn, f"{self.name}.attn2", "merge_stage=True")
        _refuse_ip_masks(kwargs, "merge_stage=True")
        return args, kwargs

    def _call(self, args: Args, kwargs: Kwargs) -> Call | None:
        if self.carrier is None:
            return self.container.last
        return (self.carrier.get(args, kwargs) or {}).get(OWNER)

    def _stage(self, call: Call | None) -> Stage:
        if call is None or call.stage is None:
            raise RuntimeError(
                f"tomesd: a part of the stage of {self.name} was called without the rest of it: call the "
                "whole network, or remove_patch first"
            )
        return call.stage


def _pays(work: Work, config: MergeConfig, grid: Grid, x: Tensor) -> bool:
    # torch.compile may take the sides of an image as unknown; the answer is for these ones.
    return pays(work, config, index(grid.h), index(grid.w), index(x.shape[0]), x.dtype, x.device)


def _take_call(kwargs: Kwargs) -> tuple[Call | None, Kwargs]:
    """Takes the call out of what a container has handed on to attention."""
    return kwargs.get(OWNER), {name: value for name, value in kwargs.items() if name != OWNER}


def _refuse_caches(attn: nn.Module, name: str, option: str) -> None:
    hooks = getattr(getattr(attn, "_diffusers_hook", None), "hooks", {})
    for cache in CACHES:
        if cache in hooks:
            raise ValueError(
                f"tomesd: {name} is cached by diffusers' {cache}, which gives back the tokens of another "
                f"step: use either the cache or {option}"
            )


def _refuse_ip_masks(kwargs: Kwargs, option: str) -> None:
    if kwargs.get("ip_adapter_masks") is not None:
        raise ValueError(
            "tomesd: ip_adapter_masks belong to all tokens of the image and cannot be used with "
            f"{option}: patch without it"
        )


def _merge_bias(
    name: str, x: Tensor, kwargs: Kwargs, token_map: TokenMap, family: Family, weigh: bool
) -> Kwargs:
    """What is added to the logits of `attn1`, for keys that have merged.

    A mask or bias of the keys is merged, `[B, N]` or `[B, 1, N]`; the least visible token decides. If keys
    are to be weighed, one counts as often as tokens have merged into it.
    """
    if family.bias is None or token_map.is_identity or kwargs.get(family.keys) is not None:
        return kwargs
    bias: Tensor | None = kwargs.get(family.bias)
    if bias is not None:
        least = -token_map.merge(-_mask_of_keys(name, bias, token_map).to(torch.float32), "amax")
        bias = least.to(bias.dtype).view(*bias.shape[:-1], token_map.groups)
    if weigh:
        sizes = token_map.sizes.to(torch.float32).log().to(x.dtype)[:, None].expand(x.shape[0], -1, -1)
        bias = sizes if bias is None else sizes + bias.view(x.shape[0], 1, -1)
    return {**kwargs, family.bias: bias}


def _mask_of_keys(name: str, bias: Tensor, token_map: TokenMap) -> Tensor:
    """A mask or bias of keys as `[B, N]`."""
    if bias.shape[-1] != token_map.tokens or bias.dim() > 3 or (bias.dim() == 3 and bias.shape[1] != 1):
        raise ValueError(
            f"tomesd: {name} got a self-attention mask of shape {list(bias.shape)}; only masks of its "
            f"keys, [B, {token_map.tokens}] or [B, 1, {token_map.tokens}], can be merged"
        )
    return bias.flatten(1)


def _detach(network: nn.Module) -> bool:
    """Takes the patch off a network; whether there was one."""
    owner = patch_of(network)
    if owner is None:
        return False
    for handle in owner.handles:
        handle.remove()
    delattr(network, OWNER)
    return True
