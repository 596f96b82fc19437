"""Merging in vision transformers, layer by layer.

Nothing of a host's code is restated. In each block

    x = x + attn(norm1(x))
    x = x + mlp(norm2(x))

a hook on the attention adds the sizes of its keys, and one on norm2 merges the tokens. At the end of the
second half a hook adds what merging changed to its result y and gives that back to all tokens, and a hook on
the block keeps the tokens that survive. That is what ToMe computes: a survivor of value s that has merged
into m becomes s + (y + m - s) = m + y.

From outside a block gives and takes tokens on the original grid, so dense outputs, hidden states, pooling
and heads need no care: what they see is constant on groups of tokens. Blocks hand merged tokens to each other
only inside of an `nn.Sequential` whose blocks have no other hooks, where nobody looks in between. Which
tokens are merged travels with the tokens, as an attribute of the tensor: so activation checkpointing
recomputes each block on what it was given.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ..hosts.family import Network, Site
from ..hosts.hooks import Args, Argument, Kwargs, Patch, PerThread
from ..hosts.vits import VisionFamily
from ..maths.attention import key_bias, take_rope
from ..maths.grid import alternate
from ..maths.matching import match_exact
from ..maths.token_map import TokenMap, in_full_precision
from . import options
from .schedule import parse_r

STATE = "_tomesd_state"
# Tokens are compared by so many of their channels: with 128 of 384 DINOv2-S keeps its accuracy, with 64 it
# does not, and with all of 768 ViT-B loses some of its speed.
CHANNELS = 128
# Index and survivors of the merged tokens, and whether nobody looks at them before the last block.
State: TypeAlias = tuple[tuple[Tensor, Tensor] | None, bool]

Metric: TypeAlias = Literal["tokens", "keys"]
Mode: TypeAlias = Literal["mlerp", "mean"]


@dataclass(frozen=True)
class MergeLayers:
    """What `tomesd.vit.apply_patch` was given, checked once; it explains each option."""

    trace_source: bool
    prop_attn: bool | None
    metric: Metric
    mode: Mode

    def __post_init__(self) -> None:
        options.boolean("trace_source", self.trace_source)
        options.boolean_or_none("prop_attn", self.prop_attn)
        options.one_of("metric", self.metric, get_args(Metric))
        options.one_of("mode", self.mode, get_args(Mode))


@dataclass(eq=False)
class Forward:
    """What is known of a network during one forward."""

    masked: bool = True  # whether attention may be given a mask of the caller's
    maps: list[TokenMap | None] = field(default_factory=list)  # after each layer, where they are kept


class LayersPatch(Patch):
    """All that tomesd holds on one vision transformer."""

    def __init__(self, model: nn.Module, network: Network[VisionFamily], method: MergeLayers) -> None:
        super().__init__()
        self.model = model
        self.network = network.module
        self.name = str(network)
        self.method = method
        self.trace_source = method.trace_source
        self.prop_attn = network.family.prop_attn if method.prop_attn is None else method.prop_attn
        self.protected = network.family.prefix(network.module)
        self.layers = len(network.sites)
        self.sequence_first = False
        self.own = PerThread(Forward)
        self.maps: list[TokenMap | None] = [None] * self.layers
        self.parsed: tuple[Any, list[int]] = (None, [])
        self.mask: Argument | None = None

    def attach(self, network: Network[VisionFamily]) -> None:
        """Registers all hooks."""
        for layer, site in enumerate(network.sites):
            LayerHooks(self, layer, network.path(site), site)
        if "attention_mask" in inspect.signature(type(network.module).forward).parameters:
            self.mask = Argument(network.module, "attention_mask")
            self.before(network.module, self.look_for_mask)
            self.after(network.module, self.forget_mask)
        container = network.sites[0].container
        if isinstance(container, nn.Sequential):
            self.before(container, self.enter)
            self.after(container, self.leave, first=True)

    def __getitem__(self, key: str) -> Any:
        """What `_tome_info` of the ToMe package has: `r`, `source`, `trace_source`, `prop_attn`."""
        if key == "source":
            return self.source(-1).source_matrix()
        if key not in ("r", "trace_source", "prop_attn"):
            raise KeyError(f"{key!r} is none of r, source, trace_source, prop_attn")
        return getattr(self, key)

    @property
    def r(self) -> Any:
        """What the network itself says, or else the model that was patched."""
        return vars(self.network).get("r", self.model.r)

    @property
    def schedule(self) -> list[int]:
        """How many tokens are to merge in each layer."""
        r = self.r
        key = type(r), tuple(r) if isinstance(r, list) else r  # a list may be changed in place
        known, schedule = self.parsed
        if known == key:
            return schedule
        try:
            schedule = parse_r(self.layers, r)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        if not torch.compiler.is_compiling():
            self.parsed = key, schedule
        return schedule

    def source(self, layer: int) -> TokenMap:
        """The map from the original tokens to those after a layer of the last forward."""
        if not isinstance(layer, int) or not -self.layers <= layer < self.layers:
            raise ValueError(f"layer must be from {-self.layers} to {self.layers - 1}, got {layer!r}")
        found = self.maps[layer]
        if found is None:
            raise RuntimeError("no sources yet: run the model first")
        return found

    def look_for_mask(self, network: nn.Module, args: Args, kwargs: Kwargs) -> None:
        # Under torch.export blocks are given a mask that hides nothing: is there one of the caller's?
        assert self.mask is not None
        self.own.get().masked = self.mask.get(args, kwargs) is not None

    def forget_mask(self, network: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> None:
        self.own.get().masked = True

    def enter(self, container: nn.Sequential, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        """Tells the first block whether nobody looks at the tokens between the blocks."""
        if any(len(block._forward_hooks) > 1 or len(block._forward_pre_hooks) > 1 for block in container):
            return None
        x = args[0].view_as(args[0])
        setattr(x, STATE, (None, True))
        return (x, *args[1:]), kwargs

    def leave(self, container: nn.Sequential, args: Args, kwargs: Kwargs, x: Tensor) -> Tensor:
        """Gives back the tokens that the blocks have handed on merged."""
        if not any(self.schedule):
            return x
        carried, inside = _state(x, f"the end of {self.name}'s blocks")
        if carried is None or not inside:
            return x
        return self.turned(carried.unmerge(self.turned(x)))

    def turned(self, x: Tensor) -> Tensor:
        """Tokens `[B, N, C]` as this network orders them, and back."""
        return x.transpose(0, 1) if self.sequence_first else x


@dataclass(eq=False)
class LayerCall:
    """What is known of a block during one call of it."""

    r: int = 0  # how many tokens are to merge
    inside: bool = False  # whether nobody looks at the tokens before the last block
    handed: State | None = None  # of the tokens that the block itself was given
    before: TokenMap | None = None  # which tokens the blocks before it have merged
    size: Tensor | None = None  # how many tokens each one stands for
    metric: Tensor | None = None  # what tokens are compared by, if not by themselves
    map: TokenMap | None = None  # which tokens merge here
    gain: Tensor | None = None  # what merging changed in those that survive


class LayerHooks:
    """Merges the tokens of one block between its attention and its second half."""

    def __init__(self, patch: LayersPatch, layer: int, name: str, site: Site) -> None:
        self.patch = patch
        self.layer = layer
        self.name = name
        self.own = PerThread(LayerCall)
        block, part = site.block, site.block.attn
        attn = site.module.get_submodule(part.path)
        assert part.bias is not None
        assert block.middle is not None
        assert block.end is not None
        self.tokens = Argument(site.module, block.tokens, 0)
        self.attended = Argument(attn, part.tokens, 0)
        self.bias = Argument(attn, part.bias)
        self.rope = Argument(attn, part.rope) if part.rope else None
        first, middle = (site.module.get_submodule(path) for path in (block.input, block.middle))
        self.given, self.halfway = Argument(first, "", 0), Argument(middle, "", 0)
        self.head_dim = getattr(attn, "head_dim", None)
        shows_keys = part.key_layer is not None and self.head_dim is not None
        if patch.method.metric == "keys" and not shows_keys and not isinstance(attn, nn.MultiheadAttention):
            raise ValueError(
                f"the keys of {name}.{part.path} cannot be seen (its row has no key_layer, or "
                f'{type(attn).__name__} no head_dim): take metric="tokens"'
            )
        patch.sequence_first = getattr(attn, "batch_first", True) is False
        patch.before(site.module, self.enter)
        patch.before(first, self.begin)
        patch.before(attn, self.enter_attention)
        patch.after(attn, self.leave_attention, first=True)
        if part.key_layer is not None:
            patch.after(attn.get_submodule(part.key_layer), self.keep_keys)
        patch.before(middle, self.merge)
        patch.after(site.module.get_submodule(block.end), self.unmerge)
        patch.after(site.module, self.leave, first=True)

    def enter(self, block: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        self.own.get().handed = None
        x = self.tokens.get(args, kwargs)
        if isinstance(x, torch.fx.Proxy):
            raise RuntimeError(
                "tomesd: torch.fx does not see which tokens merge (feature extractors use it): remove_patch "
                "first, or read hidden states or forward_intermediates of the model itself"
            )
        if self.layer == 0 and self.patch.trace_source:
            self.patch.maps = self.patch.own.get().maps = [None] * self.patch.layers
        if not any(self.patch.schedule[: self.layer]):
            return None
        before, inside = _state(x, self.name)
        self.own.get().handed = getattr(x, STATE)
        if before is None or inside:
            return None
        merged = self.patch.turned(before.merge(self.patch.turned(x), "drop"))
        setattr(merged, STATE, getattr(x, STATE))
        return self.tokens.put(args, kwargs, merged)

    def begin(self, part: nn.Module, args: Args, kwargs: Kwargs) -> None:
        # Not at the block itself: what checkpointing of transformers recomputes begins after its hooks.
        x, schedule, own = self.given.get(args, kwargs), self.patch.schedule, self.own.get()
        handed, own.handed = own.handed, None
        if handed is not None and not hasattr(x, STATE):
            setattr(x, STATE, handed)  # accelerate has moved the tokens to the device of this block
        own.before, own.inside = None, False
        if any(schedule[: self.layer]):
            own.before, own.inside = _state(x, self.name)
        elif hasattr(x, STATE):
            own.inside = _state(x, self.name)[1]
        own.r = schedule[self.layer]
        own.size = None if own.before is None else own.before.sizes
        own.map = own.metric = own.gain = None

    def enter_attention(self, attn: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        own, patch = self.own.get(), self.patch
        x = self.attended.get(args, kwargs)
        if isinstance(attn, nn.MultiheadAttention) and self._needs_keys:
            own.metric = _mean_keys(attn, patch.turned(x))
        if own.r == 0 and own.before is None:
            return None
        kind = getattr(getattr(attn, "config", None), "_attn_implementation", "sdpa")
        if patch.prop_attn and kind not in ("eager", "sdpa"):
            raise ValueError(
                f"tomesd: {kind} takes no sizes of tokens: set_attn_implementation('sdpa'), or patch with "
                "prop_attn=False"
            )
        given = self.bias.get(args, kwargs) is not None
        if (given and patch.own.get().masked) or kwargs.get("is_causal"):
            raise ValueError(
                f"tomesd: {self.name} was given an attention mask, which merged tokens have none of"
            )
        if own.before is None:
            return None
        if given:  # it hides nothing
            args, kwargs = self.bias.put(args, kwargs, None)
        if self.rope is not None:
            keep = own.before.keep[:, patch.protected :] - patch.protected
            args, kwargs = self.rope.put(args, kwargs, take_rope(self.rope.get(args, kwargs), keep))
        if patch.prop_attn:
            assert own.size is not None
            bias = key_bias(own.size, x.dtype)
            if isinstance(attn, nn.MultiheadAttention):
                bias = bias[:, 0, 0]
            args, kwargs = self.bias.put(args, kwargs, bias)
        return args, kwargs

    def leave_attention(self, attn: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        """Gives attention weights, where asked for, on the original grid: `[B, heads, N, N]`."""
        own = self.own.get()
        before, size = own.before, own.size
        if before is None or size is None or not isinstance(output, tuple) or output[1] is None:
            return output
        rows = before.unmerge(output[1].transpose(1, 2))
        share = rows / size[:, None, None, :]
        weights = before.unmerge(share.permute(0, 3, 1, 2)).permute(0, 3, 2, 1)
        return (output[0], weights, *output[2:])

    def keep_keys(self, part: nn.Module, args: Args, kwargs: Kwargs, keys: Tensor) -> None:
        if not self._needs_keys:
            return
        if keys.dim() == 3:  # [B, N, heads * D]
            keys = keys.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        self.own.get().metric = keys.detach().mean(1)

    def merge(self, part: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        own, patch = self.own.get(), self.patch
        x = patch.turned(self.halfway.get(args, kwargs))
        r = min(own.r, (x.shape[1] - patch.protected) // 2)
        if r <= 0:
            return None
        metric = x.detach()[..., :CHANNELS] if own.metric is None else own.metric
        partition = alternate(x.shape[1], patch.protected, x.device)
        # In half precision many cosines near 1 are equal, and the accuracy of the model suffers.
        with in_full_precision(x):
            token_map = match_exact(metric.float(), partition, r)
        size = None if own.size is None else own.size.expand(x.shape[0], -1)
        merged = token_map.merge(x, patch.method.mode, size)
        own.map, own.gain = token_map, merged - token_map.merge(x, "drop")
        return self.halfway.put(args, kwargs, patch.turned(merged))

    def unmerge(self, part: nn.Module, args: Args, kwargs: Kwargs, output: Tensor) -> Tensor:
        own, patch = self.own.get(), self.patch
        gain, own.gain = own.gain, None
        if own.map is None or gain is None:
            return output
        return patch.turned(own.map.unmerge(patch.turned(output) + gain))

    def leave(self, block: nn.Module, args: Args, kwargs: Kwargs, output: Tensor) -> Tensor:
        own, patch = self.own.get(), self.patch
        after, x = own.before, patch.turned(output)
        if own.map is not None:
            x = own.map.merge(x, "drop")
            after = own.map if after is None else after.compose(own.map)
        if after is not None and not own.inside:
            x = after.unmerge(x)
        maps = patch.own.get().maps
        if patch.trace_source and maps:
            maps[self.layer] = after or TokenMap.identity(x.shape[1], x.device)
        own.before = own.map = own.size = own.metric = own.gain = None
        x = patch.turned(x)
        if any(patch.schedule[: self.layer + 1]):
            setattr(x, STATE, (None if after is None else (after.index, after.keep), own.inside))
        return x

    @property
    def _needs_keys(self) -> bool:
        return self.own.get().r > 0 and self.patch.method.metric == "keys"


def _state(x: Tensor, where: str) -> tuple[TokenMap | None, bool]:
    """Which tokens of `x` are merged, and whether nobody looks at them before the last block."""
    if not hasattr(x, STATE):
        raise RuntimeError(
            f"tomesd: the tokens at {where} do not come straight from the block before it. Something between "
            "them made a new tensor: a hook, an adapter, FSDP, or activation checkpointing with "
            "use_reentrant=True (use_reentrant=False works). Without it, or with model.r = 0, it runs"
        )
    carried, inside = getattr(x, STATE)
    return (None if carried is None else TokenMap(*(part.to(x.device) for part in carried))), inside


def _mean_keys(attn: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """The mean over heads of the keys of tokens `[B, N, C]`: `[B, N, D]`."""
    # F.multi_head_attention_forward does not show its keys; their mean is linear in the tokens.
    c, heads = attn.embed_dim, attn.num_heads
    with torch.no_grad():
        weight, bias = attn.in_proj_weight[c : 2 * c], attn.in_proj_bias
        bias = None if bias is None else bias[c : 2 * c].unflatten(0, (heads, -1)).mean(0)
        return F.linear(x, weight.unflatten(0, (heads, -1)).mean(0), bias)
