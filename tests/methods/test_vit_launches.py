"""How many operations merging adds to a block of a vision transformer, on the meta device.

Where blocks hand merged tokens to each other (timm's `nn.Sequential`), 83 when this was first counted.
"""

import pytest
import tiny_vit
import torch
from test_launches import Count, NoWait
from timm.models.vision_transformer import VisionTransformer

import tomesd.vit as tome

pytestmark = pytest.mark.usefixtures("no_grad")


def added(model, x, depth, **options):
    """By how many operations merging makes a block longer, the mean over all."""

    def count(r):
        tome.apply_patch(model, **options).r = r
        model(x)  # what is made once for each size
        with Count() as mode:
            model(x)
        return mode.counts.total()

    return (count(4) - count(0)) / depth


@pytest.mark.parametrize(
    ("options", "most"), [({}, 35), ({"mode": "mean"}, 31), ({"metric": "keys"}, 36)], ids=str
)
@pytest.mark.parametrize("batch", [1, 8])
def test_a_block_of_timm_takes_no_more_operations_than_its_budget(options, most, batch):
    with torch.device("meta"):
        model = VisionTransformer(depth=5, embed_dim=48, num_heads=3).eval()
        x = torch.empty(batch, 3, 224, 224)
    assert added(model, x, 5, **options) <= most + 2 * (batch > 1)


def test_a_block_that_gives_back_all_tokens_takes_two_more():
    case = tiny_vit.CASES["transformers DINOv2"]
    model = case.build().to("meta")
    assert added(model, torch.empty(1, 3, 32, 32, device="meta"), tiny_vit.DEPTH) <= 37


@pytest.mark.parametrize("name", ["timm ViT", "timm EVA02", "transformers DINOv2", "timm parallel"])
def test_nothing_waits_for_the_device(name):
    case = tiny_vit.CASES[name]
    model = tome.apply_patch(case.build())
    model.r = 8
    with NoWait():
        case(model)
