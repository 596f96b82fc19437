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
from .attention import SKIPS, PartHooks, is_under
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
            block.plan_by_input(site)
            attn = site.module.get_submodule(site.block.attn.path)
            hooks = self.hooks(block, attn, site.block.attn, "attn", type(self).__name__, prop_attn=True)
            hooks.moments = self.moments
            hooks.attach(patch, attn)

    def left(self, h: int, w: int) -> int:
        return sample_size(h * w, self.ratio)

    def work(self, sites: Sequence[Site]) -> Work:
        return work_of(sites, ("attn",), queries="all", merges=0)


class FewerKeys(PartHooks):
    """One self-attention that takes keys and values from fewer tokens than its own."""

    moments = 0

    def attach(self, patch: Patch, attn: nn.Module) -> None:
        """Registers what it does there."""
        patch.before(attn, self.enter)
        patch.after(attn, self.leave, first=True)

    def check(self, module: nn.Module) -> None:
        self.refuse_keepers(module)
        if "Fused" in type(getattr(module, "processor", None)).__name__:
            raise ValueError(
                f"tomesd: {self.name} computes queries, keys and values in one layer, which {self.method} "
                "cannot tell apart: call unfuse_qkv_projections() first"
            )

    def takes(self, keys: Tensor, x: Tensor, token_map: TokenMap) -> bool:
        """Whether `keys`, which attention of the tokens `x` is given, are such that the map is about."""
        raise NotImplementedError

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

    def enter_unknown(
        self, attn: nn.Module, token_map: TokenMap, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs] | None:
        """Gives an attention fewer keys whose processor is not known; None: in the same way as others."""
        return None

    def enter(self, attn: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        own = self.block.own.get()
        own.given = own.sample = None
        x = self.tokens.get(args, kwargs)
        token_map = self.block.map_of(x, self.name)
        if token_map is None or token_map.is_identity or self.keys is None:
            return args, kwargs
        self.check(attn)
        if is_under(attn, SKIPS):
            return args, kwargs  # it attends to nothing, where it has as many values as queries
        unknown = None if self.is_plain(attn) else self.enter_unknown(attn, token_map, args, kwargs)
        if unknown is not None:
            return unknown
        keys = self.keys.get(args, kwargs)
        keys = x if keys is None else keys
        if not self.takes(keys, x, token_map):
            return args, kwargs
        few = self.keys_of(keys, token_map)
        values = self.given_values(args, kwargs)
        alone = keys is x and (values is None or values is x)
        # What a cache gives back is of another sample.
        if self.moments and alone and not self.is_cached(attn) and self.mask(args, kwargs, token_map) is None:
            own.given = x, few
        args, kwargs = self.bias_keys(attn, token_map, args, kwargs)
        return self.put_keys(args, kwargs, keys, few, lambda values: self.keys_of(values, token_map))

    def leave(self, attn: nn.Module, args: Args, kwargs: Kwargs, output: Tensor) -> Tensor:
        own = self.block.own.get()
        given, own.given = own.given, None
        layers = None if given is None else self.layers_of(attn, given[0])
        if given is None or layers is None or own.map is None:
            return output
        with in_full_precision(output):
            return add_missed(output, given[0], self.missed(*given, own.map), layers)
