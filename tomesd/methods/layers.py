"""Merging in vision transformers, layer by layer.

Nothing of a host's code is restated. In each block

    x = x + attn(norm1(x))
    x = x + mlp(norm2(x))

a hook on the attention adds the sizes of its keys, and one on norm2 merges the tokens. At the end of the
second half a hook gives its result y back to all tokens, and one on the block keeps those that survive and
adds what merging changed in them. That is what ToMe computes: a survivor of value s that has merged into m
becomes (s + y) + (m - s) = m + y.

From outside a block gives and takes tokens on the original grid, so dense outputs, hidden states, pooling
and heads need no care: what they see is constant on groups of tokens, but for what told a token from its
group when it merged, if that was asked for (`unmerge="residual"`). Blocks hand merged tokens to each other
only inside of an `nn.Sequential` whose blocks have no other hooks, where nobody looks in between. Which
tokens are merged travels with the tokens, as an attribute of the tensor: so activation checkpointing
recomputes each block on what it was given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ..hosts.family import Network, Site, submodule
from ..hosts.hooks import Args, Argument, Kwargs, PerThread
from ..hosts.vision import VisionFamily
from ..maths.alternating import Step, merge_alternating
from ..maths.attention import key_bias, take_rope
from ..maths.token_map import TokenMap
from .layers_patch import Hooked, Hooks, LayersPatch, NetworkHooks, where_filled
from .layers_state import STATE, Merged, State, found_state, mark, state_of

# Tokens are compared by so many of their channels: with 128 of 384 DINOv2-S keeps its accuracy, with 64 it
# does not, and with all of 768 ViT-B loses some of its speed.
CHANNELS = 128


def attach(patch: LayersPatch, network: Network[VisionFamily]) -> None:
    """Registers all hooks of a patch."""
    patch.hooks = [NetworkHooks(patch, network)]
    for layer, site in enumerate(network.sites):
        patch.hooks.append(LayerHooks(patch, layer, network, site))


@dataclass(eq=False)
class LayerCall:
    """What is known of a block during one call of it."""

    merging: bool = False  # whether tokens have merged in the blocks before it, or are to merge here
    begun: bool = False  # whether the parts of the block are being called
    attended: bool = False  # whether attention has been among them
    halfway: bool = False  # whether the middle has been
    ended: bool = False  # whether the end has been
    shape: tuple[int, int] = (0, 0)  # of the tokens that the block works on, [B, N]
    r: int | float = 0  # how many tokens are to merge, or which share of those that may
    inside: bool = False  # whether nobody looks at the tokens before the last block
    handed: State | None = None  # of the tokens that the block itself was given
    before: Merged | None = None  # what the blocks before it have merged
    metric: Tensor | None = None  # what tokens are compared by, if not by themselves
    step: Step | None = None  # what merges here
    gain: Tensor | None = None  # what that changed in those that survive
    after: Merged | None = None  # what both have merged


class LayerHooks(Hooks):
    """Merges the tokens of one block between its attention and its second half."""

    def __init__(self, patch: LayersPatch, layer: int, network: Network[VisionFamily], site: Site) -> None:
        self.patch = patch
        self.layer = layer
        self.name = name = network.path(site)
        self.own = PerThread(LayerCall)
        self.block = block = site.block
        self.attn = f"{name}.{block.attn.path}".removesuffix(".")
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
        self.head_dim: Any = getattr(attn, "head_dim", None)
        self.config: Any = getattr(attn, "config", None)
        key_layer = part.key_layer and submodule(attn, part.key_layer)
        shows_keys = key_layer is not None and self.head_dim is not None
        if keys and not shows_keys and not isinstance(attn, nn.MultiheadAttention):
            raise ValueError(
                f"the keys of {self.attn} cannot be seen: {type(attn).__name__} has no "
                f'{part.key_layer or "layer of keys that is known"}, or no head_dim. Take metric="tokens"'
            )
        patch.sequence_first = getattr(attn, "batch_first", True) is False
        at_once = block.middle == ""  # both halves run on the tokens that the block is given
        patch.before(site.module, self.enter)
        patch.before(first, self.begin)
        if at_once:
            patch.before(site.module, self.merge_at_once)
        patch.before(attn, self.enter_attention)
        patch.after(attn, self.leave_attention, first=True)
        # Around the first two an adapter would have all tokens beside merged ones.
        self.parts = {block.middle: Hooked(middle, False), block.end: Hooked(end, False)}
        self.parts |= {block.input: Hooked(first, True), part.path: Hooked(attn, True)}
        if keys and isinstance(key_layer, nn.Module):
            patch.after(key_layer, self.keep_keys)
            self.parts[f"{part.path}.{part.key_layer}"] = Hooked(key_layer, False)
        self.parts.pop("", None)
        if not at_once:
            patch.before(middle, self.merge)
            patch.after(end, self.unmerge)
        patch.after(site.module, self.leave, first=True)

    @where_filled
    def enter(self, block: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        own, patch = self.own.get(), self.patch
        own.handed, own.begun = None, False
        given = self.tokens.get(args, kwargs)
        x = given[0] if isinstance(given, list) else given  # one of several sizes: `leave` refuses more
        if isinstance(x, torch.fx.Proxy):
            raise RuntimeError(
                "tomesd: torch.fx does not see which tokens merge (feature extractors use it): remove_patch "
                "first, or read hidden states or forward_intermediates of the model itself"
            )
        if self.layer == 0 and patch.trace_source:
            patch.maps = patch.own.get().maps = [None] * patch.layers
        first = patch.schedule.first
        own.merging = first <= self.layer
        if not own.merging:
            if not hasattr(x, STATE) or getattr(x, STATE)[0] is None:
                return None
            # Blocks before it have merged by another r, and this one is given all tokens.
            x = x.view_as(x)
            return self.tokens.put(args, kwargs, [x] if isinstance(given, list) else x)
        self.look_for_replaced(block, self.name, self.parts)
        if first == self.layer:
            return None
        if not isinstance(x, Tensor):
            self._shape(x, "forward")
        before, inside = state_of(x, self.name)
        own.handed = found_state(x)
        if before is None or inside:
            return None
        merged = patch.turned(before.take(patch.turned(x)))
        setattr(merged, STATE, own.handed)
        return self.tokens.put(args, kwargs, [merged] if isinstance(given, list) else merged)

    @where_filled
    def begin(self, part: nn.Module, args: Args, kwargs: Kwargs) -> None:
        # Not at the block itself: what checkpointing of transformers recomputes begins after its hooks.
        x, schedule, own = self.given.get(args, kwargs), self.patch.schedule, self.own.get()
        handed, own.handed = own.handed, None
        if handed is not None and not hasattr(x, STATE):
            setattr(x, STATE, handed)  # accelerate has moved the tokens to the device of this block
        own.before, own.inside = None, False
        if schedule.first < self.layer or hasattr(x, STATE):
            own.before, own.inside = state_of(x, self.name)
        own.r = schedule.steps[self.layer]
        own.after, own.step = own.before, None
        own.metric = own.gain = None
        own.begun = own.r > 0 or own.before is not None
        own.attended = own.halfway = own.ended = False
        if own.begun:
            own.shape = self._shape(x, self.block.input)

    @where_filled
    def enter_attention(self, attn: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        own, patch = self.own.get(), self.patch
        if not self._begun(own):
            return None
        x = self.attended.get(args, kwargs)
        if self._shape(x, self.block.attn.path) != own.shape:
            raise RuntimeError(
                f"tomesd: {self.attn} was given {list(x.shape)} of the block's tokens "
                f"{list(own.shape)}: merged tokens fill no windows, and cannot attend for a part of the batch"
            )
        own.attended = True
        if isinstance(attn, nn.MultiheadAttention) and self._needs_keys:
            own.metric = _mean_keys(attn, patch.turned(x))
        kind = getattr(self.config, "_attn_implementation", "sdpa")
        if patch.prop_attn and kind not in (None, "eager", "sdpa"):
            raise ValueError(
                f"tomesd: {kind} takes no sizes of tokens: set_attn_implementation('sdpa'), or patch with "
                "prop_attn=False"
            )
        given = self.bias is not None and self.bias.get(args, kwargs) is not None
        if (given and patch.own.get().masked) or kwargs.get("is_causal"):
            raise ValueError(
                f"tomesd: {self.name} was given an attention mask, which merged tokens have none of"
            )
        if kwargs.get("cu_seqlens") is not None:
            raise ValueError(f"tomesd: {self.name} was given packed images, whose tokens would merge")
        if own.before is None:
            return None
        if given:  # it hides nothing
            assert self.bias is not None
            args, kwargs = self.bias.put(args, kwargs, None)
        if self.rope is not None:
            survivors = own.before.map.keep[:, patch.protected :]
            keep = survivors - patch.protected  # embeddings are of patches alone
            args, kwargs = self.rope.put(args, kwargs, take_rope(self.rope.get(args, kwargs), keep))
        if patch.prop_attn and own.shape[0] > 0:  # nn.MultiheadAttention takes no mask of no samples
            assert self.bias is not None
            bias = key_bias(own.before.size, x.dtype)
            if isinstance(attn, nn.MultiheadAttention):
                bias = bias[:, 0, 0]
            args, kwargs = self.bias.put(args, kwargs, bias)
        return args, kwargs

    @where_filled
    def leave_attention(self, attn: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        """Gives attention weights, where asked for, on the original grid: `[B, heads, N, N]`."""
        before = self.own.get().before
        if before is None or not isinstance(output, tuple) or len(output) < 2 or output[1] is None:
            return output
        return (output[0], before.map.unmerge_attention(output[1]), *output[2:])

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
        if self._shape(x, str(self.block.middle)) != own.shape or own.step is not None:
            raise RuntimeError(
                f"tomesd: {self.name}.{self.block.middle}, where its tokens {list(own.shape)} merge, was "
                f"given {list(x.shape)}{' once more' if own.step is not None else ''}"
            )
        own.halfway = True
        own.step = step = self._merge(own, patch.turned(x))
        if step is None:
            return None
        own.gain = step.tokens - step.kept
        return self.halfway.put(args, kwargs, patch.turned(step.tokens))

    @where_filled
    def merge_at_once(self, block: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        """Merges what the block is given, and it runs on that as if the blocks before it had merged it."""
        own, patch = self.own.get(), self.patch
        own.halfway = True
        step = self._merge(own, patch.turned(self.tokens.get(args, kwargs)))
        if step is None:
            return None
        own.before, own.shape = own.after, (step.tokens.shape[0], step.tokens.shape[1])
        return self.tokens.put(args, kwargs, patch.turned(step.tokens))

    @where_filled
    def unmerge(self, part: nn.Module, args: Args, kwargs: Kwargs, output: Tensor) -> Tensor:
        own, patch = self.own.get(), self.patch
        # It may be a module that the first half calls too.
        if own.step is None or own.ended:
            return output
        own.ended = True
        return patch.turned(own.step.map.unmerge(patch.turned(output)))

    @where_filled
    def leave(self, block: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        own, patch = self.own.get(), self.patch
        if isinstance(output, list) and len(output) == 1:
            return [self.leave(block, args, kwargs, output[0])]
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):  # attention weights follow
            return (self.leave(block, args, kwargs, output[0]), *output[1:])
        if own.merging:
            self._look_for_skipped(block, own)
            self._shape(output, "")
        elif not isinstance(output, Tensor):
            return output
        after, x = own.after, patch.turned(output)  # pyright: ignore[reportArgumentType]
        if own.step is not None and own.gain is not None:
            x = own.step.map.merge(x, "drop") + own.gain
        if after is not None and not own.inside:
            x = after.give_back(x)
        if patch.trace_source:
            maps = patch.own.get().maps
            if maps:
                maps[self.layer] = TokenMap.identity(x.shape[1], x.device) if after is None else after.map
        own.before = own.after = own.step = own.metric = own.gain = None
        own.begun = False
        x = patch.turned(x)
        if own.merging:
            mark(x, (None if after is None else after.state, own.inside))
        return x

    def _merge(self, own: LayerCall, x: Tensor) -> Step | None:
        """Merges tokens `[B, N, C]`, if there is something to merge."""
        patch = self.patch
        b, n, _ = x.shape
        free = n - patch.protected - patch.last
        if free < 0:
            raise RuntimeError(
                f"tomesd: {self.name} was given {n} tokens, of which by its row {n - free} never merge: "
                "prefix and suffix count those before and after the patches"
            )
        r = min(own.r if isinstance(own.r, int) else int(own.r * free), free // 2)
        if r <= 0:
            return None
        metric = x.detach()[..., :CHANNELS] if own.metric is None else own.metric
        size = x.new_ones(b, n, dtype=torch.float32) if own.before is None else own.before.size
        step = merge_alternating(x, size, metric, r, patch.protected, patch.last, patch.method.mode)
        own.after = Merged.by(own.before, step, x, patch.method.unmerge)
        return step

    @property
    def _needs_keys(self) -> bool:
        return self.own.get().r > 0 and self.patch.method.metric == "keys"

    def _bias(self, family: VisionFamily, attn: nn.Module) -> Argument | None:
        part, too_old = self.block.attn, family.too_old(attn)
        why = f"{type(attn).__name__} has no parameter for them"
        if part.bias is not None:
            try:
                bias = Argument(attn, part.bias)
                if not too_old:  # those of old versions may take any arguments, and do not know this one
                    return bias
            except ValueError as error:
                why = str(error)
        if not self.patch.prop_attn:
            return None
        raise ValueError(
            f"{self.attn} takes no sizes of tokens: {why}{too_old}. It needs none with prop_attn=False"
        )

    def _shape(self, x: Any, path: str) -> tuple[int, int]:
        """`[B, N]` of tokens `x`, which a part is given or the block itself returns."""
        if isinstance(x, Tensor) and x.dim() == 3:
            b, n, _ = self.patch.turned(x).shape
            return b, n
        kind = f"a tensor {list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        where = f"{self.name}.{path} was given" if path else f"{self.name} returns"
        raise RuntimeError(f"tomesd: {where} {kind} where its tokens [B, N, C] are expected")

    def _begun(self, own: LayerCall) -> bool:
        """Whether a part is called by the block, and not alone."""
        if own.begun or torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return own.begun
        if self.patch.schedule.first <= self.layer:
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
            skipped = None if own.step is None or own.ended else self.block.end
        if skipped is not None:
            raise RuntimeError(
                f"tomesd: {self.name} did not call its {skipped}, or not in the order that is known: "
                f"{type(block).__name__} has a forward of its own, in which tokens cannot merge"
            )


def _mean_keys(attn: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """The mean over heads of the keys of tokens `[B, N, C]`: `[B, N, D]`."""
    # F.multi_head_attention_forward does not show its keys; their mean is linear in the tokens.
    c, heads = attn.embed_dim, attn.num_heads
    with torch.no_grad():
        weight, bias = attn.in_proj_weight[c : 2 * c], attn.in_proj_bias
        bias = None if bias is None else bias[c : 2 * c].unflatten(0, (heads, -1)).mean(0)
        return F.linear(x, weight.unflatten(0, (heads, -1)).mean(0), bias)
