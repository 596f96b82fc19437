"""What methods have in common that leave queries and give self-attention fewer keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from ..hosts.family import Site
from ..hosts.hooks import Args, Kwargs, Patch
from ..hosts.image import BlockHooks
from ..maths.moments import Missed, add_missed
from ..maths.sampling import sample_size
from ..maths.token_map import TokenMap, in_full_precision
from .attention import PartHooks
from .cost import Work, work_of
from .method import Method


class KeysMethod(Method, known=False):
    """A method that leaves queries and gives self-attention fewer keys: `SampleKeys` and `MergeKeys`."""

    moments: int
    hooks: ClassVar[type[FewerKeys]]

    def why_skipped(self, site: Site) -> str | None:
        if site.part("attn") is None:
            return "has no self-attention"
        if site.sees_text("attn"):
            return "has the keys of the text in its self-attention"
        return None

    def check(self, network: str, sites: Sequence[Site], container: Sequence[Site]) -> None:
        if any(site.block.attn.keys is None for site in sites):
            raise ValueError(
                f"self-attention of {network} takes no keys but its own tokens', so {type(self).__name__} "
                "cannot give it others: use Merge"
            )

    def attach(self, blocks: Mapping[Site, BlockHooks], patch: Patch) -> None:
        for site, block in blocks.items():
            block.plan_at_attention(site)
            attn = site.module.get_submodule(site.block.attn.path)
            hooks = self.hooks(block, attn, site.block.attn, "attn", type(self).__name__, prop_attn=True)
            hooks.moments = self.moments
            patch.before(attn, hooks.enter)
            patch.after(attn, hooks.leave)

    def left(self, h: int, w: int) -> int:
        return sample_size(h * w, self.ratio)

    def work(self, sites: Sequence[Site]) -> Work:
        return work_of(sites, ("attn",), queries="all", merges=0)


class FewerKeys(PartHooks):
    """One self-attention that takes keys and values from fewer tokens than its own."""

    moments = 0

    def keys_of(self, x: Tensor, token_map: TokenMap) -> Tensor:
        """The tokens to take keys from."""
        raise NotImplementedError

    def bias_keys(
        self, attn: nn.Module, token_map: TokenMap, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        """Makes what is added to the logits of all keys into what those that are left are to have."""
        raise NotImplementedError

    def missed(self, x: Tensor, keys: Tensor, token_map: TokenMap) -> Missed:
        """What moments of the keys that are left miss of those of all."""
        raise NotImplementedError

    def enter(self, attn: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        token_map = self.map
        if token_map.is_identity or self.keys is None or self.has_own_keys(args, kwargs):
            return args, kwargs
        if "Fused" in type(getattr(attn, "processor", None)).__name__:
            raise ValueError(
                f"tomesd: {self.name} computes queries, keys and values in one layer, which {self.method} "
                "cannot tell apart: call unfuse_qkv_projections() first"
            )
        x = self.tokens.get(args, kwargs)
        keys = self.keys_of(x, token_map)
        if self.moments and self.mask(args, kwargs, token_map) is None:
            self.block.own.get().given = x, keys
        args, kwargs = self.bias_keys(attn, token_map, args, kwargs)
        return self.keys.put(args, kwargs, keys)

    def leave(self, attn: nn.Module, args: Args, kwargs: Kwargs, output: Tensor) -> Tensor:
        own = self.block.own.get()
        given, own.given = own.given, None
        layers = None if given is None else self.layers_of(attn, given[0])
        if given is None or layers is None:
            return output
        with in_full_precision(output):
            return add_missed(output, given[0], self.missed(*given, self.map), layers)
