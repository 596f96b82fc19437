"""What the vision transformers' side is made of: schedules, proportional attention, pictures, throughput."""

import pytest
import torch
from PIL import Image

import tomesd.vit as tome
from tomesd import TokenMap


@pytest.mark.parametrize(
    ("r", "want"),
    [
        (8, [8, 8, 8, 8]),
        ((8, 0), [8, 8, 8, 8]),
        ((8, -1.0), [16, 10, 5, 0]),
        ((8, 1.0), [0, 5, 10, 16]),
        ((8, -0.5), [12, 9, 6, 4]),
        ([5, 3], [5, 3, 0, 0]),
        ([], [0, 0, 0, 0]),
        (0.1, [0.1, 0.1, 0.1, 0.1]),
        ((0.25, -1.0), [0.5, pytest.approx(1 / 3), pytest.approx(1 / 6), 0.0]),
        ([0.5, 0.25], [0.5, 0.25, 0, 0]),
        ([0.5, 0, 0.25], [0.5, 0, 0.25, 0]),
        ((0.4, 1.0), [0.0, pytest.approx(0.8 / 3), 0.5, 0.5]),  # half of the tokens is the most
    ],
)
def test_schedules(r, want):
    assert tome.parse_r(4, r) == want
    assert tome.parse_r(4, tome.parse_r(4, r)) == want


def test_a_schedule_of_one_layer():
    assert tome.parse_r(1, (8, -1.0)) == [16]


@pytest.mark.parametrize(
    "r",
    [(True, 0.5), (8, True), [True], "8", 8.0, None, (8, "a"), (8, 1, 2), [8, 0.5], True, 1.0, (1.5, 0.0)],
)
def test_a_schedule_of_another_kind_is_an_error(r):
    with pytest.raises(TypeError, match="r must be an integer"):
        tome.parse_r(4, r)


def test_a_schedule_out_of_range_is_an_error():
    with pytest.raises(ValueError, match="from -1 to 1, got 2"):
        tome.parse_r(4, (8, 2))
    with pytest.raises(ValueError, match="5 numbers for 4"):
        tome.parse_r(4, [1] * 5)
    with pytest.raises(ValueError, match="negative"):
        tome.parse_r(4, [1, -1])
    with pytest.raises(ValueError, match=r"negative, got -0\.1"):
        tome.parse_r(4, -0.1)


def test_a_picture_of_groups_has_their_mean_colours():
    image = Image.new("RGB", (32, 16))
    image.paste((200, 0, 0), (0, 0, 8, 16))
    image.paste((100, 0, 0), (8, 0, 16, 16))
    image.paste((0, 0, 50), (16, 0, 32, 16))
    index = torch.tensor([[0, 1, 1, 2, 2, 1, 1, 2, 2]])  # a class token, then 2 x 4 patches of 8
    merged = TokenMap.from_index(index, 3)
    picture = tome.make_visualization(image, merged, patch_size=8)
    assert picture.size == image.size
    assert picture.getpixel((4, 8)) == (150, 0, 0)
    assert picture.getpixel((12, 3)) == (150, 0, 0)
    assert picture.getpixel((24, 8)) == (0, 0, 50)
    assert picture.getpixel((15, 8)) != (150, 0, 0)  # the border
    dense = merged.source_matrix()
    for source in (dense, dense[0]):
        assert list(tome.make_visualization(image, source, 8).tobytes()) == list(picture.tobytes())
    without = TokenMap.from_index(index[:, 1:] - 1, 2)
    assert tome.make_visualization(image, without, 8, class_token=False).tobytes() == picture.tobytes()


def test_a_picture_of_another_image_is_an_error():
    image = Image.new("RGB", (32, 16))
    merged = TokenMap.identity(9)
    with pytest.raises(
        ValueError, match="4 x 2 patches of 8, the source has 9 tokens with class_token=False"
    ):
        tome.make_visualization(image, merged, 8, class_token=False)
    with pytest.raises(
        ValueError, match="2 x 1 patches of 16, the source has 2 tokens with class_token=True"
    ):
        tome.make_visualization(image, TokenMap.identity(2))
    some = TokenMap.from_index(torch.tensor([[0, 1, 1, 2, 3, 4, 5, 6, 7]]), 8)
    with pytest.raises(ValueError, match="7 would come before the 2 x 1 patches of 16 pixels, but they have"):
        tome.make_visualization(image, some)
    with pytest.raises(ValueError, match="of one image, got 2"):
        tome.make_visualization(image, torch.eye(9).expand(2, 9, 9), 8)
    with pytest.raises(ValueError, match="patch_size must be at least 1, got 0"):
        tome.make_visualization(image, merged, 0)
    with pytest.raises(TypeError, match="img must be a PIL image, got Tensor"):
        tome.make_visualization(torch.ones(3, 16, 32), merged, 8)


def test_a_benchmark_that_cannot_run_is_an_error():
    model = torch.nn.Identity()
    with pytest.raises(TypeError, match="expected a torch module, got int"):
        tome.utils.benchmark(3, device="cpu")
    with pytest.raises(ValueError, match="nothing to measure with runs=0"):
        tome.utils.benchmark(model, device="cpu", runs=0)
    if not torch.cuda.is_available():
        for device in (0, "cuda"):
            with pytest.raises(ValueError, match='pass device="cpu"'):
                tome.utils.benchmark(model, device)
