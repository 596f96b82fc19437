"""MergeKeys: every token attends to merged keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..hosts.family import Site
from ..hosts.hooks import Args, Kwargs, has_other_forward
from ..hosts.image import Image
from ..maths.grid import Grid
from ..maths.token_map import TokenMap
from .keys import FewerKeys, KeysMethod
from .merge import match


@dataclass(frozen=True, repr=False)
class MergeKeys(KeysMethod):
    """Lets every token attend to keys and values of merged tokens, which count as often as they have merged.

    Queries stay. Nearer to the plain picture than `SampleKeys` where attention looks at few keys, for the
    time that matching takes.

        tomesd.apply_patch(pipe, tomesd.MergeKeys(0.5))

    Args:
        ratio: in `[0, 1)`. As many products of queries and keys are left as merging this share of the tokens
            would leave: at 0.5 a quarter of the keys, at 0.9 a hundredth.
        seed: of the hash of (seed, timestep, cell) that picks the token that others merge into; None for
            always the top left one of each cell.
        probes: so many tokens, or a sixteenth of all if these are fewer, attend to all keys as well, and
            what merged ones missed there is learned from them for all others (`maths/probes.py`). 0: it is
            not.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an option out of range.

    Source: keys and values from fewer tokens are from Smith et al., ToDo: Token Downsampling for Efficient
    Generation of High-Resolution Images, 2024; sizes of keys from Bolya et al., Token Merging, 2023.
    """

    ratio: float = 0.5
    seed: int | None = 0
    probes: int = 64

    def check(self, network: str, sites: Sequence[Site], container: Sequence[Site]) -> None:
        super().check(network, sites, container)
        if any(site.block.attn.bias is None for site in sites):
            raise ValueError(
                f"self-attention of {network} takes no bias, by which MergeKeys weighs merged keys: use "
                "SampleKeys"
            )

    def plan(self, x: Tensor, image: Image) -> TokenMap:
        left, side = self.left(image.h, image.w), 1
        while (grid := Grid(image.h, image.w, side, side)).cells > left:
            side *= 2
        return match(x, image, grid, x.shape[1] - left, self.seed)


class MergedKeys(FewerKeys):
    """One self-attention whose keys are merged tokens."""

    def check(self, module: nn.Module) -> None:
        super().check(module)
        if self.weighs(module) and has_other_forward(module):
            self.block.patch.warn(
                f"{self.name} has a forward that somebody has put on it. One that adds no bias to keys does "
                "not go with MergeKeys: use SampleKeys",
                about="bias",
            )

    def takes(self, keys: Tensor, x: Tensor, token_map: TokenMap) -> bool:
        return keys is x

    def keys_of(self, x: Tensor, token_map: TokenMap) -> Tensor:
        return token_map.merge(x)

    def bias_keys(
        self, attn: nn.Module, token_map: TokenMap, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        return self.merge_bias(attn, token_map, args, kwargs)


MergeKeys.hooks = MergedKeys
