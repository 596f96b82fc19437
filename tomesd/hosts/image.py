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

from ..maths.devices import constant, is_exported, is_traced, untraced
from ..maths.grid import number_of, shift_of
from ..maths.token_map import TokenMap
from .family import Site, submodule
from .hooks import OWNER, Args, Argument, Kwargs, Patch, PerThread
from .unets import ImageFamily

# Sizes and devices of which tables are kept.
TABLES = 64

T = TypeVar("T")
Planner = Callable[[Tensor, "Image"], TokenMap]


@dataclass(eq=False)
class Image:
    """An image of `h` x `w` tokens at one step of a denoising loop."""

    h: int
    w: int
    timestep: Tensor | float = 0  # a number, or a tensor of one, or of one for each image of the batch
    device: torch.device | None = None
    downsample: int = 1  # how many times smaller it is than the network's input
    number: int | None = None  # of the step in its loop, if it is known
    is_given: bool = False  # to programs of torch.compile, of blocks that are compiled alone
    tables: dict[Hashable, Any] = field(default_factory=dict, repr=False)  # of `always`
    shared: dict[Hashable, Any] = field(default_factory=dict, repr=False)  # of `once`

    @property
    def shift(self) -> Tensor:
        """A random number of this step, int64 `[1 or B]`: `maths.grid.shift_of`."""
        return self.once("shift", lambda: shift_of(self.timestep, self.device))

    def fits(self, h: int, w: int, batch: int, device: torch.device) -> bool:
        """Whether this is an image of that size, for so many samples."""
        rows = self.timestep.numel() if isinstance(self.timestep, Tensor) else 1
        return (self.h, self.w, self.device) == (h, w, device) and rows in (1, batch)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What is made once for all blocks that share this image: those of a level, in one step."""
        if self.is_given and torch.compiler.is_compiling():
            return make()  # or the first block of a level would need a program of its own
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
            # Or training could not use them afterwards; and a trace would hold how they are made.
            with torch.inference_mode(False), untraced():
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
    batch: int
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
        return cls(timestep, None if torch.compiler.is_compiling() else number_of(timestep))


@dataclass(eq=False)
class Current:
    """Where a thread is: the step of its network's forward, and its call of a container."""

    step: Step | None = None
    begun: bool = False  # whether the step of the forward that runs is known
    call: Call | None = None


class NetworkHooks:
    """Reads the timestep of each forward of a network, and makes the images of its containers.

    One image serves all containers of a level in a step. Activation checkpointing on a GPU calls parts of the
    network again in a thread of its own, which is given the last step of any thread.

    Where torch.compile wraps a network, hooks on itself are no part of the program, and whatever they keep is
    shared by all threads; and some hosts call its `forward`, past all hooks. So there the timestep is taken
    from a module inside of the network, its clock.
    """

    def __init__(self, patch: Patch, network: nn.Module, family: ImageFamily) -> None:
        self.patch = patch
        self.timestep = Argument(network, family.timestep, 1)
        self.own = PerThread(Current)
        self.last: Step | None = None
        self.tables: dict[Hashable, Any] = {}
        self.inside: dict[str, Any] = {}  # paths of its containers, and a hook on each
        clock, first, last = (
            next((module for path in paths if (module := submodule(network, path))), None)
            for paths in (family.clock, family.first, family.last)
        )
        if first is not None:
            self.image_given = Argument(first, "", 0)
            patch.before(first, self.fix)
        self.has_clock = clock is not None and last is not None
        patch.before(network, self.begin)
        patch.owner = patch.handles[-1]
        if clock is not None and last is not None:
            self.given = Argument(clock, "", 0)
            patch.before(clock, self.tick)
            patch.after(last, self.end)
        else:
            patch.after(network, self.end)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "last": None, "tables": {}}

    def begin(self, network: nn.Module, args: Args, kwargs: Kwargs) -> None:
        self.patch.refuse_onnx()
        for listener in self.patch.listeners:
            listener.begin()
        if self.has_clock and torch.compiler.is_compiling():
            self.own.get().begun = False  # a forward that failed may have left it so
            return
        self.set(Step.at(self.timestep.get(args, kwargs)))
        self.patch.look_for(network, self.inside)

    def tick(self, clock: nn.Module, args: Args, kwargs: Kwargs) -> None:
        # Once in a forward: some give it other numbers as well, such as frames per second.
        if not self.own.get().begun:
            self.set(Step.at(self.given.get(args, kwargs)))

    def fix(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Ends what the clock tells, and has torch.compile make a program for each size of the image."""
        self.own.get().begun = False  # what comes may fail, and never get to the end
        for side in self.image_given.get(args, kwargs).shape[-2:]:
            constant(side)

    def set(self, step: Step) -> None:
        own = self.own.get()
        own.step, own.begun = step, True
        if not torch.compiler.is_compiling():
            self.last = step

    def end(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> None:
        own = self.own.get()
        own.begun = False
        # Else kept for what checkpointing recomputes. Compiled code would have to return it from each call.
        if torch.compiler.is_compiling():
            own.step = None

    def image(self, level: int, h: int, w: int, x: Tensor, step: Step | None = None) -> Image:
        """The image of `h` x `w` tokens of a level, for a batch `x` `[B, C, ...]` of them."""
        step = step or self.own.get().step or self.last or Step()  # containers may be called alone
        image = step.images.get(level)
        if image is None or not image.fits(h, w, x.shape[0], x.device):
            timestep = step.timestep
            if isinstance(timestep, Tensor) and timestep.numel() > 1:  # a video's frames have their sample's
                # Not divmod, which programs of torch.compile cannot have of an open number.
                each, rest = x.shape[0] // timestep.numel(), x.shape[0] % timestep.numel()
                timestep = timestep.flatten()[:1] if rest else timestep.flatten().repeat_interleave(each)
            given = not torch.compiler.is_compiling()
            image = Image(h, w, timestep, x.device, 2**level, step.number, given, self.tables)
            step.images[level] = image
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
        name: str,
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
        self.name = name
        self.inside: dict[str, Any] = {}  # paths of its blocks, and a hook on each
        patch.before(module, self.enter)
        if self.carrier is None:
            patch.after(module, self.leave)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "last": None}

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        if not torch.compiler.is_compiling() and not self.network.patch.is_owned:
            return args, kwargs  # a copy of a part
        self.network.patch.look_for(module, self.inside)
        x = self.input.get(args, kwargs)
        b, (h, w) = x.shape[0], x.shape[-2:]
        if is_traced() or is_exported():  # for images of one size
            h, w = int(h), int(w)
        b, h, w = int(b) if is_traced() else b, h // self.side, w // self.side
        step = None if self.timestep is None else Step.at(self.timestep.get(args, kwargs))
        call = Call(self.network.image(self.level, h, w, x, step), b)
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
