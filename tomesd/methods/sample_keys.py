"""SampleKeys: every token attends to a random sample of all tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..hosts.family import submodule
from ..hosts.hooks import Args, Kwargs, Patch, hooks_before
from ..hosts.image import Image
from ..maths.devices import is_traced
from ..maths.token_map import TokenMap
from . import options
from .keys import FewerKeys, KeysMethod, sample


@dataclass(frozen=True, repr=False)
class SampleKeys(KeysMethod):
    """Lets every token attend to a random sample of all tokens, spread evenly and new in each step.

    Queries stay, and nothing is matched or merged: at the same cost the picture is much nearer to the plain
    one than with `Merge`. All blocks of a level share the sample of a step.

        tomesd.apply_patch(pipe, tomesd.SampleKeys(0.5))

    Args:
        ratio: in `[0, 1)`. As many products of queries and keys are left as merging this share of the tokens
            would leave: at 0.5 a quarter of the keys, at 0.9 a hundredth.
        seed: of the hash of (seed, timestep, token) that draws the sample; None for one sample in all steps.
        probes: so many tokens, or a sixteenth of all if these are fewer, attend to all keys as well, and
            what the sample missed there is learned from them for all others (`maths/probes.py`), where
            attention is known to do nothing but attend. 0: it is not.
        replacement: whether a step may draw what steps before it have drawn. False is nearer to the plain
            picture, as errors of steps cancel; it needs a loop over a scheduler's timesteps as they are.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: a ratio out of range.

    Source: keys and values from fewer tokens are from Smith et al., ToDo: Token Downsampling for Efficient
    Generation of High-Resolution Images, 2024, which takes the same ones in each step.
    """

    ratio: float = 0.5
    seed: int | None = 0
    probes: int = 64
    replacement: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(replacement=options.boolean("replacement", self.replacement))

    def plan(self, x: Tensor, image: Image) -> TokenMap:
        left = self.left(image.h, image.w)
        if left == image.h * image.w:
            return TokenMap.identity(left, image.device)
        return sample(image, left, self.seed, in_turns=not self.replacement)


class SampledKeys(FewerKeys):
    """One self-attention whose keys are a sample."""

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers of keys and of values."""
        return self.part.layers[1:-1]

    def attach(self, patch: Patch, attn: nn.Module) -> None:
        super().attach(patch, attn)
        if hasattr(attn, "processor"):
            for name, hook in zip(self.layers, (self.enter_keys, self.enter_values), strict=True):
                layer = submodule(attn, name)
                if layer is not None:
                    patch.before(layer, hook, kwargs=False)

    def takes(self, keys: Tensor, x: Tensor, token_map: TokenMap) -> bool:
        return token_map.fits(keys)  # a sample serves all images of a size

    def keys_of(self, x: Tensor, token_map: TokenMap) -> Tensor:
        if is_traced():  # for one size: at another one the trace is to stop here
            x = x.reshape(-1, int(token_map.tokens), x.shape[-1])
        return token_map.merge(x, "drop")

    def bias_keys(
        self, attn: nn.Module, token_map: TokenMap, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        mask = self.mask(args, kwargs, token_map)
        return (args, kwargs) if mask is None else self.put_mask(args, kwargs, token_map.merge(mask, "drop"))

    def enter_unknown(
        self, attn: nn.Module, token_map: TokenMap, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        # Keys may be of other images, or of some of the samples: they are sampled where they are made.
        if self.mask(args, kwargs, token_map) is not None:
            raise ValueError(
                f"tomesd: {self.name} was given a mask of its keys, and of its processor "
                f"{type(attn.processor).__name__} it is not known what it does with that: with {self.method} "
                f"use one of {', '.join(self.part.processors)}"
            )
        hooks = zip(self.layers, (self.enter_keys, self.enter_values), strict=True)
        lost = [name for name, hook in hooks if hook not in hooks_before(submodule(attn, name))]
        if lost:
            raise ValueError(
                f"tomesd: {' and '.join(lost)} of {self.name} was replaced after apply_patch, as adapters "
                "do: patch again"
            )
        own = self.block.own.get()
        own.sample, own.keys, own.values = token_map, 0, 0
        return args, kwargs

    def enter_keys(self, layer: nn.Module, args: Args) -> Args | None:
        """Gives the layer of keys fewer tokens, inside of an attention that asks for it."""
        own = self.block.own.get()
        if own.sample is None or not (args and own.sample.fits(args[0])):
            return None
        own.keys += 1
        return own.sample.merge(args[0], "drop"), *args[1:]

    def enter_values(self, layer: nn.Module, args: Args) -> Args | None:
        """Gives the layer of values as many: those that go with keys. Some attend to nothing (PAG)."""
        own = self.block.own.get()
        if own.sample is None or own.values >= own.keys:
            return None
        own.values += 1
        return own.sample.merge(args[0], "drop"), *args[1:]

    def leave(self, attn: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        own = self.block.own.get()
        asked, own.sample = own.sample, None
        if asked is not None and not own.values:
            raise ValueError(
                f"tomesd: {self.name} has the processor {type(attn.processor).__name__}, of which "
                f"{self.method} could take no keys: it did not call {' and then '.join(self.layers)} with "
                f"{asked.tokens} tokens. Use Merge"
            )
        return super().leave(attn, args, kwargs, output)


SampleKeys.hooks = SampledKeys
