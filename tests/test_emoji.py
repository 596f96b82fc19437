"""What the training of the shipped model rests on."""

from __future__ import annotations

import data
import grow
import pytest
import torch
import torch.nn.functional as F


@pytest.mark.parametrize("channels", [[32, 64], [64, 32]])
def test_a_grown_unet_starts_as_its_equal(channels: list[int]) -> None:
    small = grow.build_unet(channels, 8, 32).eval()
    large = grow.grown(grow.grown(small)).eval()
    assert large.config.sample_size == 32
    x, text, t = torch.randn(2, 4, 32, 32), torch.randn(2, 5, 32), torch.tensor([3, 700])
    with torch.no_grad():
        want = small(F.avg_pool2d(x, 4), t, text).sample
        torch.testing.assert_close(large(x, t, text).sample, F.interpolate(want, scale_factor=4.0))
    loss = large(x, t, text).sample.square().mean()
    loss.backward()
    assert all(p.grad is not None for p in large.parameters())
    assert large.up_blocks[-1].attentions[0].proj_out.weight.grad.abs().max() > 0


def test_combinations_held_out_are_never_shown() -> None:
    table = data.emoji_table()
    shown, held = data.painted_table(table)
    names = [{name for emoji in part for name in emoji.names} for part in (table, shown, held)]
    assert not names[1] & names[2]
    assert not names[0] & (names[1] | names[2])
    assert {emoji.colour for emoji in held} == set(data.HUE_DEGREES)
