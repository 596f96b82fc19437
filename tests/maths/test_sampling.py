"""A random sample of the tokens of an image."""

import pytest
import torch

from tomesd.maths.sampling import sample_size, sample_tokens


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.25, 0.5, 0.6, 0.75, 0.9])
@pytest.mark.parametrize(("h", "w"), [(16, 16), (17, 23), (8, 24), (1, 7), (3, 3)])
def test_a_sample_leaves_the_products_that_merging_leaves(h, w, ratio):
    token_map = sample_tokens(h, w, sample_size(h * w, ratio), seed=0, timestep=3)
    merged = h * w - int(ratio * h * w)
    assert token_map.groups == max(1, round(merged**2 / (h * w)))
    assert torch.equal(token_map.index.gather(1, token_map.keep)[0], torch.arange(token_map.groups))


@pytest.mark.parametrize(("h", "w", "ratio"), [(16, 16, 0.6), (31, 31, 0.9), (17, 23, 0.75), (34, 60, 0.75)])
def test_samples_are_as_dense_everywhere(h, w, ratio):
    count = torch.zeros(h * w)
    for t in range(200):
        keep = sample_tokens(h, w, sample_size(h * w, ratio), seed=0, timestep=t).keep
        count.index_add_(0, keep[0], torch.ones(keep.shape[1]))
    count = count.view(h, w) / count.mean()
    for part in (count[: h // 2, : w // 2], count[h - h // 2 :, w - w // 2 :], count[:, -4:], count[-4:]):
        assert 0.8 < part.mean() < 1.25


def test_any_token_may_stay():
    counts = torch.zeros(64)
    for seed in range(400):
        sample = sample_tokens(8, 8, 24, seed)
        assert sample.keep[0].unique().numel() == 24
        counts.index_add_(0, sample.keep[0], torch.ones(24))
    assert counts.min() > 400 * 24 / 64 * 0.75
    assert counts.max() < 400 * 24 / 64 * 1.25
