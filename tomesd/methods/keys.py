"""What methods have in common that leave queries and give self-attention fewer keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..hosts.blocks import BlockHooks
from ..hosts.family import Site
from ..hosts.hooks import Args, Kwargs, Patch
from ..hosts.image import Image
from ..maths.probes import add_missed, number_of_probes
from ..maths.sampling import Samples, how_many, sample_size, sample_tokens
from ..maths.token_map import TokenMap, take
from . import options
from .attention import SKIPS, PartHooks, is_under
from .cost import Work, work_of
from .method import Method


def sample(image: Image, left: int, seed: int | None, salt: int = 0, in_turns: bool = True) -> TokenMap:
    """A sample of so many tokens of an image, spread evenly and new in each step but for a seed of None.

    `in_turns`: where it is known which step of a loop this is, no step draws what some before it have drawn.
    """
    size, device = (image.h, image.w, left), image.device
    number = image.number if in_turns else None
    salted, turns = (seed or 0) + salt, number is not None
    # Programs of torch.compile draw where others look up, as they would make the whole table anew.
    if torch.compiler.is_compiling():
        row = 0 if seed is None else image.shift % how_many(image.h * image.w)
        return image.once(("sample", size, salted), lambda: sample_tokens(*size, salted, row, device))
    key = "samples", size, salted, turns
    samples = image.always(key, lambda: Samples.of(*size, salted, turns, device))
    if seed is None:
        return samples[0]
    rows = how_many(image.h * image.w)
    return image.once(("sample", *key), lambda: samples[(image.shift if number is None else number) % rows])


class KeysMethod(Method, known=False):
    """A method that leaves queries and gives self-attention fewer keys: `SampleKeys` and `MergeKeys`."""

    seed: int | None
    probes: int
    hooks: ClassVar[type[FewerKeys]]

    def __post_init__(self) -> None:
        self._set(
            ratio=options.share(self.ratio, "[0, 1)"),
            seed=options.integer_or_none("seed", self.seed),
            probes=options.integer("probes", self.probes, least=0),
        )

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
            hooks.probes_of = self.probes_of
            hooks.attach(patch, attn)

    def left(self, h: int, w: int) -> int:
        return sample_size(h * w, self.ratio)

    def probes_of(self, image: Image) -> Tensor | None:
        """Positions `[1 or B, P]` of the tokens that attend to all keys, other ones in each step; or None."""
        probes = number_of_probes(self.probes, image.h * image.w)
        # Not by the seed of the keys: a sample of probes that are all keys would flatter it.
        return sample(image, probes, self.seed, -1, in_turns=False).keep if probes else None

    def work(self, sites: Sequence[Site]) -> Work:
        return replace(work_of(sites, ("attn",), queries="all", merges=0), probes=self.probes)


class FewerKeys(PartHooks):
    """One self-attention that takes keys and values from fewer tokens than its own."""

    probes_of: Callable[[Image], Tensor | None]

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
        unknown = None if self.is_known(attn) else self.enter_unknown(attn, token_map, args, kwargs)
        if unknown is not None:
            return unknown
        keys = self.keys.get(args, kwargs)
        keys = x if keys is None else keys
        if not self.takes(keys, x, token_map):
            self.block.patch.warn(
                f"{self.name} was given keys of its own, {list(keys.shape[:2])} tokens, not those of its "
                "block: such calls are left as they are"
            )
            return args, kwargs
        few = self.keys_of(keys, token_map)
        values = self.given_values(args, kwargs)
        alone = keys is x and (values is None or values is x)
        alone = alone and self.mask(args, kwargs, token_map) is None
        # What a cache gives back is of another sample.
        if alone and own.call is not None and self.only_attends(attn) and not self.is_cached(attn):
            probes = self.probes_of(own.call.image)
            if probes is not None:
                given = take(x, probes)
                own.given = x, probes, given, *self.keys.put(*self.tokens.put(args, kwargs, given), x)
        args, kwargs = self.bias_keys(attn, token_map, args, kwargs)
        return self.put_keys(args, kwargs, keys, few, lambda values: self.keys_of(values, token_map))

    def leave(self, attn: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        own = self.block.own.get()
        given, own.given = own.given, None
        if given is None:
            return output
        x, probes, asked, args, kwargs = given
        # Past its hooks: to whoever counts or watches calls this is part of the one that has just been.
        exact = self.tokens_of(attn.forward(*args, **kwargs))
        tokens = self.tokens_of(output)
        return self.put_tokens(output, add_missed(tokens, x, probes, asked, exact - take(tokens, probes)))
