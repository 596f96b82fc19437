"""What methods have in common that leave queries and give self-attention fewer keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from ..hosts.family import Site, submodule
from ..hosts.hooks import Args, Kwargs, Patch
from ..hosts.image import BlockHooks
from ..maths.moments import Missed, add_missed
from ..maths.sampling import sample_size
from ..maths.token_map import TokenMap, in_full_precision
from .attention import PartHooks, is_cached
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
            patch.before(attn, hooks.enter)
            patch.after(attn, hooks.leave)
            if hasattr(attn, "processor"):
                for name, hook in zip(hooks.layers, (hooks.enter_keys, hooks.enter_values), strict=True):
                    layer = submodule(attn, name)
                    if layer is not None:
                        patch.before(layer, hook)

    def left(self, h: int, w: int) -> int:
        return sample_size(h * w, self.ratio)

    def work(self, sites: Sequence[Site]) -> Work:
        return work_of(sites, ("attn",), queries="all", merges=0)


class FewerKeys(PartHooks):
    """One self-attention that takes keys and values from fewer tokens than its own."""

    moments = 0

    @property
    def layers(self) -> tuple[str, str]:
        """The layers of keys and of values."""
        return self.part.layers[1:3]

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
    ) -> tuple[Args, Kwargs]:
        """Gives an attention fewer keys whose processor is not known."""
        raise NotImplementedError

    def enter(self, attn: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        own = self.block.own.get()
        own.given = own.sample = None
        x = self.tokens.get(args, kwargs)
        token_map = self.block.map_of(x, self.name)
        if token_map is None or token_map.is_identity or self.keys is None:
            return args, kwargs
        self.refuse_keepers(attn)
        if "Fused" in type(getattr(attn, "processor", None)).__name__:
            raise ValueError(
                f"tomesd: {self.name} computes queries, keys and values in one layer, which {self.method} "
                "cannot tell apart: call unfuse_qkv_projections() first"
            )
        if not self.is_plain(attn):
            return self.enter_unknown(attn, token_map, args, kwargs)
        keys = self.keys.get(args, kwargs)
        keys = x if keys is None else keys
        if not self.takes(keys, x, token_map):
            return args, kwargs
        few = self.keys_of(keys, token_map)
        values = self.given_values(args, kwargs)
        alone = keys is x and (values is None or values is x)
        # What a cache gives back is of another sample.
        fresh = is_cached(attn) is None and not (self.part.cache and hasattr(attn, self.part.cache))
        if self.moments and alone and fresh and self.mask(args, kwargs, token_map) is None:
            own.given = x, few
        args, kwargs = self.bias_keys(attn, token_map, args, kwargs)
        return self.put_keys(args, kwargs, keys, few, lambda values: self.keys_of(values, token_map))

    def enter_keys(self, layer: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        """Gives the layer of keys fewer tokens, inside of an attention that asks for it."""
        own = self.block.own.get()
        if own.sample is None or not (args and own.sample.fits(args[0])):
            return None
        own.keys += 1
        return (own.sample.merge(args[0], "drop"), *args[1:]), kwargs

    def enter_values(self, layer: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        """Gives the layer of values as many: those that go with keys. Some attend to nothing (PAG)."""
        own = self.block.own.get()
        if own.sample is None or own.values >= own.keys:
            return None
        own.values += 1
        return (own.sample.merge(args[0], "drop"), *args[1:]), kwargs

    def leave(self, attn: nn.Module, args: Args, kwargs: Kwargs, output: Tensor) -> Tensor:
        own = self.block.own.get()
        given, own.given, sample, own.sample = own.given, None, own.sample, None
        if sample is not None and not own.values:
            raise ValueError(
                f"tomesd: {self.name} has the processor {type(attn.processor).__name__}, of which "
                f"{self.method} could take no keys: it did not call {' and then '.join(self.layers)} with "
                f"{sample.tokens} tokens. Use Merge"
            )
        layers = None if given is None else self.layers_of(attn, given[0])
        if given is None or layers is None or own.map is None:
            return output
        with in_full_precision(output):
            return add_missed(output, given[0], self.missed(*given, own.map), layers)
