"""DeepShrink: one subject in pictures that are far larger than what a model was trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..hosts.family import Network, is_named
from ..hosts.hooks import Args, Argument, Kwargs, Patch, PerThread
from ..hosts.image import NetworkHooks, Step
from ..hosts.unets import ImageFamily
from . import options

TIMESTEPS = 1000  # of schedulers, where no more than the timestep is known


@dataclass(frozen=True)
class DeepShrink:
    """Lets the deep levels of a UNet see a large picture at about the size that they were trained at.

        tomesd.apply_patch(pipe, tomesd.SampleKeys(0.75), 2, shrink=tomesd.DeepShrink(4))

    The first steps settle what is where. In them the image is shrunk where it is halved first, and grown on
    the way up to the size that the skip connections have there.

    Args:
        factor: by how much sides are divided, at least 1: about those of the picture over the model's own.
        until: share of the steps, above 0 and up to 1.
        downsample: the first level that is shrunk, 2, 4 or 8.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an option out of range.

    Source: an idea of kohya's, Deep Shrink, 2023.
    """

    factor: float = 2.0
    until: float = 0.35
    downsample: int = 2

    def __post_init__(self) -> None:
        factor, until = options.number("factor", self.factor), options.number("until", self.until)
        if not 1 <= factor < math.inf:
            raise ValueError(f"factor must be a number of at least 1, got {factor:g}")
        if not 0 < until <= 1:
            raise ValueError(f"until must be above 0 and at most 1, a share of the steps, got {until:g}")
        downsample = options.integer("downsample", self.downsample)
        options.one_of("downsample", downsample, (2, 4, 8))
        for name, value in (("factor", factor), ("until", until), ("downsample", downsample)):
            object.__setattr__(self, name, value)

    def is_on(self, step: Step) -> bool:
        """Whether deep levels are shrunk in a step."""
        return self.until == 1 or gone(step) < self.until

    def attach(self, network: Network[ImageFamily], hooks: NetworkHooks, patch: Patch) -> None:
        """Registers hooks wherever the resolution changes; a ValueError where it does so nowhere."""
        family, levels = network.family, dict[int, Level]()
        for _, child, level in family.children(network.module):
            for module in child.modules():
                if is_named(module, family.down):
                    own = levels.setdefault(level, Level(self, hooks, module, 2 << level == self.downsample))
                    patch.after(module, own.halved)
                elif is_named(module, family.up):
                    patch.after(module, levels[level - 1].doubled)
        patch.before(network.module, Added(self, hooks, network.module, family).enter)
        if not any(level.shrinks for level in levels.values()):
            known = ", ".join(str(2 << level) for level in levels) or "none"
            raise ValueError(f"{self}: {network} has no such level to shrink, of 2, 4 and 8 it has {known}")


class Level:
    """Where a network goes down from one of its levels, and comes back to it."""

    def __init__(self, shrink: DeepShrink, network: NetworkHooks, module: nn.Module, shrinks: bool) -> None:
        self.shrink, self.network, self.shrinks = shrink, network, shrinks
        self.image = Argument(module, "", 0)
        self.sizes = PerThread[dict[str, torch.Size]](dict)

    def halved(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Tensor) -> Tensor:
        self.sizes.get()["size"] = self.image.get(args, kwargs).shape[-2:]
        step = self.network.own.get().step or self.network.last or Step()
        if not self.shrinks or not self.shrink.is_on(step):
            return output
        return resized(output, smaller(output.shape[-2:], self.shrink.factor))

    def doubled(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Tensor) -> Tensor:
        return resized(output, self.sizes.get().get("size", output.shape[-2:]))


class Added:
    """What others add to the levels of a network, such as a T2I-Adapter: it shrinks with them."""

    def __init__(self, shrink: DeepShrink, network: NetworkHooks, module: nn.Module, family: ImageFamily):
        self.shrink, self.timestep = shrink, network.timestep
        self.image = Argument(module, "", 0)
        self.added = [added for name in family.added if (added := Argument.optional(module, name))]

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        given = [(added, value) for added in self.added if (value := added.get(args, kwargs)) is not None]
        if not given or not self.shrink.is_on(Step.at(self.timestep.get(args, kwargs))):
            return args, kwargs
        # Sizes of the level that is shrunk first and of those below, without shrinking and with it.
        above = self.image.get(args, kwargs).shape[-2:]
        for _ in range(self.shrink.downsample.bit_length() - 2):
            above = smaller(above, 2)
        whole = [smaller(above, 2)]
        small = [smaller(whole[0], self.shrink.factor)]
        while math.prod(whole[-1]) > 1:
            whole.append(smaller(whole[-1], 2))
            small.append(smaller(small[-1], 2))
        sizes = dict(zip(whole, small, strict=True))
        for added, value in given:
            parts = [value] if isinstance(value, Tensor) else list(value)
            deep = [size for part in parts if (size := tuple(part.shape[-2:])) in {*whole, *small}]
            # What a ControlNet adds that has been shrunk itself begins with the small size.
            if not isinstance(value, Tensor) and deep and deep[0] != whole[0]:
                break
            parts = [resized(part, sizes.get(tuple(part.shape[-2:]), part.shape[-2:])) for part in parts]
            args, kwargs = added.put(args, kwargs, parts[0] if isinstance(value, Tensor) else parts)
        return args, kwargs


def gone(step: Step) -> float:
    """The share of the loop that lies before a step: by its place in the scheduler's table, where known."""
    timestep = step.timestep
    if step.number is not None and isinstance(timestep, Tensor):
        return step.number * timestep.element_size() / timestep.untyped_storage().nbytes()
    return 1 - float(timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep) / TIMESTEPS


def smaller(size: Sequence[int], factor: float) -> tuple[int, ...]:
    """The size of an image whose sides are divided by a factor."""
    return tuple(math.ceil(side / factor) for side in size)


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """Images `[B, C, h, w]` at another size."""
    return x if x.shape[-2:] == tuple(size) else F.interpolate(x, size=tuple(size), mode="bicubic")
