"""What attention is given when its keys have merged: masks, sizes, and what cannot be had together."""

from __future__ import annotations

from torch import Tensor, nn

from ..hosts.family import Part
from ..hosts.hooks import Args, Argument, Kwargs
from ..hosts.image import BlockHooks
from ..maths.attention import key_bias
from ..maths.token_map import TokenMap

# Caches of diffusers that give attention's output of another step, which has other merged tokens.
CACHES = ("pyramid_attention_broadcast", "faster_cache_block", "taylorseer_cache")


class AttentionOfMerged:
    """An attention of a block whose tokens merge: its arguments, and what has to be done to them.

    Args:
        kind: `"attn"` or `"cross"`.
        method: what merges, for errors.
        prop_attn: whether each key of self-attention counts as often as tokens have merged into it.
    """

    def __init__(
        self, block: BlockHooks, module: nn.Module, kind: str, part: Part, method: str, prop_attn: bool
    ) -> None:
        self.kind = kind
        self.method = method
        self.prop_attn = prop_attn
        self.name = f"{block.name}.{part.path}"
        self.tokens = Argument(module, part.tokens, 0)
        self.keys = Argument(module, part.keys) if part.keys else None
        self.bias = Argument(module, part.bias) if part.bias else None

    def check(self, module: nn.Module, kwargs: Kwargs) -> None:
        """Refuses what merged tokens cannot be used with."""
        refuse_caches(module, self.name, self.method)
        if self.kind == "cross":
            refuse_image_masks(kwargs.get("ip_adapter_masks"), self.method)

    def merge_bias(self, token_map: TokenMap, x: Tensor, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Merges what is added to the logits of keys that merge. `x`: the tokens of all, `[B, N, C]`."""
        if self.kind != "attn" or self.bias is None or token_map.is_identity:
            return args, kwargs
        if self.keys is not None and self.keys.get(args, kwargs) is not None:
            return args, kwargs
        bias = bias_of_merged(self.name, self.bias.get(args, kwargs), x, token_map, self.prop_attn)
        return (args, kwargs) if bias is None else self.bias.put(args, kwargs, bias)


def bias_of_merged(
    name: str, bias: Tensor | None, x: Tensor, token_map: TokenMap, prop_attn: bool
) -> Tensor | None:
    """What is added to the logits of keys that have merged, `[B, 1, M]` or `[B, M]`.

    Args:
        name: of the attention, for errors.
        bias: what was given for all tokens, `[B, N]` or `[B, 1, N]`. Of merged tokens the least visible one
            decides.
        x: what attention was given for all tokens, `[B, N, C]`.
        prop_attn: whether a key counts as often as tokens have merged into it (Bolya et al., 2023).
    """
    merged: Tensor | None = None
    if bias is not None:
        least = -token_map.merge(-mask_of_keys(name, bias, token_map).float(), "amax")
        merged = least.to(bias.dtype).view(*bias.shape[:-1], token_map.groups)
    if prop_attn:
        sizes = key_bias(token_map.sizes, x.dtype)[:, 0].expand(x.shape[0], -1, -1)
        merged = sizes if merged is None else sizes + merged.view(x.shape[0], 1, -1)
    return merged


def mask_of_keys(name: str, bias: Tensor, token_map: TokenMap) -> Tensor:
    """A mask or bias of keys as `[B, N]`.

    Raises:
        ValueError: it is another one for each query.
    """
    if bias.shape[-1] != token_map.tokens or bias.dim() > 3 or (bias.dim() == 3 and bias.shape[1] != 1):
        raise ValueError(
            f"tomesd: {name} got a self-attention mask of shape {list(bias.shape)}; only masks of its "
            f"keys, [B, {token_map.tokens}] or [B, 1, {token_map.tokens}], can be merged"
        )
    return bias.flatten(1)


def refuse_caches(attn: nn.Module, name: str, method: str) -> None:
    """Raises a ValueError if diffusers gives back an attention's output of another step."""
    hooks = getattr(getattr(attn, "_diffusers_hook", None), "hooks", {})
    for cache in CACHES:
        if cache in hooks:
            raise ValueError(
                f"tomesd: {name} is cached by diffusers' {cache}, which gives back the tokens of another "
                f"step: use either the cache or {method}"
            )


def refuse_image_masks(masks: object, method: str) -> None:
    """Raises a ValueError if an attention is given masks of the image for its IP-Adapters."""
    if masks is not None:
        raise ValueError(
            f"tomesd: ip_adapter_masks belong to all tokens of the image and cannot be used with {method}: "
            "patch without it"
        )
