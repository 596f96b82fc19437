"""Which block of a network gets which method, or why it gets none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from ..hosts.family import Network, Site
from ..hosts.unets import ImageFamily
from . import options
from .merge import Merge
from .method import Method
from .recipe import Recipe

DOWNSAMPLES = (1, 2, 4, 8)

# The method of each block, or the reason why it has none.
Chosen: TypeAlias = dict[str, Method | str]
ImageNetwork: TypeAlias = Network[ImageFamily]


class Choice(Protocol):
    """How blocks get their methods."""

    def choose(self, network: ImageNetwork) -> Chosen:
        """The method of each of its blocks."""

    def check(self, chosen: Mapping[ImageNetwork, Chosen]) -> None:
        """Raises a ValueError where something was asked for that no block of these networks gets."""


def choice_of(given: Method | Recipe | Mapping[Any, Any], max_downsample: Any) -> Choice:
    """Reads the second and third argument of `apply_patch`."""
    if isinstance(given, Method):
        limit = options.integer_or_none("max_downsample", max_downsample)
        if limit not in (None, *DOWNSAMPLES):
            raise ValueError(
                "max_downsample must be None (the finest level with attention) or one of "
                f"{', '.join(map(str, DOWNSAMPLES))}, got {limit}"
            )
        return UpTo(given, limit)
    if max_downsample is not None:
        raise TypeError(
            f"max_downsample={max_downsample!r} goes with one method for all blocks, not with a "
            f"{type(given).__name__}, which says by itself where to work"
        )
    return ByName(given) if isinstance(given, Recipe) else ByLevel.of(given)


@dataclass(frozen=True)
class UpTo:
    """One method for all blocks up to a downsampling; by default up to the finest one that some have."""

    method: Method
    limit: int | None

    def choose(self, network: ImageNetwork) -> Chosen:
        lacks = {site.name: self.method.why_skipped(site) for site in network.sites}
        limit = self.limit
        if limit is None:
            fit = [site.downsample for site in network.sites if lacks[site.name] is None]
            limit = min(fit, default=DOWNSAMPLES[-1])
        chosen: Chosen = {}
        for site in network.sites:
            chosen[site.name] = lacks[site.name] or self.method
            if site.downsample > limit:
                chosen[site.name] = f"downsample {site.downsample} > max_downsample {limit}"
        return chosen

    def check(self, chosen: Mapping[ImageNetwork, Chosen]) -> None:
        for network, methods in chosen.items():
            if not methods or any(isinstance(method, Method) for method in methods.values()):
                continue
            lacks = {self.method.why_skipped(site) for site in network.sites}
            if None not in lacks:
                raise ValueError(
                    f"nothing to merge in {network}: each of its transformer blocks "
                    f"{' or '.join(sorted(map(str, lacks)))}"
                )
            raise ValueError(
                f"nothing to merge in {network} with max_downsample={self.limit}: its transformer blocks are "
                f"at downsample {_levels(network.sites)}"
            )


@dataclass(frozen=True)
class ByLevel:
    """A method for each downsampling."""

    methods: Mapping[int, Method]

    @classmethod
    def of(cls, given: Mapping[Any, Any]) -> ByLevel:
        for downsample in given:
            if downsample not in DOWNSAMPLES or isinstance(downsample, bool):
                raise ValueError(
                    f"methods are chosen by downsample ({', '.join(map(str, DOWNSAMPLES))}), got "
                    f"{downsample!r}; a Recipe chooses by the names of blocks"
                )
        if not given:
            raise ValueError("nothing to merge: no downsample has a method")
        return cls(
            {key: value if isinstance(value, Method) else Merge(value) for key, value in given.items()}
        )

    def choose(self, network: ImageNetwork) -> Chosen:
        chosen: Chosen = {}
        for site in network.sites:
            method = self.methods.get(site.downsample)
            chosen[site.name] = f"downsample {site.downsample} has no method"
            if method is not None:
                chosen[site.name] = method.why_skipped(site) or method
        return chosen

    def check(self, chosen: Mapping[ImageNetwork, Chosen]) -> None:
        sites = [site for network in chosen for site in network.sites]
        for downsample, method in self.methods.items():
            lacks = {method.why_skipped(site) for site in sites if site.downsample == downsample}
            if not lacks:
                raise ValueError(
                    f"nothing to merge at downsample {downsample}, for which {method} was given: transformer "
                    f"blocks are at downsample {_levels(sites)}"
                )
            if None not in lacks:
                raise ValueError(
                    f"nothing to merge at downsample {downsample}, for which {method} was given: each "
                    f"transformer block there {' or '.join(sorted(map(str, lacks)))}"
                )


@dataclass(frozen=True)
class ByName:
    """A method for each block, by its name."""

    recipe: Recipe

    def choose(self, network: ImageNetwork) -> Chosen:
        chosen: Chosen = {}
        for site in network.sites:
            path = network.path(site)
            method = self.recipe.methods.get(path)
            chosen[site.name] = "not in the recipe"
            if method is not None:
                reason = method.why_skipped(site)
                if reason is not None:
                    raise ValueError(f"the recipe has {method} for {path}, which {reason}")
                chosen[site.name] = method
        return chosen

    def check(self, chosen: Mapping[ImageNetwork, Chosen]) -> None:
        known = [network.path(site) for network in chosen for site in network.sites]
        unknown = [name for name in self.recipe.methods if name not in known]
        if unknown:
            raise ValueError(
                f"the recipe names {len(unknown)} blocks that are not in this model, such as {unknown[0]}; "
                f"it has {len(known)}, such as {', '.join(known[:2])}"
            )


def _levels(sites: Sequence[Site]) -> str:
    return ", ".join(str(level) for level in sorted({site.downsample for site in sites})) or "none"
