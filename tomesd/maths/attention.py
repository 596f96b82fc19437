"""What attention needs of tokens that have merged: their rotary embeddings, and weights of keys.

Proportional attention: a key that stands for several tokens counts as many times (Bolya et al., 2023).

That adds the logarithm of its size to the logits of a key. Where a kernel takes no such bias without losing
its speed, the same is computed by one more channel of queries and keys.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .devices import is_traced
from .numbers import kept
from .token_map import TokenMap

# Parameters of `scaled_dot_product_attention`, in order.
SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
# Kernels on CUDA take head sizes in steps of this.
ALIGNMENT = 8
# A mask of this hides a key.
HIDDEN = -1e4


def take_rope(rope: Any, keep: Tensor) -> Any:
    """The rotary embeddings `[B, heads or 1, K, D]` of the tokens at positions `keep` `[B or 1, K]`.

    Those of all tokens are `[P, D]`, `[heads, P, D]`, `[B or 1, heads or 1, P, D]`, a tuple of such, or None.
    """
    if isinstance(rope, tuple):
        return tuple(take_rope(part, keep) for part in rope)
    if rope is None:
        return None
    while rope.dim() < 4:
        rope = rope[None]
    b, heads, _, d = torch.broadcast_shapes(rope.shape, (keep.shape[0], 1, 1, 1))
    return rope.expand(b, -1, -1, -1).gather(2, keep[:, None, :, None].expand(b, heads, -1, d))


def key_bias(size: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias `[B, 1, 1, N]` of keys that stand for `size` `[B, N]` tokens, for an attention mask."""
    if is_traced():
        size = size.float()  # ONNX has no logarithm of integers
    bias = size.log()[:, None, None, :].to(dtype)
    return bias.as_subclass(KeyBias) if size.device.type == "cuda" else bias


def merge_mask(token_map: TokenMap, mask: Tensor, mode: str) -> Tensor:
    """What to add to the logits of merged keys `[B, M]`, of a float `mask` `[B, N]` for those of all.

    Args:
        mode: whether the weights of merged keys add up (`"sum"`), or count on average (`"mean"`).
    """
    mask = mask.float().clamp_min(HIDDEN)  # or infinities would cancel
    most = token_map.merge(mask, "amax")
    return most + token_map.merge((mask - token_map.unmerge(most)).exp(), mode).log()


class KeyBias(Tensor):
    """A mask `[B, 1, 1, N]` that `scaled_dot_product_attention` takes without leaving its fastest kernel.

    CUDA's flash attention has no mask, so this one goes in as a channel of queries and keys. It stays what it
    is when it is reshaped, and is a plain tensor to all other functions.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.scaled_dot_product_attention:
                kwargs.update(zip(SDPA, args, strict=False))
                kwargs["bias"] = kwargs.pop("attn_mask")
                return biased_attention(**kwargs)
            out = func(*args, **kwargs)
        alone = not any(isinstance(x, Tensor) and not isinstance(x, cls) for x in (*args, *kwargs.values()))
        if alone and isinstance(out, Tensor) and not isinstance(out, cls):
            out = out.as_subclass(cls)
        return out


def biased_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float | None = None, **options: Any
) -> Tensor:
    """`scaled_dot_product_attention` with a bias for each key, by a kernel that has none.

    Args:
        bias: added to the logits of each key, `[B, 1 or heads, 1, N]`.
        options: `dropout_p`, `is_causal`, `enable_gqa`, as there.
    """
    d, dv = query.shape[-1], value.shape[-1]
    usual: float = d**-0.5
    scale = usual if scale is None else scale
    width = -(-(max(d + 1, dv)) // ALIGNMENT) * ALIGNMENT

    def channels(one: int, zeros: int, like: Tensor) -> Tensor:
        made = kept(
            ("channels", one, zeros, like.dtype),
            like.device,
            lambda: torch.tensor([1.0] * one + [0.0] * zeros, dtype=like.dtype, device=like.device),
        )
        return made.expand(*like.shape[:-1], -1)

    # One more channel: 1 of each query, the bias of each key.
    weighed = (bias / scale).to(key.dtype).transpose(-1, -2).expand(*key.shape[:-1], 1)
    query = torch.cat([query, channels(1, width - d - 1, query)], dim=-1)
    key = torch.cat([key, weighed, channels(0, width - d - 1, key)], dim=-1)
    value = torch.cat([value, channels(0, width - dv, value)], dim=-1)
    return F.scaled_dot_product_attention(query, key, value, scale=scale, **options)[..., :dv]
