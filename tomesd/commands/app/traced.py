"""What merged while a picture was drawn, or which keys its pixels looked at: as pictures and in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import tomesd

from ...tools.vis import LEAST, to_image, to_tensor

if TYPE_CHECKING:
    from PIL import Image

# How bright tokens are that are not meant.
DIMMED = 0.5
# The token that was clicked, magenta, and those that merged with it, yellow.
CLICKED, OTHERS = (255, 0, 200), (255, 220, 0)


@dataclass(frozen=True)
class Traced:
    """A picture, and what each block merged at each step, from `tomesd.trace`."""

    method: tomesd.Method
    picture: Image.Image
    plans: list[tomesd.Plan]

    @property
    def blocks(self) -> list[str]:
        """Those that have plans, in the order in which they run."""
        return list(dict.fromkeys(plan.block for plan in self.plans))

    @property
    def finest(self) -> str:
        """The last block at the finest level, where groups follow the picture best."""
        return min(reversed(self.plans), key=lambda plan: plan.downsample).block

    @property
    def steps(self) -> int:
        return 1 + max(plan.step for plan in self.plans)

    def spot(self, block: str, x: int, y: int) -> tuple[float, float]:
        """A pixel of what `show` gives for a block, as shares of its width and height."""
        plan = next(plan for plan in self.plans if plan.block == block)
        return x / (plan.w * self._side(plan)), y / (plan.h * self._side(plan))

    def show(self, block: str, step: int, spot: tuple[float, float] | None = None) -> tuple[Image.Image, str]:
        """What a block merged at a step, or which keys it looked at.

        Args:
            block: one of `blocks`.
            step: counted from 1.
            spot: a place in the picture as shares of its width and height; what merged with it is shown.
        """
        plan = next(plan for plan in self.plans if (plan.block, plan.step) == (block, step - 1))
        token = None if spot is None else self._token(plan, spot)
        side = self._side(plan)
        seen = picture = self.picture.convert("RGB").resize((plan.w * side, plan.h * side))
        groups = plan.map.index[-1]
        if isinstance(self.method, tomesd.SampleKeys):  # nothing merged, so groups mean nothing
            lit = torch.zeros_like(groups, dtype=torch.bool).index_fill(0, plan.map.keep[-1], True)
        elif token is None:
            seen = tomesd.make_visualization(self.picture, plan, pixels=side)
            lit = torch.ones_like(groups, dtype=torch.bool)
        else:
            seen = picture.copy()
            seen.paste(OTHERS, (0, 0, *seen.size))
            lit = groups == groups[token]
        shown = light(seen, picture, lit.view(plan.h, plan.w))
        if token is not None:
            x, y = token % plan.w * side, token // plan.w * side
            shown.paste(CLICKED, (x, y, x + side, y + side))
        return shown, self._words(plan, lit, token)

    def _side(self, plan: tomesd.Plan) -> int:
        """Pixels of a token, as shown."""
        return max(LEAST, round(self.picture.width / plan.w))

    def _token(self, plan: tomesd.Plan, spot: tuple[float, float]) -> int:
        column, row = (min(int(at * n), n - 1) for at, n in zip(spot, (plan.w, plan.h), strict=True))
        return row * plan.w + column

    def _words(self, plan: tomesd.Plan, lit: Tensor, token: int | None) -> str:
        tokens, left, others = plan.map.tokens, plan.map.groups, int(lit.sum()) - 1
        with_others = f"merged with {f'{others} in yellow' if others else 'no other'}"
        if isinstance(self.method, tomesd.SampleKeys):
            all_did = (
                f"Every pixel looked at the {left} of {tokens} tokens that are lit; other steps have others."
            )
            seen = token is not None and lit[token]
            one_did = "is one of them" if seen else "looked at them, and none looked at it"
        elif isinstance(self.method, tomesd.MergeKeys):
            all_did = f"Every pixel looked at {left} merged keys of {tokens} tokens."
            one_did = f"has a key that {with_others}"
        else:
            all_did, one_did = f"{tokens} tokens merged into {left}.", with_others
        words = [f"Step {plan.step + 1} of {self.steps}, {plan.w} x {plan.h} tokens.", all_did]
        if token is not None:
            place = f"column {token % plan.w + 1}, row {token // plan.w + 1}"
            words.append(f"The token in magenta ({place}) {one_did}.")
        return " ".join(words)


def light(seen: Image.Image, picture: Image.Image, lit: Tensor) -> Image.Image:
    """What is to be seen where tokens are lit, bool `[h, w]`; elsewhere the picture, grey and darkened."""
    h, w = lit.shape
    where = lit.repeat_interleave(seen.height // h, 0).repeat_interleave(seen.width // w, 1)
    grey = DIMMED * to_tensor(picture.convert("L"))
    return to_image(torch.where(where[..., None], to_tensor(seen), grey))
