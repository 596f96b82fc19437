"""Images of tokens while a network runs: their size, their step, what blocks share, how blocks get to know.

State has three lifetimes. For good: a patch and the tables that depend on a size alone. For a call of a
container: its `Image`, which travels with the call. For a call of a block: `BlockCall`, each thread's own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..maths.token_map import TokenMap
from .family import Site, submodule
from .hooks import OWNER, Args, Argument, Kwargs, Patch, PerThread
from .unets import ImageFamily

# Sizes and devices of which tables are kept.
TABLES = 64

T = TypeVar("T")
Plan = Callable[[Tensor, "Image"], TokenMap]


@dataclass(eq=False)
class Image:
    """An image of `h` x `w` tokens at one step of a denoising loop."""

    h: int
    w: int
    timestep: Tensor | float = 0  # a number, or a tensor of one, or of one for each image of the batch
    device: torch.device | None = None
    downsample: int = 1  # how many times smaller it is than the network's input
    number: int | None = None  # of the step in its loop, if it is known
    tables: dict[Hashable, Any] = field(default_factory=dict, repr=False)  # of `always`
    shared: dict[Hashable, Any] = field(default_factory=dict, repr=False)  # of `once`

    def fits(self, h: int, w: int, batch: int, device: torch.device) -> bool:
        """Whether this is an image of that size, for so many samples."""
        rows = self.timestep.numel() if isinstance(self.timestep, Tensor) else 1
        return (self.h, self.w, self.device) == (h, w, device) and rows in (1, batch)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What is made once for all blocks that share this image: those of a level, in one step."""
        if key not in self.shared:
            self.shared[key] = make()
        made: T = self.shared[key]
        return made

    def always(self, key: Hashable, make: Callable[[], T]) -> T:
        """What depends on the size alone, an object with tensors: kept as long as the model is patched."""
        if torch.compiler.is_compiling():
            return self.once(key, make)  # part of the program
        place = key, self.h, self.w, self.device
        made: T | None = self.tables.get(place)
        if made is None:
            with torch.inference_mode(False):  # or training could not use them afterwards
                made = make()
            # Those of FakeTensorMode, say, would be of no use later.
            if all(type(value) is Tensor for value in vars(made).values() if isinstance(value, Tensor)):
                if len(self.tables) >= TABLES:
                    self.tables.clear()
                self.tables[place] = made
        return made


@dataclass(eq=False)
class Call:
    """One call of a container: its image, and what a method keeps from its first block to its last."""

    image: Image
    kept: Any = None


@dataclass(eq=False)
class Step:
    """One forward of a network: its timestep and the images so far, by level."""

    timestep: Tensor | float = 0
    number: int | None = None  # in its loop, if it is known
    images: dict[int, Image] = field(default_factory=dict)

    @classmethod
    def at(cls, timestep: Tensor | float | None) -> Step:
        if not isinstance(timestep, Tensor):
            return cls(0 if timestep is None else timestep)
        timestep = timestep.detach()  # deepcopy refuses tensors that have a history
        return cls(timestep, None if torch.compiler.is_compiling() else _number(timestep))


def _number(timestep: Tensor) -> int | None:
    """Which of a scheduler's timesteps this is: those of a loop over them are views into their tensor."""
    one = timestep.numel() == 1 or not any(timestep.stride())
    table = timestep.untyped_storage().nbytes() > timestep.element_size()
    return int(timestep.storage_offset()) if one and table else None


@dataclass(eq=False)
class Current:
    """Where a thread is: the step of its network's forward, and its call of a container."""

    step: Step | None = None
    call: Call | None = None


class NetworkHooks:
    """Reads the timestep of each forward of a network, and makes the images of its containers.

    One image serves all containers of a level in a step. Activation checkpointing on a GPU calls parts of the
    network again in a thread of its own, which is given the last step of any thread.

    Where torch.compile wraps a network, hooks on itself are no part of the program, and whatever they keep is
    shared by all threads. So a program takes the timestep from a module inside of the network, its clock.
    """

    def __init__(self, patch: Patch, network: nn.Module, family: ImageFamily) -> None:
        self.patch = patch
        self.timestep = Argument(network, family.timestep, 1)
        self.own = PerThread(Current)
        self.last: Step | None = None
        self.tables: dict[Hashable, Any] = {}
        clock, last = (
            next((module for path in paths if (module := submodule(network, path))), None)
            for paths in (family.clock, family.last)
        )
        self.has_clock = clock is not None and last is not None
        patch.before(network, self.begin)
        if clock is not None and last is not None:
            self.given = Argument(clock, "", 0)
            patch.before(clock, self.tick)
            patch.after(last, self.end)
        else:
            patch.after(network, self.end)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "last": None, "tables": {}}

    def begin(self, network: nn.Module, args: Args, kwargs: Kwargs) -> None:
        for listener in self.patch.listeners:
            listener.begin()
        if self.has_clock and torch.compiler.is_compiling():
            self.own.get().step = None  # a forward that failed may have left one
            return
        step = self.own.get().step = Step.at(self.timestep.get(args, kwargs))
        if not torch.compiler.is_compiling():
            self.last = step

    def tick(self, clock: nn.Module, args: Args, kwargs: Kwargs) -> None:
        own = self.own.get()
        if own.step is None and torch.compiler.is_compiling():
            own.step = Step.at(self.given.get(args, kwargs))

    def end(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> None:
        # Else kept for what checkpointing recomputes. Compiled code would have to return it from each call.
        if torch.compiler.is_compiling():
            self.own.get().step = None

    def image(self, level: int, h: int, w: int, x: Tensor, step: Step | None = None) -> Image:
        """The image of `h` x `w` tokens of a level, for a batch `x` `[B, C, ...]` of them."""
        step = step or self.own.get().step or self.last or Step()  # containers may be called alone
        image = step.images.get(level)
        if image is None or not image.fits(h, w, x.shape[0], x.device):
            timestep = step.timestep
            if isinstance(timestep, Tensor) and timestep.numel() > 1:  # a video's frames have their sample's
                each, rest = divmod(x.shape[0], timestep.numel())
                timestep = timestep.flatten()[:1] if rest else timestep.flatten().repeat_interleave(each)
            made = Image(h, w, timestep, x.device, 2**level, step.number, self.tables)
            image = step.images[level] = made
        return image


class ContainerHooks:
    """Gives each call of a container its image, and that to the blocks.

    Where the container passes a dict on to attention, the call travels in it. So what activation
    checkpointing recomputes is given the call of its own forward again, and a block that is compiled alone
    sees the size of the image as an argument, not as a constant. Other containers pass nothing on; there
    blocks look up the thread's last call, or else any thread's.
    """

    def __init__(
        self,
        patch: Patch,
        network: NetworkHooks,
        module: nn.Module,
        family: ImageFamily,
        sites: Sequence[Site],
    ) -> None:
        self.network = network
        self.level = sites[0].level
        self.input = Argument(module, family.image, 0)
        self.side = family.side(module)
        self.carrier = Argument(module, family.carrier) if family.carrier else None
        # Of a network that runs its blocks itself.
        self.timestep = None if family.containers else network.timestep
        self.own = PerThread(Current)
        self.last: Call | None = None
        patch.before(module, self.enter)
        if self.carrier is None:
            patch.after(module, self.leave)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "last": None}

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        x = self.input.get(args, kwargs)
        h, w = (length // self.side for length in x.shape[-2:])
        step = None if self.timestep is None else Step.at(self.timestep.get(args, kwargs))
        call = Call(self.network.image(self.level, h, w, x, step))
        if self.carrier is not None:
            return self.carrier.put(args, kwargs, {**(self.carrier.get(args, kwargs) or {}), OWNER: call})
        self.own.get().call = call
        if not torch.compiler.is_compiling():
            self.last = call
        return args, kwargs

    def leave(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> None:
        if torch.compiler.is_compiling():
            self.own.get().call = None  # as in NetworkHooks.end

    def unpassed(self) -> Call | None:
        """The call that blocks are part of, where it is not passed on to them."""
        return self.own.get().call or self.last


@dataclass(eq=False)
class BlockCall:
    """What is known of a block during one call of it."""

    x: Tensor | None = None  # its input, until the plan is made
    call: Call | None = None  # of its container
    map: TokenMap | None = None  # the plan
    given: tuple[Tensor, Tensor] | None = None  # tokens of the part that runs, as they were and merged


class BlockHooks:
    """A block while it runs: its own call, and the call of the container that it is part of.

    `plan` is the planner of its method, if it has one. It holds no module, so that a copy of a block does not
    take the whole model along.
    """

    def __init__(self, patch: Patch, container: ContainerHooks, site: Site, family: ImageFamily) -> None:
        self.patch = patch
        self.container = container
        self.name = site.name
        self.own = PerThread(BlockCall)
        self.plan: Plan | None = None
        self.tokens = Argument(site.module, site.block.tokens, 0)
        self.carrier = Argument(site.module, family.carrier) if family.carrier else None
        for name in ("attn", "cross"):
            part = site.part(name)
            if part is not None:
                patch.before(part, self.receive)
        patch.after(site.module, self.forget)

    def plan_at_attention(self, site: Site) -> None:
        """From now on plans at self-attention, by the block's input."""
        # Not at the block itself: what CompVis' checkpointing recomputes begins after it.
        first = site.module.get_submodule(site.block.input)
        self.given = Argument(first, "", 0)
        self.patch.before(first, self.keep)
        self.patch.before(site.module.get_submodule(site.block.attn.path), self.plan_by_input)

    def keep(self, part: nn.Module, args: Args, kwargs: Kwargs) -> None:
        self.own.get().x = self.given.get(args, kwargs)

    def plan_by_input(self, attn: nn.Module, args: Args, kwargs: Kwargs) -> None:
        own = self.own.get()
        x, own.x = own.x, None
        own.map = self.make_plan(x, own.call)

    def receive(self, attn: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Takes the container's call out of what attention is given."""
        call = kwargs.get(OWNER)
        self.own.get().call = call or self.container.unpassed()
        if call is not None:
            kwargs = {name: value for name, value in kwargs.items() if name != OWNER}
        return args, kwargs

    def forget(self, block: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> None:
        own = self.own.get()
        own.x = own.call = own.map = own.given = None

    def call_of(self, args: Args, kwargs: Kwargs) -> Call | None:
        """The container's call, from what the block itself is given."""
        if self.carrier is None:
            return self.container.unpassed()
        return (self.carrier.get(args, kwargs) or {}).get(OWNER)

    def make_plan(self, x: Tensor | None, call: Call | None) -> TokenMap:
        """Plans what to merge of the tokens `x` `[B, N, C]` of this block, and tells who listens."""
        image = None if call is None else call.image
        if x is None or image is None or x.shape[1] != image.h * image.w:
            tokens = "no tokens" if x is None else f"{x.shape[1]} tokens"
            seen = "no image" if image is None else f"an image of {image.h} x {image.w}"
            raise RuntimeError(
                f"tomesd: {self.name} was given {tokens} and {seen}: call the whole network, not a part of "
                "it or a copy of a part, or remove_patch first"
            )
        assert self.plan is not None
        token_map = self.plan(x, image)
        for listener in self.patch.listeners:
            listener.note(self.name, image, x.shape[0], token_map)
        return token_map
