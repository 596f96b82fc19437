"""SampleKeys: every token attends to a random sample of all tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ..hosts.family import Site
from ..hosts.hooks import Args, Kwargs, Patch
from ..hosts.image import BlockHooks, Image
from ..maths.moments import add_missed, missed_by_sample
from ..maths.sampling import sample_size, sample_tokens
from ..maths.token_map import TokenMap, in_full_precision
from . import options
from .attention import PartHooks
from .cost import Work, work_of
from .method import Method


@dataclass(frozen=True, repr=False)
class SampleKeys(Method):
    """Lets every token attend to a random sample of all tokens, spread evenly and new in each step.

    Queries stay, and nothing is matched or merged: at the same cost the picture is much nearer to the plain
    one than with `Merge`. All blocks of a level share the sample of a step.

        tomesd.apply_patch(pipe, tomesd.SampleKeys(0.5))

    Args:
        ratio: in `[0, 1)`. As many products of queries and keys are left as merging this share of the tokens
            would leave: at 0.5 a quarter of the keys, at 0.9 a hundredth.
        seed: of the hash of (seed, timestep, token) that draws the sample; None for one sample in all steps.
        moments: what is known of all keys is added where attention is known to be plain: 1, the mean of their
            values; 2, to first order in the query, how keys and values go together; 0, nothing.
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
    moments: Literal[0, 1, 2] = 2
    replacement: bool = False

    def __post_init__(self) -> None:
        self._set(
            ratio=options.share(self.ratio, "[0, 1)"),
            seed=options.integer_or_none("seed", self.seed),
            moments=options.one_of("moments", self.moments, (0, 1, 2)),
            replacement=options.boolean("replacement", self.replacement),
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
                f"self-attention of {network} takes no keys but its own tokens', so SampleKeys cannot give "
                "it others: use Merge"
            )

    def attach(self, blocks: Mapping[Site, BlockHooks], patch: Patch) -> None:
        for site, block in blocks.items():
            block.plan_at_attention(site)
            attn = site.module.get_submodule(site.block.attn.path)
            hooks = SampledKeys(block, attn, site.block.attn, "attn", "SampleKeys")
            hooks.moments = self.moments
            patch.before(attn, hooks.enter)
            patch.after(attn, hooks.leave)

    def plan(self, x: Tensor, image: Image) -> TokenMap:
        size = image.h, image.w, self.left(image.h, image.w)
        seed, t, device = self.seed, image.timestep, image.device
        if seed is None:
            return image.always(("sample", size), lambda: sample_tokens(*size, 0, 0, device))
        number = None if self.replacement else image.number
        return image.once(
            ("sample", size, seed, number), lambda: sample_tokens(*size, seed, t, device, number)
        )

    def left(self, h: int, w: int) -> int:
        return sample_size(h * w, self.ratio)

    def work(self, sites: Sequence[Site]) -> Work:
        return work_of(sites, ("attn",), queries="all", merges=0)


class SampledKeys(PartHooks):
    """One self-attention that takes keys and values from a sample of its tokens."""

    moments = 0

    def enter(self, attn: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        sample = self.map
        if sample.is_identity or self.keys is None or self.has_own_keys(args, kwargs):
            return args, kwargs
        if "Fused" in type(getattr(attn, "processor", None)).__name__:
            raise ValueError(
                f"tomesd: {self.name} computes queries, keys and values in one layer, which SampleKeys "
                "cannot tell apart: call unfuse_qkv_projections() first"
            )
        x, mask = self.tokens.get(args, kwargs), self.mask(args, kwargs, sample)
        sampled = sample.merge(x, "drop")
        if mask is not None:
            args, kwargs = self.put_mask(args, kwargs, sample.merge(mask, "drop"))
        elif self.moments:
            self.block.own.get().given = x, sampled
        return self.keys.put(args, kwargs, sampled)

    def leave(self, attn: nn.Module, args: Args, kwargs: Kwargs, output: Tensor) -> Tensor:
        own = self.block.own.get()
        given, own.given = own.given, None
        layers = None if given is None else self.layers_of(attn, given[0])
        if given is None or layers is None:
            return output
        with in_full_precision(output):
            missed = missed_by_sample(*given, self.map, self.moments)
            return add_missed(output, given[0], missed, layers)
