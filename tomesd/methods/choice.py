"""Which block of a network gets which method, or why it gets none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeAlias

from ..hosts.family import Network, Site
from ..hosts.unets import ImageFamily
from . import options
from .merge import Merge
from .method import Method

DOWNSAMPLES = (1, 2, 4, 8)

ImageNetwork: TypeAlias = Network[ImageFamily]
# The method of each block, or the reason why it has none.
Chosen: TypeAlias = dict[str, Method | str]


@dataclass(frozen=True)
class UpTo:
    """One method for all blocks up to a downsampling; by default up to the finest one that has some."""

    method: Method
    limit: int | None

    def __post_init__(self) -> None:
        if options.integer_or_none("max_downsample", self.limit) not in (None, *DOWNSAMPLES):
            raise ValueError(
                "max_downsample must be None (the finest level with attention) or one of "
                f"1, 2, 4, 8, got {self.limit}"
            )

    def choose(self, network: ImageNetwork) -> Chosen:
        """The method of each block of a network."""
        lacks = {site.name: self.method.why_skipped(site) for site in network.sites}
        fit = [site.downsample for site in network.sites if lacks[site.name] is None]
        limit = min(fit, default=DOWNSAMPLES[-1]) if self.limit is None else self.limit
        return {
            site.name: f"downsample {site.downsample} > max_downsample {limit}"
            if site.downsample > limit
            else lacks[site.name] or self.method
            for site in network.sites
        }

    def check(self, chosen: Mapping[ImageNetwork, Chosen]) -> None:
        """Raises a ValueError where something was asked for that no block of these networks gets."""
        for network, methods in chosen.items():
            if not methods or any(isinstance(method, Method) for method in methods.values()):
                continue
            lacks = _lacks(self.method, network.sites)
            raise ValueError(
                f"nothing to merge in {network}: each of its transformer blocks {lacks}"
                if lacks
                else f"nothing to merge in {network} with max_downsample={self.limit}: its transformer "
                f"blocks are at downsample {_levels(network.sites)}"
            )


@dataclass(frozen=True)
class ByKey:
    """A method for each downsampling, or for each block by its name. Other blocks have none."""

    methods: Mapping[int | str, Method]

    @classmethod
    def of(cls, given: Mapping[Any, Any]) -> ByKey:
        for key in given:
            named = isinstance(key, str) and not key.isdigit()
            level = isinstance(key, Integral) and not isinstance(key, bool) and key in DOWNSAMPLES
            if not named and not level:
                raise ValueError(
                    "methods are chosen by downsample (1, 2, 4, 8) or by the name of a block, got "
                    f"{options.shown(key)} ({type(key).__name__})"
                )
            if not isinstance(given[key], Method):
                options.number(f"what is given for {options.shown(key)}", given[key], "a ratio or a method")
        if not given:
            raise ValueError("nothing to merge: the dict of methods is empty")
        return cls(
            {key: value if isinstance(value, Method) else Merge(value) for key, value in given.items()}
        )

    def choose(self, network: ImageNetwork) -> Chosen:
        chosen: Chosen = {}
        for site in network.sites:
            key = next((key for key in _keys(network, site) if key in self.methods), None)
            chosen[site.name] = f"no method was given for it or for downsample {site.downsample}"
            if key is not None:
                chosen[site.name] = self.methods[key].why_skipped(site) or self.methods[key]
        return chosen

    def check(self, chosen: Mapping[ImageNetwork, Chosen]) -> None:
        sites = {(network, site): _keys(network, site) for network in chosen for site in network.sites}
        for key, method in self.methods.items():
            named = [site for (_, site), keys in sites.items() if key in keys]
            where = repr(key) if isinstance(key, str) else f"downsample {key}"
            if not named:
                names = ", ".join(str(keys[0]) for keys in list(sites.values())[:2])
                raise ValueError(
                    f"nothing to merge at {where}, for which {method} was given: transformer blocks are at "
                    f"downsample {_levels([site for _, site in sites])}, their names are such as {names}"
                )
            lacks = _lacks(method, named)
            if lacks:
                raise ValueError(f"nothing to merge at {where}, for which {method} was given: it {lacks}")


def _keys(network: ImageNetwork, site: Site) -> tuple[str, int]:
    return network.path(site), site.downsample


def _lacks(method: Method, sites: Sequence[Site]) -> str:
    """What all of some blocks lack for a method; empty if one of them has all that it needs."""
    lacks = {method.why_skipped(site) for site in sites}
    return "" if None in lacks else " or ".join(sorted(map(str, lacks)))


def _levels(sites: Sequence[Site]) -> str:
    return ", ".join(str(level) for level in sorted({site.downsample for site in sites}))
