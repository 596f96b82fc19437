"""What a patch on a vision transformer holds: options, `r`, and what the last forward merged."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor, nn

from ..hosts.family import Network, submodule
from ..hosts.hooks import Args, Argument, Kwargs, Patch, PerThread
from ..hosts.vision import VisionFamily
from ..maths.devices import constant
from ..maths.token_map import TokenMap
from . import options
from .layers_state import STATE, Unmerge, state_of
from .schedule import parse_r

Metric: TypeAlias = Literal["tokens", "keys"]
Mode: TypeAlias = Literal["mlerp", "mean"]
SCRIPTED = "__prepare_scriptable__"
Hook = TypeVar("Hook", bound=Callable[..., Any])


@dataclass(frozen=True)
class MergeLayers:
    """What `tomesd.vit.apply_patch` was given, checked once; it explains each option."""

    trace_source: bool
    prop_attn: bool | None
    metric: Metric
    mode: Mode
    unmerge: Unmerge = "copy"

    def __post_init__(self) -> None:
        options.boolean("trace_source", self.trace_source)
        options.boolean_or_none("prop_attn", self.prop_attn)
        options.one_of("metric", self.metric, get_args(Metric))
        options.one_of("mode", self.mode, get_args(Mode))
        options.one_of("unmerge", self.unmerge, get_args(Unmerge))


@dataclass(eq=False)
class Forward:
    """What is known of a network during one forward."""

    masked: bool = True  # whether attention may be given a mask of the caller's
    maps: list[TokenMap | None] = field(default_factory=list)  # after each layer, where they are kept


class Hooked(NamedTuple):
    """A part of a block that has hooks."""

    module: nn.Module
    wrappable: bool  # whether an adapter around it may come later, which calls it and adds to what it returns


class ParsedR(NamedTuple):
    """What an `r` says."""

    steps: list[int | float]  # how many tokens are to merge in each layer, or which share of them
    first: int  # the first layer in which any do

    @classmethod
    def of(cls, layers: int, r: Any) -> ParsedR:
        steps = parse_r(layers, r)
        return cls(steps, next((layer for layer, step in enumerate(steps) if step), layers))


class Hooks:
    """Hooks on modules of one network, as bound methods.

    A copy of a module takes its hooks along, but nothing of what they know: empty, they do nothing. The copy
    of a whole network has a copy of its patch, which fills them.
    """

    patch: LayersPatch

    def __getstate__(self) -> None:
        return None

    def look_for_replaced(self, block: nn.Module, name: str, parts: Mapping[str, Hooked]) -> None:
        """Raises an error if a part of a block to which these hooks belong is no longer there."""
        for path, (known, wrappable) in parts.items():
            part: Any = block
            for step in path.split(".") if "." in path else (path,):
                part = getattr(part, step, None)
            if is_same(part, known):
                continue
            inside = list(part.modules()) if wrappable and isinstance(part, nn.Module) else []
            # Adapters that train a copy of a part keep it, and call the copy.
            copied = any(is_copy(hook) for module in inside for hook in hooks_of(module))
            if copied or known not in inside:
                kind = type(part).__name__
                raise RuntimeError(
                    f"tomesd: {name}.{path} was replaced after apply_patch, by a {kind}: patch again"
                )


def is_same(module: Any, known: nn.Module) -> bool:
    """Whether a module is one that is known, or what DataParallel or torch.export puts in its place."""
    # Those have its table of hooks, and not one like it.
    return module is known or getattr(module, "_forward_hooks", None) is known._forward_hooks


def is_watched(block: nn.Module) -> bool:
    """Whether somebody looks at what a block is given or returns, or at its gradients, beside our hooks."""
    looks = len(block._forward_hooks) > 1 or len(block._forward_pre_hooks) > 1
    return looks or bool(block._backward_hooks or block._backward_pre_hooks)


def hooks_of(module: nn.Module) -> tuple[Any, ...]:
    """All that is called before and after a module."""
    return (*module._forward_pre_hooks.values(), *module._forward_hooks.values())


def is_copy(hook: Any) -> bool:
    """Whether a hook is an empty one, on a copy of a part."""
    owner = getattr(hook, "__self__", None)
    return isinstance(owner, Hooks) and not hasattr(owner, "patch")


def where_filled(hook: Hook) -> Hook:
    """A hook that does nothing on a copy of a part."""

    @wraps(hook)
    def filled(self: Hooks, *args: Any) -> Any:
        return hook(self, *args) if hasattr(self, "patch") else None

    return filled  # type: ignore[return-value]


class Holder:
    """The model that was patched, whose `r` its networks read; its `_tome_info`."""

    def __init__(self, model: nn.Module, patches: list[LayersPatch]) -> None:
        self.__setstate__({"model": model, "patches": patches})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.model: nn.Module = state["model"]
        self.patches: list[LayersPatch] = state["patches"]
        for patch in self.patches:
            patch.holder = self

    def __getitem__(self, key: str) -> Any:
        """What `_tome_info` of the ToMe package has."""
        return self.patches[-1].info(key)


class LayersPatch(Patch):
    """All that tomesd holds on one vision transformer."""

    def __init__(self, network: Network[VisionFamily], method: MergeLayers) -> None:
        super().__init__()
        family = network.family
        self.network = network.module
        self.name = str(network)
        self.method = method
        self.trace_source = method.trace_source
        self.prop_attn = family.prop_attn if method.prop_attn is None else method.prop_attn
        self.protected = family.count("prefix", network.module)
        self.last = family.count("suffix", network.module)
        self.distilled = family.distilled(network.module)
        self.layers = len(network.sites)
        self.sequence_first = False
        self.own = PerThread(Forward)
        self.maps: list[TokenMap | None] = [None] * self.layers
        self.parsed: tuple[Any, ParsedR] = (None, ParsedR([], self.layers))
        self.hooks: list[Hooks] = []
        # Copies of the network alone have no holder, and merge as it did when they were made.
        self.holder: Holder | None = None
        self.last_r: Any = 0

    def __getstate__(self) -> dict[str, Any]:
        contents = [
            {name: value for name, value in vars(hook).items() if name != "patch"} for hook in self.hooks
        ]
        state = {**super().__getstate__(), "holder": None, "last_r": self.r}
        return {**state, "contents": contents}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        for hook, contents in zip(self.hooks, vars(self).pop("contents"), strict=True):
            vars(hook).update(contents, patch=self)

    def remove(self) -> None:
        """Takes all hooks off."""
        super().remove()
        vars(self.network).pop(SCRIPTED, None)

    def info(self, key: str) -> Any:
        """What `_tome_info` of the ToMe package has by this name."""
        known: dict[str, Callable[[], Any]] = {
            "r": lambda: self.r,
            "size": lambda: self.source(-1).sizes[..., None],
            "source": lambda: self.source(-1).source_matrix(),
            "trace_source": lambda: self.trace_source,
            "prop_attn": lambda: self.prop_attn,
            "class_token": lambda: self.protected > 0,
            "distill_token": lambda: self.distilled,
        }
        if key not in known:
            raise KeyError(f"{key!r} is none of {', '.join(known)}")
        return known[key]()

    @property
    def r(self) -> Any:
        """What the network itself says, or else the model that was patched."""
        own = vars(self.network)
        if "r" in own:
            return own["r"]
        return self.last_r if self.holder is None else self.holder.model.r

    @property
    def schedule(self) -> ParsedR:
        """How many tokens are to merge in each layer."""
        r = self.r
        if torch.compiler.is_compiling():  # which would look at what is kept here too
            kind = next((kind for kind in (list, tuple) if isinstance(r, kind)), None)
            return self.parse(constant(r) if kind is None else kind(map(constant, r)))
        key = type(r), tuple(r) if isinstance(r, list) else r  # a list may be changed in place
        known, schedule = self.parsed
        if known != key:
            schedule = self.parse(r)
            self.parsed = key, schedule
        return schedule

    def parse(self, r: Any) -> ParsedR:
        """The schedule of an `r`; a ValueError or TypeError if it is none."""
        try:
            return ParsedR.of(self.layers, r)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None

    def source(self, layer: int) -> TokenMap:
        """The map from the original tokens to those after a layer of the last forward."""
        layer = options.integer("layer", layer)
        if not -self.layers <= layer < self.layers:
            raise ValueError(f"layer must be from {-self.layers} to {self.layers - 1}, got {layer!r}")
        if not self.trace_source:
            raise ValueError("no sources are kept: patch the model with trace_source=True")
        found = self.maps[layer]
        if found is None:
            raise RuntimeError("no sources yet: run the model first")
        return found

    def turned(self, x: Tensor) -> Tensor:
        """Tokens `[B, N, C]` as this network orders them, and back."""
        return x.transpose(0, 1) if self.sequence_first else x


class NetworkHooks(Hooks):
    """Looks for masks that are given to a network, and hands merged tokens from block to block."""

    def __init__(self, patch: LayersPatch, network: Network[VisionFamily]) -> None:
        self.patch = patch
        module, container = network.module, network.sites[0].container
        self.path = network.family.path
        self.blocks = [site.module for site in network.sites]
        patch.before(module, self.look_for_blocks)
        # Not every call is of the network itself: timm's forward_features is called alone.
        others = [child for name, child in module.named_children() if name != self.path.partition(".")[0]]
        for first in others[:1]:
            patch.before(first, self.look_for_blocks)
        names = inspect.signature(type(module).forward).parameters
        # The name of some is that of a mask of patches, from which they make one of attention.
        self.masks = [Argument(module, name) for name in names if name.endswith("attention_mask")]
        if self.masks:
            patch.before(module, self.look_for_mask)
            patch.after(module, self.forget_mask)
        if isinstance(container, nn.Sequential):
            patch.before(container, self.enter)
            patch.after(container, self.leave, first=True)
        vars(module)[SCRIPTED] = self.refuse_to_be_scripted

    def refuse_to_be_scripted(self) -> None:
        """Called by `torch.jit.script` first of all."""
        raise RuntimeError(
            "tomesd: torch.jit.script cannot read hooks: remove_patch first, or take torch.jit.trace, "
            "torch.export or torch.compile"
        )

    @where_filled
    def look_for_blocks(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Raises an error if there is a block that was not there when the network was patched."""
        container = submodule(self.patch.network, self.path)
        if container is None or self.patch.schedule.first == self.patch.layers:
            return
        for place, (name, block) in enumerate(container._modules.items()):
            if block is None or (place < len(self.blocks) and is_same(block, self.blocks[place])):
                continue
            if any(is_same(block, known) for known in self.blocks):
                raise RuntimeError(f"tomesd: {self.path}.{name} had another place before: patch again")
            # Sharding and the like wrap blocks.
            if not any(part is known for part in block.modules() for known in self.blocks):
                raise RuntimeError(
                    f"tomesd: {self.path}.{name} came after apply_patch, or is a copy of a block: patch again"
                )

    @where_filled
    def look_for_mask(self, network: nn.Module, args: Args, kwargs: Kwargs) -> None:
        # Under torch.export blocks are given a mask that hides nothing: is there one of the caller's?
        self.patch.own.get().masked = any(mask.get(args, kwargs) is not None for mask in self.masks)

    @where_filled
    def forget_mask(self, network: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> None:
        self.patch.own.get().masked = True

    @where_filled
    def enter(self, container: nn.Sequential, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        """Tells the first block whether nobody looks at the tokens between the blocks."""
        self.look_for_blocks(container, args, kwargs)
        if any(map(is_watched, container)):
            return None
        x = args[0].view_as(args[0])
        setattr(x, STATE, (None, True))
        return (x, *args[1:]), kwargs

    @where_filled
    def leave(self, container: nn.Sequential, args: Args, kwargs: Kwargs, x: Tensor) -> Tensor:
        """Gives back the tokens that the blocks have handed on merged."""
        patch = self.patch
        if patch.schedule.first == patch.layers:
            return x
        merged, inside = state_of(x, f"the end of {patch.name}'s blocks")
        if merged is None or not inside:
            return x
        return patch.turned(merged.give_back(patch.turned(x)))
