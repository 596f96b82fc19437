"""trace: which tokens merged in each block, while a model runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from ..hosts.family import Network
from ..hosts.hooks import patch_of
from ..hosts.image import Image
from ..hosts.unets import ImageFamily, find_networks
from ..maths.token_map import TokenMap
from ..methods import options


@dataclass(frozen=True, eq=False)
class Plan:
    """What one call of a block merged, or with `MergeStage` one call of a whole transformer.

    The samples of the map are those of the call: in pipelines with guidance first the unconditional ones,
    then as many conditional ones. With `SampleKeys` nothing merges: `map.keep` are the tokens that all look
    at, each other one is listed with one of its cell. `map.is_identity` where `auto` left the block alone.
    """

    block: str  # its path, as in `explain`; with `MergeStage` that of the transformer's first block
    downsample: int  # how many times smaller its image of tokens is than the latent image
    step: int  # of the denoising loop: how often its network had been called since the trace began
    timestep: float  # of the first sample
    h: int  # height of the image in tokens
    w: int  # width of the image in tokens
    map: TokenMap  # which of the `h * w` tokens merged, on the CPU

    def __repr__(self) -> str:
        return (
            f"Plan({self.block} at downsample {self.downsample}, step {self.step}, timestep "
            f"{self.timestep:g}: {self.map.tokens} -> {self.map.groups} of {self.h} x {self.w} tokens)"
        )


@contextmanager
def trace(model: object, steps: Iterable[int] | None = None) -> Iterator[list[Plan]]:
    """`with trace(pipe) as plans: pipe("a cat")` lists what each block merged at each step.

    The list grows while the block is open, in the order of the calls. Compiled code is run uncompiled
    meanwhile (before torch 2.6: compiled anew), as it holds no plan that could be read. A model that is
    patched anew meanwhile is traced on, one whose patch was removed is not.

    Args:
        model: what was given to `apply_patch`.
        steps: the steps to keep, counted from 0; by default all of them. A plan takes 12 bytes for each
            token and sample at ratio 0.5.

    Raises:
        TypeError: the model is neither module nor pipeline, or `steps` are no integers.
        ValueError: it holds no network of a known family, or none that is patched; a negative step.
    """
    if steps is not None:
        if not isinstance(steps, Iterable) or isinstance(steps, str):
            raise options.wrong_type("steps", "several integers, such as [0, 9]", steps)
        steps = {options.integer("each of steps", step, least=0) for step in steps}
    plans: list[Plan] = []
    networks = find_networks(model)
    recorders = []
    for network in networks:
        patch = patch_of(network.module)
        if patch is not None:
            recorders.append((patch, Recorder(network, steps, plans)))
    if not recorders:
        kinds = ", ".join(type(network.module).__name__ for network in networks)
        raise ValueError(f"nothing merges in {kinds}: apply_patch comes first")
    with ExitStack() as stack:
        if hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for patch, recorder in recorders:
            patch.listeners.append(recorder)
            stack.callback(patch.listeners.remove, recorder)
        yield plans


@dataclass(eq=False)
class Recorder:
    """Notes the plans of one network."""

    network: Network[ImageFamily]
    steps: Collection[int] | None
    plans: list[Plan]
    step: int = -1

    def begin(self) -> None:
        self.step += 1

    def note(self, block: str, image: Image, batch: int, token_map: TokenMap) -> None:
        if self.steps is not None and self.step not in self.steps:
            return
        t = image.timestep
        number = float(t.flatten()[0] if isinstance(t, torch.Tensor) else t)
        index, keep = (part.expand(batch, -1).cpu() for part in (token_map.index, token_map.keep))
        name = f"{self.network.name}.{block}".lstrip(".")
        self.plans.append(
            Plan(name, image.downsample, self.step, number, image.h, image.w, TokenMap(index, keep))
        )
