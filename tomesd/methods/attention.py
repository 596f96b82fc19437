"""What attention is given when its keys have merged: keys, masks, sizes, and what cannot be had together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..hosts.blocks import BlockHooks
from ..hosts.family import Part, submodule
from ..hosts.hooks import Args, Argument, Kwargs, has_hooks_of_others, has_other_forward
from ..maths.attention import key_bias, merge_mask
from ..maths.token_map import TokenMap

# Caches of diffusers that give attention's output of another step, which has other merged tokens.
CACHES = (
    *("pyramid_attention_broadcast", "faster_cache_block", "taylorseer_cache"),
    *("fbc_leader_block_hook", "mag_cache_leader_block_hook"),
)


# Hooks of diffusers' guiders: one blurs queries over the square of the image, one gives back the values.
BLURS, SKIPS = "SmoothedEnergyGuidanceHook", "AttentionProcessorSkipHook"


def hooks_of_diffusers(module: nn.Module | None) -> dict[str, Any]:
    """What diffusers has hung on a module in its own way, by name."""
    hooks: dict[str, Any] = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    return hooks


def is_under(module: nn.Module | None, kind: str) -> bool:
    """Whether a hook of diffusers of this class is on a module."""
    return any(type(hook).__name__ == kind for hook in hooks_of_diffusers(module).values())


def cache_of(module: nn.Module) -> str | None:
    """The cache of diffusers that a module is under, if any."""
    hooks = hooks_of_diffusers(module)
    return next((cache for cache in CACHES if cache in hooks), None)


def refuse_caches(module: nn.Module, name: str, method: str) -> None:
    """Raises a ValueError where a cache would give back merged tokens of another step."""
    cache = cache_of(module)
    if cache is not None:
        raise ValueError(
            f"tomesd: {name} is cached by diffusers' {cache}, which gives back the tokens of another step: "
            f"use either the cache or {method}"
        )


class PartHooks:
    """A part of a block whose tokens merge or whose keys are sampled: its arguments, and its block's map.

    `kind` is `"attn"`, `"cross"` or `"mlp"`; `method` what to call the method in errors.
    """

    def __init__(
        self,
        block: BlockHooks,
        module: nn.Module,
        part: Part,
        kind: str,
        method: str,
        prop_attn: bool | None = False,
    ) -> None:
        self.block = block
        self.kind = kind
        self.method = method
        self.prop_attn = prop_attn
        self.part = part
        self.name = f"{block.name}.{part.path}"
        self.tokens = Argument(module, part.tokens, 0)
        self.keys = Argument(module, part.keys, 1) if part.keys else None
        self.values = Argument.optional(module, part.values, 2)
        self.bias = Argument(module, part.bias) if part.bias else None
        if block.patch.checks:
            self.check(module)

    def check(self, module: nn.Module) -> None:
        """Raises a ValueError, or warns, where what is on a part does not go with merged tokens."""
        refuse_caches(module, self.name, self.method)
        if self.is_cached(module):
            raise ValueError(
                f"tomesd: {self.name} keeps its output in `{self.part.cache}` (T-GATE does so), to be given "
                f"back in another step, in which other tokens merge: use either that or {self.method}"
            )
        self.refuse_keepers(module)
        if is_under(submodule(module, self.part.layers[0]), BLURS):
            raise ValueError(
                f"tomesd: {self.name} is under diffusers' smoothed energy guidance, which blurs queries over "
                f"the square of the image: use either that or {self.method}. SampleKeys leaves it all queries"
            )
        self.weighs(module)
        processor, part = getattr(module, "processor", None), self.part
        if processor is None or type(processor).__name__ in part.processors + part.biased + part.orderless:
            if not has_other_forward(module) and not self.is_watched(module):
                return
            what = f"{'a forward' if has_other_forward(module) else 'hooks'} that somebody has put on it"
        else:
            what = f"the processor {type(processor).__name__}"
        self.block.patch.warn(
            f"{self.name} has {what}, and {self.method} gives it merged tokens. What needs all tokens of the "
            "image or their places goes wrong: masks of regions, tiles, blurs, maps of attention. SampleKeys "
            "leaves it all tokens",
            about="places",
        )

    def tokens_of(self, output: Any) -> Tensor:
        """The tokens in what the part returns."""
        tokens = output if self.part.output is None else output[self.part.output]
        if not isinstance(tokens, Tensor):
            raise TypeError(
                f"tomesd: {self.name} gave a {type(tokens).__name__}, no tokens: its Part says "
                f"output={self.part.output}"
            )
        return tokens

    def put_tokens(self, output: Any, tokens: Tensor) -> Any:
        """What the part returns, with other tokens."""
        i = self.part.output
        return tokens if i is None else (*output[:i], tokens, *output[i + 1 :])

    def refuse(self, module: nn.Module, kwargs: Kwargs) -> None:
        """Raises a ValueError for what merged tokens cannot be used with."""
        self.check(module)
        if self.kind == "cross" and kwargs.get("ip_adapter_masks") is not None:
            raise ValueError(
                "tomesd: ip_adapter_masks belong to all tokens of the image and cannot be used with "
                f"{self.method}: patch without it"
            )

    def is_cached(self, module: nn.Module) -> bool:
        """Whether what it returns may be of another step."""
        own = self.part.cache is not None and hasattr(module, self.part.cache)
        return own or cache_of(module) is not None

    def refuse_keepers(self, attn: nn.Module) -> None:
        """Raises a ValueError for processors that keep a map of attention."""
        kind = type(getattr(attn, "processor", None)).__name__
        if kind in self.part.keepers:
            raise ValueError(
                f"tomesd: {self.name} has the processor {kind}, which keeps a map of attention that the host "
                f"reads as one of all tokens: leave this block out (by max_downsample or a dict of methods), "
                f"or take another method than {self.method}"
            )

    def is_watched(self, module: nn.Module) -> bool:
        """Whether hooks of others are on what it gives other tokens than without it."""
        inside = module.modules()
        next(inside)  # hooks on the part itself are called before tokens merge and after they come back
        return has_hooks_of_others(inside)

    def is_plain(self, attn: nn.Module) -> bool:
        """Whether an attention is one that is known to do nothing but attend."""
        processor = getattr(attn, "processor", None)
        return processor is None or type(processor).__name__ in self.part.processors

    def is_known(self, attn: nn.Module) -> bool:
        """Whether an attention does nothing but attend, with or without a bias of its keys."""
        return self.is_plain(attn) or type(attn.processor).__name__ in self.part.biased

    def only_attends(self, attn: nn.Module) -> bool:
        """Whether nothing on it is in the way of asking it for some of the queries."""
        blurs = is_under(submodule(attn, self.part.layers[0]), BLURS)
        return self.is_known(attn) and not blurs and not has_other_forward(attn) and not self.is_watched(attn)

    def weighs(self, attn: nn.Module) -> bool:
        """Whether its keys are to count as often as tokens have merged into them.

        Raises:
            ValueError: they are to, and nobody knows what its processor would do with a bias of them.
        """
        if self.kind != "attn" or self.bias is None or self.prop_attn is False:
            return False
        if self.is_plain(attn):
            return bool(self.prop_attn) or not has_other_forward(attn)
        kind = type(getattr(attn, "processor", None)).__name__
        if self.prop_attn and kind not in self.part.biased:
            raise ValueError(
                f"tomesd: {self.name} has the processor {kind}, of which it is not known whether it adds a "
                f"bias to each key, which {self.method} needs. Known are "
                f"{', '.join(self.part.processors + self.part.biased)}; Merge() and SampleKeys() need none"
            )
        return bool(self.prop_attn)

    def has_own_keys(self, args: Args, kwargs: Kwargs) -> bool:
        """Whether keys are taken from other tokens already; some hosts hand over the tokens themselves."""
        keys = None if self.keys is None else self.keys.get(args, kwargs)
        return keys is not None and keys is not self.tokens.get(args, kwargs)

    def given_values(self, args: Args, kwargs: Kwargs) -> Tensor | None:
        """Tokens to take values from, where a host hands them over."""
        return None if self.values is None else self.values.get(args, kwargs)

    def put_keys(
        self, args: Args, kwargs: Kwargs, keys: Tensor, few: Tensor, reduce: Callable[[Tensor], Tensor]
    ) -> tuple[Args, Kwargs]:
        """Gives attention `few` in place of `keys`, and as few values, if it was given some."""
        assert self.keys is not None
        values = self.given_values(args, kwargs)
        if self.values is not None and values is not None:
            args, kwargs = self.values.put(args, kwargs, few if values is keys else reduce(values))
        return self.keys.put(args, kwargs, few)

    def mask(self, args: Args, kwargs: Kwargs, token_map: TokenMap) -> Tensor | None:
        """What is added to the logits of all keys, as `[B, N]`, if anything is."""
        bias: Tensor | None = None if self.bias is None else self.bias.get(args, kwargs)
        if bias is None:
            return None
        n = token_map.tokens
        if bias.shape[-1] != n or bias.dim() > 3 or (bias.dim() == 3 and bias.shape[1] != 1):
            raise ValueError(
                f"tomesd: {self.name} got a self-attention mask of shape {list(bias.shape)}; only masks of "
                f"its keys, [B, {n}] or [B, 1, {n}], can be merged"
            )
        return bias.flatten(1)

    def put_mask(self, args: Args, kwargs: Kwargs, mask: Tensor) -> tuple[Args, Kwargs]:
        """Gives a mask `[B, M]` of the keys that are left in the shape of the one of all keys."""
        assert self.bias is not None
        return self.bias.put(args, kwargs, mask.view(*self.bias.get(args, kwargs).shape[:-1], -1))

    def merge_bias(
        self, attn: nn.Module, token_map: TokenMap, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        """Merges what is added to the logits of keys that merge, and weighs them by `prop_attn`.

        A merged key counts as its tokens do together, or on average where sizes do not count.
        """
        if self.kind != "attn" or token_map.is_identity or self.has_own_keys(args, kwargs):
            return args, kwargs
        mask, weighs = self.mask(args, kwargs, token_map), self.weighs(attn)
        if mask is not None:
            merged = merge_mask(token_map, mask, "sum" if weighs else "mean")
            return self.put_mask(args, kwargs, merged.to(mask.dtype))
        if weighs:
            assert self.bias is not None
            x = self.tokens.get(args, kwargs)
            bias = key_bias(token_map.sizes, x.dtype)[:, 0].expand(x.shape[0], -1, -1)
            args, kwargs = self.bias.put(args, kwargs, bias)
        return args, kwargs
