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
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ..hosts.family import Network, Site
from ..hosts.hooks import Args, Argument, Kwargs, PerThread
from ..hosts.vits import VisionFamily
from ..maths.attention import key_bias, take_rope
from ..maths.grid import alternate
from ..maths.matching import match_exact
from ..maths.token_map import TokenMap, in_full_precision
from .layers_patch import Hooks, LayersPatch, where_filled

STATE = "_tomesd_state"
# Tokens are compared by so many of their channels: with 128 of 384 DINOv2-S keeps its accuracy, with 64 it
# does not, and with all of 768 ViT-B loses some of its speed.
CHANNELS = 128
# Index and survivors of the merged tokens, and whether nobody looks at them before the last block.
State: TypeAlias = tuple[tuple[Tensor, Tensor] | None, bool]


def attach(patch: LayersPatch, network: Network[VisionFamily]) -> None:
    """Registers all hooks of a patch."""
    patch.hooks = [NetworkHooks(patch, network)]
    for layer, site in enumerate(network.sites):
        patch.hooks.append(LayerHooks(patch, layer, network, site))


class NetworkHooks(Hooks):
    """Looks for masks that are given to a network, and hands merged tokens from block to block."""

    def __init__(self, patch: LayersPatch, network: Network[VisionFamily]) -> None:
        self.patch = patch
        module, container = network.module, network.sites[0].container
        self.mask: Argument | None = None
        if "attention_mask" in inspect.signature(type(module).forward).parameters:
            self.mask = Argument(module, "attention_mask")
            patch.before(module, self.look_for_mask)
            patch.after(module, self.forget_mask)
        if isinstance(container, nn.Sequential):
            patch.before(container, self.enter)
            patch.after(container, self.leave, first=True)

    @where_filled
    def look_for_mask(self, network: nn.Module, args: Args, kwargs: Kwargs) -> None:
        # Under torch.export blocks are given a mask that hides nothing: is there one of the caller's?
        assert self.mask is not None
        self.patch.own.get().masked = self.mask.get(args, kwargs) is not None

    @where_filled
    def forget_mask(self, network: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> None:
        self.patch.own.get().masked = True

    @where_filled
    def enter(self, container: nn.Sequential, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        """Tells the first block whether nobody looks at the tokens between the blocks."""
        if any(len(block._forward_hooks) > 1 or len(block._forward_pre_hooks) > 1 for block in container):
            return None
        x = args[0].view_as(args[0])
        setattr(x, STATE, (None, True))
        return (x, *args[1:]), kwargs

    @where_filled
    def leave(self, container: nn.Sequential, args: Args, kwargs: Kwargs, x: Tensor) -> Tensor:
        """Gives back the tokens that the blocks have handed on merged."""
        patch = self.patch
        if not any(patch.schedule):
            return x
        carried, inside = _state(x, f"the end of {patch.name}'s blocks")
        if carried is None or not inside:
            return x
        return patch.turned(carried.unmerge(patch.turned(x)))


@dataclass(eq=False)
class LayerCall:
    """What is known of a block during one call of it."""

    begun: bool = False  # whether the parts of the block are being called
    attended: bool = False  # whether attention has been among them
    halfway: bool = False  # whether the middle has been
    tokens: int = 0  # how many the block works on
    r: int = 0  # how many tokens are to merge
    inside: bool = False  # whether nobody looks at the tokens before the last block
    handed: State | None = None  # of the tokens that the block itself was given
    before: TokenMap | None = None  # which tokens the blocks before it have merged
    size: Tensor | None = None  # how many tokens each one stands for
    metric: Tensor | None = None  # what tokens are compared by, if not by themselves
    map: TokenMap | None = None  # which tokens merge here
    gain: Tensor | None = None  # what merging changed in those that survive


class LayerHooks(Hooks):
    """Merges the tokens of one block between its attention and its second half."""

    def __init__(self, patch: LayersPatch, layer: int, network: Network[VisionFamily], site: Site) -> None:
        self.patch = patch
        self.layer = layer
        self.name = name = network.path(site)
        self.own = PerThread(LayerCall)
        self.block = block = site.block
        part, keys = block.attn, patch.method.metric == "keys"
        assert block.middle is not None
        assert block.end is not None
        first, attn, middle, end = (
            site.module.get_submodule(path) for path in (block.input, part.path, block.middle, block.end)
        )
        self.tokens = Argument(site.module, block.tokens, 0)
        self.attended = Argument(attn, part.tokens, 0)
        self.bias = self._bias(network.family, attn)
        self.rope = Argument(attn, part.rope) if part.rope else None
        self.given, self.halfway = Argument(first, "", 0), Argument(middle, "", 0)
        self.head_dim = getattr(attn, "head_dim", None)
        shows_keys = part.key_layer is not None and self.head_dim is not None
        if keys and not shows_keys and not isinstance(attn, nn.MultiheadAttention):
            raise ValueError(
                f"the keys of {name}.{part.path} cannot be seen (its row has no key_layer, or "
                f'{type(attn).__name__} no head_dim): take metric="tokens"'
            )
        patch.sequence_first = getattr(attn, "batch_first", True) is False
        patch.before(site.module, self.enter)
        patch.before(first, self.begin)
        patch.before(attn, self.enter_attention)
        patch.after(attn, self.leave_attention, first=True)
        self.parts = dict.fromkeys((block.input, part.path, block.middle, block.end))
        if keys and part.key_layer is not None:
            patch.after(attn.get_submodule(part.key_layer), self.keep_keys)
            self.parts[f"{part.path}.{part.key_layer}"] = None
        patch.before(middle, self.merge)
        patch.after(end, self.unmerge)
        patch.after(site.module, self.leave, first=True)

    @where_filled
    def enter(self, block: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        own, patch = self.own.get(), self.patch
        own.handed, own.begun = None, False
        x = self.tokens.get(args, kwargs)
        if isinstance(x, torch.fx.Proxy):
            raise RuntimeError(
                "tomesd: torch.fx does not see which tokens merge (feature extractors use it): remove_patch "
                "first, or read hidden states or forward_intermediates of the model itself"
            )
        if self.layer == 0 and patch.trace_source:
            patch.maps = patch.own.get().maps = [None] * patch.layers
        schedule = patch.schedule
        if not any(schedule[: self.layer + 1]):
            return None
        self.look_for_replaced(block, self.name, self.parts)
        if not any(schedule[: self.layer]):
            return None
        before, inside = _state(x, self.name)
        own.handed = getattr(x, STATE)
        if before is None or inside:
            return None
        merged = patch.turned(before.merge(patch.turned(x), "drop"))
        setattr(merged, STATE, getattr(x, STATE))
        return self.tokens.put(args, kwargs, merged)

    @where_filled
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
        own.begun, own.attended, own.halfway = own.r > 0 or own.before is not None, False, False
        if own.begun:
            own.tokens = self._count(x, self.block.input)

    @where_filled
    def enter_attention(self, attn: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        own, patch = self.own.get(), self.patch
        if not self._begun(own):
            return None
        x = self.attended.get(args, kwargs)
        if self._count(x, self.block.attn.path) != own.tokens:
            raise RuntimeError(
                f"tomesd: {self.name}.{self.block.attn.path} was given {list(x.shape)} of the block's "
                f"{own.tokens} tokens: merged tokens fill no windows, and are no part of a batch"
            )
        own.attended = True
        if isinstance(attn, nn.MultiheadAttention) and self._needs_keys:
            own.metric = _mean_keys(attn, patch.turned(x))
        kind = getattr(getattr(attn, "config", None), "_attn_implementation", "sdpa")
        if patch.prop_attn and kind not in ("eager", "sdpa"):
            raise ValueError(
                f"tomesd: {kind} takes no sizes of tokens: set_attn_implementation('sdpa'), or patch with "
                "prop_attn=False"
            )
        given = self.bias is not None and self.bias.get(args, kwargs) is not None
        if (given and patch.own.get().masked) or kwargs.get("is_causal"):
            raise ValueError(
                f"tomesd: {self.name} was given an attention mask, which merged tokens have none of"
            )
        if own.before is None:
            return None
        if given:  # it hides nothing
            assert self.bias is not None
            args, kwargs = self.bias.put(args, kwargs, None)
        if self.rope is not None:
            keep = own.before.keep[:, patch.protected :] - patch.protected
            args, kwargs = self.rope.put(args, kwargs, take_rope(self.rope.get(args, kwargs), keep))
        if patch.prop_attn:
            assert own.size is not None
            assert self.bias is not None
            bias = key_bias(own.size, x.dtype)
            if isinstance(attn, nn.MultiheadAttention):
                bias = bias[:, 0, 0]
            args, kwargs = self.bias.put(args, kwargs, bias)
        return args, kwargs

    @where_filled
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

    @where_filled
    def keep_keys(self, part: nn.Module, args: Args, kwargs: Kwargs, keys: Tensor) -> None:
        if not self._needs_keys:
            return
        if keys.dim() == 3:  # [B, N, heads * D]
            keys = keys.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        self.own.get().metric = keys.detach().mean(1)

    @where_filled
    def merge(self, part: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        own, patch = self.own.get(), self.patch
        if not self._begun(own) or not own.attended:
            return None
        x = self.halfway.get(args, kwargs)
        if self._count(x, str(self.block.middle)) != own.tokens or own.map is not None:
            raise RuntimeError(
                f"tomesd: {self.name}.{self.block.middle}, where its {own.tokens} tokens merge, was given "
                f"{list(x.shape)}{' once more' if own.map is not None else ''}"
            )
        own.halfway = True
        x = patch.turned(x)
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

    @where_filled
    def unmerge(self, part: nn.Module, args: Args, kwargs: Kwargs, output: Tensor) -> Tensor:
        own, patch = self.own.get(), self.patch
        gain, own.gain = own.gain, None
        if own.map is None or gain is None:
            return output
        return patch.turned(own.map.unmerge(patch.turned(output) + gain))

    @where_filled
    def leave(self, block: nn.Module, args: Args, kwargs: Kwargs, output: Tensor) -> Tensor:
        own, patch = self.own.get(), self.patch
        merging = any(patch.schedule[: self.layer + 1])
        if merging:
            self._look_for_skipped(block, own)
            self._count(output, "")
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
        own.begun = False
        x = patch.turned(x)
        if merging:
            setattr(x, STATE, (None if after is None else (after.index, after.keep), own.inside))
        return x

    @property
    def _needs_keys(self) -> bool:
        return self.own.get().r > 0 and self.patch.method.metric == "keys"

    def _bias(self, family: VisionFamily, attn: nn.Module) -> Argument | None:
        part = self.block.attn
        assert part.bias is not None
        try:
            return Argument(attn, part.bias)
        except ValueError as error:
            if not self.patch.prop_attn:
                return None
            raise ValueError(
                f"{self.name}.{part.path} takes no sizes of tokens: {error}{family.too_old(attn)}; with "
                "prop_attn=False it needs none"
            ) from None

    def _count(self, x: Any, path: str) -> int:
        """The number of tokens in `x`, which a part is given or the block itself returns."""
        if isinstance(x, Tensor) and x.dim() == 3:
            return self.patch.turned(x).shape[1]
        kind = f"a tensor {list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        where = f"{self.name}.{path} was given" if path else f"{self.name} returns"
        raise RuntimeError(f"tomesd: {where} {kind} where its tokens [B, N, C] are expected")

    def _begun(self, own: LayerCall) -> bool:
        """Whether a part is called by the block, and not alone."""
        if own.begun or torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return own.begun
        if any(self.patch.schedule[: self.layer + 1]):
            raise RuntimeError(
                f"tomesd: a part of {self.name} is computed again in the backward pass, without its block: "
                "patch after activation checkpointing was set up, or checkpoint whole blocks"
            )
        return False

    def _look_for_skipped(self, block: nn.Module, own: LayerCall) -> None:
        """Raises an error if the block has not called a part where something was to be done."""
        if not own.begun:
            skipped: str | None = self.block.input
        elif not own.attended:
            skipped = self.block.attn.path
        elif own.r > 0 and not own.halfway:
            skipped = self.block.middle
        else:
            skipped = None if own.gain is None else self.block.end
        if skipped is not None:
            raise RuntimeError(
                f"tomesd: {self.name} did not call its {skipped}, or not in the order of other blocks "
                f"({', '.join(self.parts)}): tokens cannot merge in the forward of {type(block).__name__}"
            )


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
