"""apply_patch and remove_patch for vision transformers, through forward hooks alone.

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

import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar, cast, get_args

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..hooks import Args, Argument, Kwargs, recompile
from ..matching import match_exact
from ..partition import alternate
from ..token_map import TokenMap
from .attention import key_bias
from .families import Network, Parts, find_networks
from .schedule import parse_r

OWNER = "_tomesd"
STATE = "_tomesd_state"
# Tokens are compared by so many of their channels: with 128 of 384 DINOv2-S keeps its accuracy, with 64 it
# does not, and with all of 768 ViT-B loses some of its speed.
CHANNELS = 128
# What a block knows during a forward only.
TRANSIENT = ("handed", "before", "map", "size", "metric", "gain")
# Index and survivors of the merged tokens, and whether nobody looks at them before the last block.
State: TypeAlias = tuple[tuple[Tensor, Tensor] | None, bool]

Model = TypeVar("Model", bound=nn.Module)
Metric: TypeAlias = Literal["tokens", "keys"]
Mode: TypeAlias = Literal["mlerp", "mean"]


def apply_patch(
    model: Model,
    trace_source: bool = False,
    prop_attn: bool | None = None,
    *,
    metric: Metric = "tokens",
    mode: Mode = "mlerp",
) -> Model:
    """Makes the vision transformers in a model merge `model.r` tokens in each layer.

    `model.r` is 0 at first and may be set at any time; `parse_r` has its forms. At most half of the tokens
    that may merge do so in one layer. Class, distillation and register tokens never merge. A patched model
    is patched anew.

    Args:
        model: a module of timm, torchvision, SWAG, MAE or transformers, or one that holds such.
        trace_source: keep which tokens merged, for `source`.
        prop_attn: let attention count a merged token as many times as it has tokens; by default True, but for
            MAE. False is for models that are trained with merging.
        metric: compare the tokens as they are after attention (their first 128 channels), or the keys of
            attention, as ToMe does.
        mode: give a merged token the mean of its tokens, as ToMe does, or (`"mlerp"`; Kim et al., Token
            Fusion, 2024) the direction of the mean with the largest of their norms. ToMe's two choices are
            for training and for models that were trained with it; the defaults lose less accuracy without.

    Returns:
        The same model.

    Raises:
        TypeError: the model is no module, or an option is of the wrong type.
        ValueError: it holds no vision transformer of a known family, or one whose tokens cannot be merged,
            or an option is none of those above.

    Source: Bolya et al., Token Merging: Your ViT But Faster, 2023.
    """
    return _apply(model, None, Options(trace_source, prop_attn, metric, mode))


def timm(
    model: Model,
    trace_source: bool = False,
    prop_attn: bool | None = None,
    *,
    metric: Metric = "tokens",
    mode: Mode = "mlerp",
) -> Model:
    """`apply_patch` for models of timm."""
    return _apply(model, "timm", Options(trace_source, prop_attn, metric, mode))


def swag(
    model: Model,
    trace_source: bool = False,
    prop_attn: bool | None = None,
    *,
    metric: Metric = "tokens",
    mode: Mode = "mlerp",
) -> Model:
    """`apply_patch` for models of SWAG and torchvision."""
    return _apply(model, "swag", Options(trace_source, prop_attn, metric, mode))


def mae(
    model: Model,
    trace_source: bool = False,
    prop_attn: bool = False,
    *,
    metric: Metric = "tokens",
    mode: Mode = "mlerp",
) -> Model:
    """`apply_patch` for models of MAE, which are timm's, without proportional attention by default."""
    return _apply(model, "timm", Options(trace_source, prop_attn, metric, mode))


def transformers(
    model: Model,
    trace_source: bool = False,
    prop_attn: bool | None = None,
    *,
    metric: Metric = "tokens",
    mode: Mode = "mlerp",
) -> Model:
    """`apply_patch` for models of transformers."""
    return _apply(model, "transformers", Options(trace_source, prop_attn, metric, mode))


def remove_patch(model: Model) -> Model:
    """Takes every trace of `apply_patch` off a model and returns it; unpatched models are left as they are.

    Raises:
        TypeError: the model is no module.
        ValueError: it holds no vision transformer of a known family.
    """
    patched_before = [_detach(network.module) for network in find_networks(model)]
    if any(patched_before):
        recompile()
    return model


def source(model: nn.Module, layer: int = -1) -> TokenMap:
    """Which of the original tokens, class token and all, each token held after a layer of the last forward.

    Args:
        layer: counted from 0, or from the last one backwards.

    Raises:
        ValueError: the model is not patched, or not with `trace_source=True`, or has several networks, or no
            such layer.
        RuntimeError: it did not run yet.
    """
    patches = [vars(network.module).get(OWNER) for network in find_networks(model)]
    if len(patches) > 1:
        raise ValueError(f"{type(model).__name__} holds {len(patches)} vision transformers: pass one of them")
    if patches[0] is None or not patches[0].trace_source:
        raise ValueError("no sources are kept: patch the model with trace_source=True")
    return patches[0].source(layer)


@dataclass(frozen=True)
class Options:
    """What `apply_patch` was given, checked once; it explains each."""

    trace_source: bool
    prop_attn: bool | None
    metric: Metric
    mode: Mode

    def __post_init__(self) -> None:
        if not isinstance(self.trace_source, bool):
            raise TypeError(f"trace_source must be a bool, got {self.trace_source!r}")
        if not isinstance(self.prop_attn, bool | None):
            raise TypeError(f"prop_attn must be a bool or None, got {self.prop_attn!r}")
        for name, known in (("metric", get_args(Metric)), ("mode", get_args(Mode))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")


def _apply(model: Model, package: str | None, options: Options) -> Model:
    networks = find_networks(model, package)
    holder = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
    if hasattr(holder, "r") and not any(True for _ in _patches_of(holder)):
        raise ValueError(
            f"{type(holder).__name__} has an attribute r of its own, which tomesd would overwrite"
        )
    for network in networks:
        _detach(network.module)
    for network in networks:
        setattr(network.module, OWNER, NetworkPatch(holder, network, options))
    recompile()
    return model


def _patches_of(holder: nn.Module) -> Iterator[NetworkPatch]:
    """The patches in a model that read its `r`."""
    for module in holder.modules():
        owner = vars(module).get(OWNER)
        if owner is not None and holder in (owner.model, module):
            yield owner


class NetworkPatch:
    """All that tomesd holds on one vision transformer: the options and the hooks.

    Users of the ToMe package know it as `model._tome_info`.
    """

    def __init__(self, model: nn.Module, network: Network, options: Options) -> None:
        self.model = model
        self.network = network.module
        self.name = network.name or type(network.module).__name__
        self.trace_source = options.trace_source
        self.prop_attn = network.family.prop_attn if options.prop_attn is None else options.prop_attn
        self.metric = options.metric
        self.mode = options.mode
        self.protected = network.family.prefix(network.module)
        self.layers = len(network.blocks)
        self.maps: list[TokenMap | None] = [None] * self.layers
        self.sequence_first = False
        self.handles: list[RemovableHandle] = []
        model.r = 0  # type: ignore[assignment]
        model._tome_info = self  # type: ignore[assignment]
        for i, (name, block, parts) in enumerate(network.blocks):
            BlockPatch(self, i, name, block, parts)
        self.masked = True
        self.mask: Argument | None = None
        if "attention_mask" in inspect.signature(type(network.module).forward).parameters:
            self.mask = Argument(network.module, "attention_mask")
            register = network.module.register_forward_pre_hook
            self.handles.append(register(self.look_for_mask, with_kwargs=True))
            self.handles.append(network.module.register_forward_hook(self.forget_mask))
        if isinstance(network.container, nn.Sequential):
            self.handles.append(network.container.register_forward_pre_hook(self.enter))
            self.handles.append(network.container.register_forward_hook(self.leave, prepend=True))

    def __getitem__(self, key: str) -> Any:
        known = {"r": lambda: self.r, "source": lambda: self.source(-1).source_matrix()}
        for name in ("trace_source", "prop_attn"):
            known[name] = functools.partial(getattr, self, name)
        if key not in known:
            raise KeyError(f"{key!r} is none of {', '.join(known)}")
        return known[key]()

    @property
    def r(self) -> Any:
        """What the network itself says, or else the model that was patched."""
        return vars(self.network).get("r", self.model.r)

    @property
    def schedule(self) -> list[int]:
        """How many tokens are to merge in each layer."""
        try:
            return parse_r(self.layers, self.r)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None

    def source(self, layer: int) -> TokenMap:
        """The map from the original tokens to those after a layer of the last forward."""
        if not isinstance(layer, int) or not -self.layers <= layer < self.layers:
            raise ValueError(f"layer must be from {-self.layers} to {self.layers - 1}, got {layer!r}")
        found = self.maps[layer]
        if found is None:
            raise RuntimeError("no sources yet: run the model first")
        return found

    def look_for_mask(self, network: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Blocks may be given a mask that hides nothing (under torch.export): is there one of the caller?"""
        self.masked = cast(Argument, self.mask).get(args, kwargs) is not None

    def forget_mask(self, network: nn.Module, args: Args, output: Any) -> None:
        self.masked = True

    def enter(self, container: nn.Sequential, args: Args) -> Args | None:
        """Tells the first block whether nobody looks at the tokens between the blocks."""
        if any(len(block._forward_hooks) > 1 or len(block._forward_pre_hooks) > 1 for block in container):
            return None
        x = args[0].view_as(args[0])
        setattr(x, STATE, (None, True))
        return (x, *args[1:])

    def leave(self, container: nn.Sequential, args: Args, x: Tensor) -> Tensor:
        """Gives back the tokens that the blocks have handed on merged."""
        if not any(self.schedule):
            return x
        carried, inside = _state(x, f"the end of {self.name}'s blocks")
        if carried is None or not inside:
            return x
        if self.sequence_first:
            return carried.unmerge(x.transpose(0, 1)).transpose(0, 1)
        return carried.unmerge(x)


class BlockPatch:
    """Merges the tokens of one block between its attention and its second half."""

    def __init__(self, owner: NetworkPatch, layer: int, name: str, block: nn.Module, parts: Parts) -> None:
        self.owner = owner
        self.layer = layer
        self.name = name
        self.r = 0
        self.inside = False
        self.handed: State | None = None
        self.before: TokenMap | None = None
        self.map: TokenMap | None = None
        self.size: Tensor | None = None
        self.metric: Tensor | None = None
        self.gain: Tensor | None = None
        attn = block.get_submodule(parts.attn)
        self.tokens = Argument(block, _first_parameter(block))
        self.bias = Argument(attn, parts.bias)
        self.rope = Argument(attn, parts.rope) if parts.rope else None
        self.head_dim = getattr(attn, "head_dim", 0)
        self.sequence_first = owner.sequence_first = getattr(attn, "batch_first", True) is False
        handles = owner.handles
        handles.append(block.register_forward_pre_hook(self.enter, with_kwargs=True))
        handles.append(block.get_submodule(parts.first).register_forward_pre_hook(self.begin))
        handles.append(attn.register_forward_pre_hook(self.enter_attention, with_kwargs=True))
        handles.append(attn.register_forward_hook(self.leave_attention, prepend=True))
        if parts.keys is not None:
            handles.append(attn.get_submodule(parts.keys).register_forward_hook(self.keep_keys))
        handles.append(block.get_submodule(parts.enter).register_forward_pre_hook(self.merge))
        handles.append(block.get_submodule(parts.leave).register_forward_hook(self.unmerge))
        handles.append(block.register_forward_hook(self.leave, prepend=True))

    def __getstate__(self) -> dict[str, Any]:
        # What a forward that failed has left behind has a history, which cannot be copied.
        return {**vars(self), **dict.fromkeys(TRANSIENT)}

    def enter(self, block: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        self.handed = None
        x = self.tokens.get(args, kwargs)
        if isinstance(x, torch.fx.Proxy):
            raise RuntimeError(
                "tomesd: torch.fx does not see which tokens merge (feature extractors use it): remove_patch "
                "first, or read hidden states or forward_intermediates of the model itself"
            )
        if self.layer == 0:
            self.owner.maps = [None] * self.owner.layers
        if not any(self.owner.schedule[: self.layer]):
            return None
        before, inside = _state(x, self.name)
        self.handed = getattr(x, STATE)
        if before is None or inside:
            return None
        merged = self._back(before.merge(self._batch_first(x), "drop"))
        setattr(merged, STATE, getattr(x, STATE))
        return self.tokens.put(args, kwargs, merged)

    def begin(self, part: nn.Module, args: Args) -> None:
        # Not at the block itself: what checkpointing of transformers recomputes begins after its hooks.
        x, schedule = args[0], self.owner.schedule
        handed, self.handed = self.handed, None
        if handed is not None and not hasattr(x, STATE):
            setattr(x, STATE, handed)  # accelerate has moved the tokens to the device of this block
        self.before, self.inside = None, False
        if any(schedule[: self.layer]):
            self.before, self.inside = _state(x, self.name)
        elif hasattr(x, STATE):
            self.inside = _state(x, self.name)[1]
        self.r = schedule[self.layer]
        self.size = None if self.before is None else self.before.sizes
        self.map = self.metric = self.gain = None

    def enter_attention(self, attn: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        if isinstance(attn, nn.MultiheadAttention) and self._needs_keys:
            self.metric = _mean_keys(attn, self._batch_first(args[0] if args else kwargs["query"]))
        if self.r == 0 and self.before is None:
            return None
        kind = getattr(getattr(attn, "config", None), "_attn_implementation", "sdpa")
        if self.owner.prop_attn and kind not in ("eager", "sdpa"):
            raise ValueError(
                f"tomesd: {kind} takes no sizes of tokens: set_attn_implementation('sdpa'), or patch with "
                "prop_attn=False"
            )
        given = self.bias.get(args, kwargs) is not None
        if (given and self.owner.masked) or kwargs.get("is_causal"):
            raise ValueError(
                f"tomesd: {self.name} was given an attention mask, which merged tokens have none of"
            )
        if self.before is None:
            return None
        if given:
            args, kwargs = self.bias.put(args, kwargs, None)
        if self.rope is not None:
            args, kwargs = self.rope.put(args, kwargs, self._take_rope(self.rope.get(args, kwargs)))
        if self.owner.prop_attn:
            x = args[0] if args else next(iter(kwargs.values()))
            bias = key_bias(cast(Tensor, self.size), x.dtype)
            if isinstance(attn, nn.MultiheadAttention):
                bias = bias[:, 0, 0]
            args, kwargs = self.bias.put(args, kwargs, bias)
        return args, kwargs

    def leave_attention(self, attn: nn.Module, args: Args, output: Any) -> Any:
        """Gives attention weights, where asked for, on the original grid: `[B, heads, N, N]`."""
        if self.before is None or not isinstance(output, tuple) or output[1] is None:
            return output
        rows = self.before.unmerge(output[1].transpose(1, 2))
        share = rows / cast(Tensor, self.size)[:, None, None, :]
        weights = self.before.unmerge(share.permute(0, 3, 1, 2)).permute(0, 3, 2, 1)
        return (output[0], weights, *output[2:])

    def keep_keys(self, part: nn.Module, args: Args, keys: Tensor) -> None:
        if not self._needs_keys:
            return
        if keys.dim() == 3:  # [B, N, heads * D]
            keys = keys.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        self.metric = keys.detach().mean(1)

    def merge(self, part: nn.Module, args: Args) -> Args | None:
        x = self._batch_first(args[0])
        r = min(self.r, (x.shape[1] - self.owner.protected) // 2)
        if r <= 0:
            return None
        metric = x.detach()[..., :CHANNELS] if self.metric is None else self.metric
        partition = alternate(x.shape[1], self.owner.protected, x.device)
        # In half precision many cosines near 1 are equal, and the accuracy of the model suffers.
        with torch.autocast(x.device.type, enabled=False):
            self.map = match_exact(metric.float(), partition, r)
        size = None if self.size is None else self.size.expand(x.shape[0], -1)
        merged = self.map.merge(x, self.owner.mode, size)
        self.gain = merged - self.map.merge(x, "drop")
        return (self._back(merged), *args[1:])

    def unmerge(self, part: nn.Module, args: Args, output: Tensor) -> Tensor:
        gain, self.gain = self.gain, None
        if self.map is None or gain is None:
            return output
        return self._back(self.map.unmerge(self._batch_first(output) + gain))

    def leave(self, block: nn.Module, args: Args, output: Tensor) -> Tensor:
        after, x = self.before, self._batch_first(output)
        if self.map is not None:
            x = self.map.merge(x, "drop")
            after = self.map if after is None else after.compose(self.map)
        if after is not None and not self.inside:
            x = after.unmerge(x)
        if self.owner.trace_source:
            self.owner.maps[self.layer] = after or TokenMap.identity(x.shape[1], x.device)
        self.before = self.map = self.size = self.metric = self.gain = None
        x = self._back(x)
        if any(self.owner.schedule[: self.layer + 1]):
            setattr(x, STATE, (None if after is None else (after.index, after.keep), self.inside))
        return x

    @property
    def _needs_keys(self) -> bool:
        return self.r > 0 and self.owner.metric == "keys"

    def _batch_first(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1) if self.sequence_first else x

    _back = _batch_first

    def _take_rope(self, rope: Any) -> Any:
        """The rotary embeddings of the tokens that are left: those of the survivors."""
        if isinstance(rope, tuple):
            return tuple(self._take_rope(part) for part in rope)
        if rope is None:
            return None
        keep = cast(TokenMap, self.before).keep[:, self.owner.protected :] - self.owner.protected
        while rope.dim() < 4:  # [P, D], [heads, P, D] -> [B or 1, heads or 1, P, D]
            rope = rope[None]
        b, heads, _, d = torch.broadcast_shapes(rope.shape, (keep.shape[0], 1, 1, 1))
        return rope.expand(b, -1, -1, -1).gather(2, keep[:, None, :, None].expand(b, heads, -1, d))


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


def _first_parameter(block: nn.Module) -> str:
    return list(inspect.signature(type(block).forward).parameters)[1]


def _mean_keys(attn: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """The mean over heads of the keys of tokens `[B, N, C]`: `[B, N, D]`."""
    # F.multi_head_attention_forward does not show its keys; their mean is linear in the tokens.
    c, heads = attn.embed_dim, attn.num_heads
    with torch.no_grad():
        weight = attn.in_proj_weight[c : 2 * c].unflatten(0, (heads, -1)).mean(0)
        bias = attn.in_proj_bias
        return F.linear(
            x, weight, None if bias is None else bias[c : 2 * c].unflatten(0, (heads, -1)).mean(0)
        )


def _detach(network: nn.Module) -> bool:
    """Takes the patch off a network; whether there was one."""
    owner = vars(network).get(OWNER)
    if owner is None:
        return False
    for handle in owner.handles:
        handle.remove()
    delattr(network, OWNER)
    vars(network).pop("r", None)
    if not any(True for _ in _patches_of(owner.model)):
        for name in ("r", "_tome_info"):
            vars(owner.model).pop(name, None)
    return True
