"""A merge as a map from N tokens to M groups: merge, unmerge, compose."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .devices import has_bags, is_traced
from .numbers import up_to

T = TypeVar("T")
MODES = ("mean", "sum", "amax", "mlerp", "drop")


@dataclass(frozen=True, eq=False, repr=False)
class TokenMap:
    """Which group each of N tokens belongs to, and which token of each group survives.

    Merging reduces every group to one token, unmerging gives each token its group's value back. Groups
    are ordered by their survivor, so tokens that merge with nothing keep their order; where each cell of a
    grid is a group, they are ordered by cell. A map with as many groups as tokens changes nothing and
    returns its input untouched.

        token_map = TokenMap.from_pairs(5, src=torch.tensor([[1, 4]]), dst=torch.tensor([[0, 3]]))
        token_map.merge(x)  # [B, 5, C] -> [B, 3, C]: the means of 0 and 1 and of 3 and 4, and 2 as it is
        token_map.unmerge(y)  # [B, 3, C] -> [B, 5, C]

    Args:
        index: group of each token, int64 `[B, N]`, values in `[0, M)`. B may be 1: the map then serves
            any batch.
        keep: position of the token that survives in each group, int64 `[B, M]`.

    Sources: Bolya et al., Token Merging: Your ViT But Faster, 2023; Bolya and Hoffman, Token Merging
    for Fast Stable Diffusion, 2023.
    """

    index: Tensor
    keep: Tensor
    memo: dict[Any, Any] = field(default_factory=dict, compare=False)  # what follows from these two

    @classmethod
    def identity(cls, n: int, device: torch.device | str | None = None) -> TokenMap:
        """The map of `n` tokens that merges nothing."""
        check_integers(n=n)
        if n < 0:
            raise ValueError(f"n must be at least 0, got {n}")
        index = torch.arange(n, device=device)[None]
        return cls(index, index)

    @classmethod
    def from_index(cls, index: Tensor, groups: int) -> TokenMap:
        """The map of a given `index` `[B, N]`; the first token of each group is its survivor.

        Raises:
            TypeError: the index is no tensor, or `groups` no integer.
            ValueError: the index is not int64 `[B, N]`, leaves `[0, groups)` or leaves a group empty.
        """
        if not isinstance(index, Tensor):
            raise TypeError(f"index must be a tensor, got {type(index).__name__}")
        if index.dim() != 2 or index.dtype != torch.int64:
            raise ValueError(f"index must be int64 [B, N], got {index.dtype} {list(index.shape)}")
        check_integers(groups=groups)
        b, n = index.shape
        if n and (index.min() < 0 or index.max() >= groups):
            raise ValueError(f"index must lie in [0, {groups}), got {int(index.min())}..{int(index.max())}")
        positions = torch.arange(n, device=index.device).expand(b, n)
        keep = index.new_full((b, groups), n).scatter_reduce(1, index, positions, "amin")
        if bool((keep == n).any()):
            raise ValueError(f"every one of the {groups} groups needs a token, some have none")
        return cls(index, keep)

    @classmethod
    def from_pairs(cls, n: int, src: Tensor, dst: Tensor) -> TokenMap:
        """The map of `n` tokens in which token `src[b, i]` joins token `dst[b, i]`.

        Args:
            n: number of tokens.
            src: positions of the r tokens that leave, int64 `[B, r]`, each at most once.
            dst: positions of the tokens that they join, int64 `[B, r]`, none of which leaves itself.
        """
        b, r = src.shape
        positions = torch.arange(n, device=src.device).expand(b, n)
        stays = torch.ones_like(positions).scatter(1, src, 0)
        rank = stays.cumsum(1) - 1
        index = rank.gather(1, positions.scatter(1, src, dst))
        # Tokens that leave write to a spare last column, so that no data-dependent shape arises.
        keep = src.new_zeros(b, n - r + 1).scatter(1, rank.where(stays == 1, n - r), positions)[:, : n - r]
        return cls(index, keep)

    def __repr__(self) -> str:
        return f"TokenMap({self.tokens} -> {self.groups} tokens, {self.index.shape[0]} samples)"

    def __getitem__(self, samples: slice) -> TokenMap:
        """The map of some of the samples."""
        if not isinstance(samples, slice):
            raise TypeError(f"a TokenMap is indexed by a slice of its samples, got {samples!r}")
        return TokenMap(self.index[samples], self.keep[samples])

    @property
    def tokens(self) -> int:
        """N, the number of tokens before merging."""
        return self.index.shape[1]

    @property
    def groups(self) -> int:
        """M, the number of tokens after merging."""
        return self.keep.shape[1]

    @property
    def is_identity(self) -> bool:
        """Whether nothing merges."""
        return self.groups == self.tokens

    @property
    def sizes(self) -> Tensor:
        """Number of tokens in each group, int64 `[B, M]`."""
        return self._once("sizes", self._sizes)

    def _sizes(self) -> Tensor:
        if is_traced():  # what can be exported to ONNX
            return torch.zeros_like(self.keep).scatter_add(1, self.index, torch.ones_like(self.index))
        if not has_bags(self.index.device):
            ones = torch.ones(self.rows.shape, device=self.index.device)
            counts = ones.new_zeros(self.keep.numel()).index_add(0, self.rows, ones)
            return counts.to(torch.int64).view_as(self.keep)
        _, ends = self._bags()
        return (ends[1:] - ends[:-1]).view_as(self.keep)

    def _bags(self) -> tuple[Tensor, Tensor]:
        """Tokens of all samples by their groups, and where each group begins, and where the last one ends."""
        return self._once("bags", lambda: _sorted(self.rows, self.keep.numel()))

    @property
    def rows(self) -> Tensor:
        """The group of each token as a row of all samples' groups, int64 `[B * N]`."""
        b = self.index.shape[0]
        return self._once("rows", lambda: self.index[0] if b == 1 else _flat(self.index, b, self.groups))

    @property
    def keep_rows(self) -> Tensor:
        """The survivors as rows of all samples' tokens, int64 `[B * M]`."""
        b = self.keep.shape[0]
        return self._once("keep_rows", lambda: self.keep[0] if b == 1 else _flat(self.keep, b, self.tokens))

    def source_matrix(self) -> Tensor:
        """Float32 `[B, M, N]`, 1 where a token belongs to a group. Grows as M x N: made on request only."""
        groups = torch.arange(self.groups, device=self.index.device)
        return (self.index[:, None, :] == groups[None, :, None]).float()

    def compose(self, then: TokenMap) -> TokenMap:
        """The map that does this one's merging and then that of `then`, a map of this one's M groups."""
        if not isinstance(then, TokenMap):
            raise TypeError(f"then must be a TokenMap, got {type(then).__name__}")
        if then.tokens != self.groups:
            raise ValueError(f"a map of {then.tokens} tokens cannot follow one that leaves {self.groups}")
        if then.index.shape[0] == self.index.shape[0]:
            return TokenMap(then.index.gather(1, self.index), self.keep.gather(1, then.keep))
        batch = then.index.shape[0] if self.index.shape[0] == 1 else self.index.shape[0]
        if self.index.shape[0] not in (1, batch) or then.index.shape[0] not in (1, batch):
            raise ValueError(
                f"maps of {self.index.shape[0]} and {then.index.shape[0]} samples cannot be composed"
            )
        index = then.index.expand(batch, -1).gather(1, self.index.expand(batch, -1))
        return TokenMap(index, self.keep.expand(batch, -1).gather(1, then.keep.expand(batch, -1)))

    def merge(self, x: Tensor, mode: str = "mean", size: Tensor | None = None) -> Tensor:
        """Reduces every group of tokens to one.

        Args:
            x: `[B, N, ...]`, floating point, integer or bool.
            mode: `"mean"`; `"sum"`; `"amax"`; `"mlerp"`, the mean's direction with the group's largest
                norm (Kim et al., Token Fusion, 2024); `"drop"`, the survivor's own value alone.
            size: how many original tokens each token stands for, `[B, N]`; weighs `"mean"` and `"mlerp"`.

        Returns:
            `[B, M, ...]` in the dtype of `x`. Integer means round down; on booleans every mode but
            `"drop"` asks whether any token of the group is True. Gradients flow to `x`.

        Raises:
            TypeError: `x` or `size` is no tensor.
            ValueError: unknown mode, or a shape that does not fit this map.
        """
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if size is not None and mode not in ("mean", "mlerp"):
            raise ValueError(f"size weighs the modes mean and mlerp only, got mode {mode!r}")
        self._check(x, self.tokens, "merge")
        if size is not None:
            if not isinstance(size, Tensor):
                raise TypeError(f"size must be a tensor, got {type(size).__name__}")
            if size.shape != x.shape[:2]:
                raise ValueError(f"size must be {list(x.shape[:2])} as the tokens, got {list(size.shape)}")
        if self.is_identity:
            return x
        if mode == "drop":
            if not self._is_of(x):
                return take(x, self.keep)
            return x.flatten(0, 1).index_select(0, self.keep_rows).view(*self.keep.shape, *x.shape[2:])
        if x.dtype == torch.bool:
            return self._scatter(x.to(torch.uint8), "amax", from_zero=True).to(torch.bool)
        if mode == "amax":
            return self._scatter(x, "amax")
        if not x.is_floating_point():
            if mode == "mlerp" or size is not None:
                raise ValueError(f"{mode} with norms or sizes needs floating point tokens, got {x.dtype}")
            total = self._scatter(x.to(torch.int64), "sum")
            if mode == "mean":
                total = total.div(_align(self.sizes, x), rounding_mode="floor")
            return total.to(x.dtype)
        if mode == "sum":
            return self._sum(x)
        mean = self._mean(x, size)
        if mode == "mean":
            return mean
        longest = self._scatter(lengths(x), "amax", from_zero=True)
        length = lengths(mean)
        scale = longest / length.clamp_min(torch.finfo(length.dtype).tiny)
        # A mean of zero has no direction to keep: it stays zero.
        return mean * _align(scale.where(length > 0, 0), x).to(x.dtype)

    def unmerge(self, y: Tensor) -> Tensor:
        """Gives every token its group's value: `[B, M, ...]` -> `[B, N, ...]`."""
        self._check(y, self.groups, "unmerge")
        if self.is_identity:
            return y
        if not self._is_of(y):
            return take(y, self.index)
        return y.flatten(0, 1).index_select(0, self.rows).view(*self.index.shape, *y.shape[2:])

    def unmerge_attention(self, weights: Tensor) -> Tensor:
        """Attention weights among all tokens: `[B, heads, M, M]` -> `[B, heads, N, N]`, or without heads.

        Tokens attend as their group does, and those of a group share evenly what it is given: rows keep their
        sum.

        Raises:
            ValueError: the weights are of another shape.
        """
        if weights.dim() not in (3, 4) or weights.shape[-2:] != (self.groups, self.groups):
            raise ValueError(
                f"weights must be [B, heads, {self.groups}, {self.groups}] or [B, {self.groups}, "
                f"{self.groups}], got {list(weights.shape)}"
            )
        if weights.dim() == 3:
            return self.unmerge_attention(weights[:, None])[:, 0]
        shares = self.unmerge(weights.transpose(1, 2)) / self.sizes[:, None, None]
        return self.unmerge(shares.permute(0, 3, 2, 1)).permute(0, 2, 3, 1)

    def fits(self, x: Tensor, length: int | None = None) -> bool:
        """Whether `x` has the shape `[B, N, ...]` that this map merges; or another `length` than N."""
        length = self.tokens if length is None else length
        return x.dim() >= 2 and x.shape[1] == length and self.index.shape[0] in (1, x.shape[0])

    def _is_of(self, x: Tensor) -> bool:
        """Whether each sample of `x` is known to have a map of its own: then rows of all serve."""
        # A trace may run on another batch: then one sample does not tell a map of its own from one for all.
        return self.index.shape[0] == x.shape[0] and not is_traced()

    def _check(self, x: Tensor, length: int, verb: str) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{verb} needs a tensor, got {type(x).__name__}")
        if not self.fits(x, length):
            batch = "B" if self.index.shape[0] == 1 else self.index.shape[0]
            raise ValueError(f"{verb} needs a tensor of shape [{batch}, {length}, ...], got {list(x.shape)}")

    def _mean(self, x: Tensor, size: Tensor | None) -> Tensor:
        if size is None:
            return self._sum(x, mean=True)
        size = size.to(torch.promote_types(x.dtype, torch.float32))
        weight = size / self.unmerge(self._scatter(size, "sum"))
        return self._sum(x, weight.to(x.dtype))

    def _sum(self, x: Tensor, weight: Tensor | None = None, mean: bool = False) -> Tensor:
        """The sum over each group of its tokens times their `weight` `[B, N]`, or their mean."""
        groups = x.shape[0] * self.groups
        shape = (x.shape[0], self.groups, *x.shape[2:])
        if x.numel() == 0:
            return x.new_zeros(shape)
        table = x.reshape(x.shape[0] * self.tokens, -1)
        own = self._is_of(x)
        flat = self.rows if own else _flat(self.index, x.shape[0], self.groups)
        has_history = x.requires_grad or (weight is not None and weight.requires_grad)
        if (torch.is_grad_enabled() and has_history) or not has_bags(x.device):
            # embedding_bag has no second derivative.
            rows = table if weight is None else table * weight.reshape(-1, 1)
            out = add_rows(rows.new_zeros(groups, rows.shape[1]), flat, rows).view(shape)
            return out / _align(self.sizes, out).to(out.dtype) if mean else out
        # embedding_bag over rows sorted by group, the sorting included, takes a half of index_add's time at
        # 2 x 16,384 tokens on CPU (scripts/bench ops), and sums in float32.
        order, ends = self._bags() if own else _sorted(flat, groups)
        if mean and x.dtype.itemsize < 4 and x.device.type == "cpu":
            # There it would divide what it has rounded.
            weight = self.sizes.float().reciprocal().to(x.dtype).expand(x.shape[0], -1).flatten()[flat]
        if weight is not None:
            weight, mean = weight.reshape(-1)[order], False
        mode = "mean" if mean else "sum"
        return F.embedding_bag(order, table, offsets=ends[:-1], mode=mode, per_sample_weights=weight).view(
            shape
        )

    def _once(self, key: Any, make: Callable[[], T]) -> T:
        """What follows from the map alone: made at the first call that needs it."""
        if torch.compiler.is_compiling():
            return make()  # part of the program
        if key not in self.memo:
            made = make()
            # Tensors of FakeTensorMode or of inference mode would be of no use later.
            if type(self.index) is not Tensor or torch.is_inference_mode_enabled():
                return made
            self.memo[key] = made
        found: T = self.memo[key]
        return found

    def _scatter(self, x: Tensor, reduce: str, from_zero: bool = False) -> Tensor:
        """Sums, or largest values; `from_zero` says that no value is below 0."""
        from_zero = from_zero or reduce == "sum"  # the same, and the exporter of TorchScript knows it
        index = _align(self.index, x).expand_as(x)
        out = x.new_zeros(x.shape[0], self.groups, *x.shape[2:])
        return out.scatter_reduce(1, index, x, reduce, include_self=from_zero)


def in_full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast off, where it is on."""
    kind = x.device.type
    is_on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if is_on else nullcontext()


def _align(per_token: Tensor, x: Tensor) -> Tensor:
    """`[B, T]` -> `[B, T, 1, ...]`, to broadcast over the trailing dimensions of `x`."""
    return per_token.reshape(*per_token.shape, *[1] * (x.dim() - 2))


def lengths(x: Tensor) -> Tensor:
    """Length of each token, `[B, T, ...]` -> `[B, T]`, in float32 at least: squares of float16 overflow."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    length: Tensor = torch.linalg.vector_norm(x[..., None].flatten(2), dim=-1, dtype=dtype)
    return length


def add_rows(to: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """`to.index_add(0, index, rows)`, of two dimensions."""
    if is_traced():  # index_add comes out wrong in ONNX where rows meet
        return to.scatter_add(0, index[:, None].expand_as(rows), rows)
    return to.index_add(0, index, rows)


def _sorted(rows: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Tokens in the order of their groups, and where each of so many groups begins, and the last one ends."""
    by_group, order = rows.sort(stable=True)
    return order, torch.searchsorted(by_group, up_to(groups + 1, rows.device))


def _flat(positions: Tensor, batch: int, length: int) -> Tensor:
    """Positions `[B, T]` within each of `batch` sequences of `length`, as rows of the flattened batch."""
    first = up_to(batch * length, positions.device)[::length]
    return (positions + first[:, None]).flatten()


def check_integers(**values: Any) -> None:
    """Raises a TypeError for what is no integer, by its name."""
    for name, value in values.items():
        # torch.compile has integers of its own, and sizes are tensors where torch.jit traces.
        if isinstance(value, bool) or not isinstance(value, Integral | Tensor | torch.SymInt):
            raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__})")


def take(x: Tensor, positions: Tensor) -> Tensor:
    """`x[b, positions[b]]`: `[B, T, ...]` -> `[B, P, ...]`."""
    if positions.shape[0] == 1 and not is_traced():  # a trace may run on another batch
        return x.index_select(1, positions[0])
    # Rows of a flat table: a quarter of the time of torch.gather with an expanded index.
    rows = x.flatten(0, 1).index_select(0, _flat(positions, x.shape[0], x.shape[1]))
    return rows.view(x.shape[0], positions.shape[1], *x.shape[2:])
