"""TokenMerger: merging for models of one's own, layer by layer, packed sequences included."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from .maths.grid import alternate
from .maths.matching import match_exact
from .maths.token_map import TokenMap


class TokenMerger:
    """One layer that merges the `r` most similar tokens of each sample (Bolya et al., 2023).

        merger = TokenMerger(keys, r=16)  # keys: [B, S, C]
        y = merger(x)  # [B, S, ...] -> [B, S - 16, ...]
        merger.unmerge(y)  # [B, S, ...]

    Several layers are chained by `merger.chain(new_keys)`, or by handing on `adm`. `unmerge` then goes back
    to the tokens before the first of them.

    Args:
        keys: what is compared, floating point `[B, S, C]`: the tokens, or the keys of attention.
        r: how many tokens to remove, from 0 to S // 2.
        adm: what the layers before merged: their `adm`, `[B, S, N]`, or their `TokenMap`.
        sequence_ids: which sequence of a packed sample each token belongs to, integer `[B, S]`. Tokens of
            different sequences never merge.
        mask_id: the id of padding, which merges with padding only, and before anything else.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a wrong shape, an r out of range, an `adm` that is no map, or fewer than r tokens with
            another one of their own sequence to join.
    """

    def __init__(
        self,
        keys: Tensor,
        r: int,
        adm: Tensor | TokenMap | None = None,
        sequence_ids: Tensor | None = None,
        mask_id: int = -100,
    ) -> None:
        if not isinstance(keys, Tensor) or not keys.is_floating_point():
            kind = keys.dtype if isinstance(keys, Tensor) else type(keys).__name__
            raise TypeError(f"keys must be a floating point tensor, got {kind}")
        if keys.dim() != 3:
            raise ValueError(f"keys must be [B, S, C], got {list(keys.shape)}")
        if not isinstance(r, Integral) or isinstance(r, bool):
            raise TypeError(f"r must be an integer, got {r!r}")
        b, s, _ = keys.shape
        if not 0 <= r <= s // 2:
            raise ValueError(f"r must be from 0 to {s // 2}, half of the {s} tokens, got {r}")
        if sequence_ids is not None:
            if not isinstance(sequence_ids, Tensor):
                raise TypeError(f"sequence_ids must be a tensor, got {type(sequence_ids).__name__}")
            if sequence_ids.is_floating_point() or sequence_ids.is_complex():
                raise TypeError(f"sequence_ids must be integers, got {sequence_ids.dtype}")
            if sequence_ids.shape != (b, s):
                raise ValueError(f"sequence_ids must be {[b, s]} as keys, got {list(sequence_ids.shape)}")
        if not isinstance(mask_id, Integral):
            raise TypeError(f"mask_id must be an integer, got {mask_id!r}")
        if not -(2**63) <= mask_id < 2**63:
            raise ValueError(f"mask_id must fit into int64, got {mask_id}")
        before = _as_map(adm, b, s)
        self.r: int = int(r)
        self.mask_id: int = mask_id
        self.map: TokenMap = (
            match_exact(keys, alternate(s, device=keys.device), self.r, sequence_ids, mask_id)
            if r
            else TokenMap.from_index(torch.arange(s, device=keys.device).expand(b, -1), s)
        )
        self.total: TokenMap = self.map if before is None else before.compose(self.map)
        self.merged_ids: Tensor | None = (
            None if sequence_ids is None else self.map.merge(sequence_ids, "drop")
        )

    def __repr__(self) -> str:
        first = f"{self.total.tokens} before the first layer"
        return f"TokenMerger({self.map.tokens} -> {self.map.groups} tokens, {first})"

    def __call__(self, x: Tensor, mode: str = "mean") -> Tensor:
        """As `merge`."""
        return self.map.merge(x, mode)

    def merge(self, x: Tensor, mode: str = "mean") -> Tensor:
        """Merges this layer's tokens, `[B, S, ...]` -> `[B, S - r, ...]`; `TokenMap.merge` has the modes."""
        return self.map.merge(x, mode)

    def unmerge(self, y: Tensor) -> Tensor:
        """Gives all tokens of before the first layer their values, `[B, S - r, ...]` -> `[B, N, ...]`."""
        return self.total.unmerge(y)

    unmerge_all = unmerge

    def merge_all(self, x: Tensor, mode: str = "mean") -> Tensor:
        """Merges by all layers at once, `[B, N, ...]` -> `[B, S - r, ...]`; a mean counts each of N once."""
        return self.total.merge(x, mode)

    def chain(self, keys: Tensor, r: int | None = None) -> TokenMerger:
        """The next layer, for keys `[B, S - r, C]` of what this one left; `r` is this one's by default."""
        return TokenMerger(keys, self.r if r is None else r, self.total, self.merged_ids, self.mask_id)

    @property
    def sizes(self) -> Tensor:
        """How many tokens of before the first layer each token stands for, int64 `[B, S - r]`."""
        return self.total.sizes

    @property
    def adm(self) -> Tensor:
        """`[B, S - r, N]`, 1 where a token of before the first layer is part of a token, else 0.

        Grows with the square of the sequence: `chain` does without.
        """
        return self.total.source_matrix()


def _as_map(adm: Tensor | TokenMap | None, b: int, s: int) -> TokenMap | None:
    if adm is None:
        return None
    if isinstance(adm, Tensor):
        if adm.dim() != 3 or adm.shape[:2] != (b, s):
            raise ValueError(f"adm must be [{b}, {s}, N] as keys, got {list(adm.shape)}")
        member = adm.to_dense() != 0
        if not torch.compiler.is_compiling() and bool((member.sum(1) != 1).any()):
            raise ValueError(
                "adm must have exactly one non-zero entry in each column: each token has one group"
            )
        return TokenMap.from_index(member.to(torch.uint8).argmax(dim=1), s)
    if not isinstance(adm, TokenMap):
        raise TypeError(f"adm must be a tensor or a TokenMap, got {type(adm).__name__}")
    if adm.groups != s or adm.index.shape[0] not in (1, b):
        raise ValueError(f"keys must be of the {list(adm.keep.shape)} tokens that are left, got {[b, s]}")
    return adm
