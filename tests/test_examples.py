"""The main job, on the trained pipeline that the repository ships."""

import generate
import numpy as np
import pytest
from PIL import Image

import tomesd


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"), dtype=float)


def test_compare_draws_what_it_is_asked_for_plain_and_merged(tmp_path, capsys):
    assert generate.main(["red apple", "blue heart", "--compare", "--seed", "3", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "peak process memory" in printed
    assert "times as fast" in printed
    for kind in ("plain", "merged"):
        for name, channel in (("red-apple", 0), ("blue-heart", 2)):
            picture = pixels(tmp_path / f"{name}-3-{kind}.png")
            assert picture.shape == (128, 128, 3)
            assert picture[:6].mean() > 235  # on white
            middle = picture[56:80, 48:80].mean((0, 1))
            assert middle.argmax() == channel
            assert middle[channel] > 2 * np.delete(middle, channel).mean()
    difference = pixels(tmp_path / "red-apple-3-plain.png") - pixels(tmp_path / "red-apple-3-merged.png")
    assert 0 < np.abs(difference).mean() < 5
    assert (tmp_path / "compare-red-apple-3.png").stat().st_size > 10_000


def test_one_picture_merged_and_repeated(tmp_path, capsys):
    for folder in ("a", "b"):
        call = ["pizza", "--ratio", "0.25", "--steps", "3", "--out", str(tmp_path / folder)]
        assert generate.main(call) == 0
    assert str(tmp_path / "b" / "pizza-0-merged.png") in capsys.readouterr().out
    assert np.array_equal(*(pixels(tmp_path / folder / "pizza-0-merged.png") for folder in ("a", "b")))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ratio", "0.9"], "ratio 0.9 is above 0.75"),
        (["--ratio", "-1"], "ratio must be in [0, 1)"),
        (["--size", "60"], "60 is not a multiple of 8; take 56 or 64"),
        (["--model", "/nowhere/at/all"], "there is no folder /nowhere/at/all"),
        (["--model", "tests"], "tests is not a pipeline folder: it has no model_index.json"),
        (["--model", "nobody/nothing"], "cannot get the model 'nobody/nothing'"),
        (["--device", "abacus"], "--device abacus: there is no such device"),
        ([" "], "a prompt is empty"),
        (["--guidance", "-2"], "--guidance has to be a number of at least 0"),
        (["--seed", "-5"], "--seed has to be in 0..2^63-1"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(generate.EMOJI_MODEL.parent.parent)
    assert generate.main([*arguments, "--out", str(tmp_path)]) == 2
    last = capsys.readouterr().err.strip().split("\n")[-1]
    assert last.startswith("generate.py: error: ")
    assert says in last
    assert list(tmp_path.iterdir()) == []


def test_the_shipped_model_is_explained():
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(generate.EMOJI_MODEL)
    tomesd.apply_patch(pipe)
    table = tomesd.explain(pipe)
    assert (table.height, table.width) == (128, 128)
    assert [(row.before, row.after) for row in table.rows if row.left_alone is None] == [(4096, 2048)] * 3


def test_a_photo_is_rebuilt_from_merged_patches():
    import torch
    import vit_clusters

    image = vit_clusters.photo("chelsea", 56)
    assert image.size == (56, 56)
    nothing = tomesd.TokenMap.identity(17)
    assert np.array_equal(vit_clusters.rebuilt(image, nothing), image)
    index = torch.tensor([[0, *range(1, 15), 15, 15]])
    two = np.asarray(vit_clusters.rebuilt(image, tomesd.TokenMap.from_index(index, 16)))
    last = np.asarray(image, dtype=float)[42:, 28:]
    mean = (last[:, :14] + last[:, 14:]) / 2
    assert np.abs(two[42:, 28:42] - mean).max() <= 0.5
    assert np.array_equal(two[42:, 28:42], two[42:, 42:])
    assert np.array_equal(two[:42], np.asarray(image)[:42])


def test_clusters_are_drawn_at_the_steps_asked_for(tmp_path, capsys):
    import unet_clusters

    out = tmp_path / "clusters.png"
    unet_clusters.main(["pizza", "--steps", "2", "--out", str(out)])
    assert capsys.readouterr().out.strip() == str(out)
    width, height = Image.open(out).size
    assert width > 3 * 400  # the picture and both steps
    assert height > 2 * 400


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--at", "2"], "--at has to be in 0..1, got [2]: there are 2 steps"),
        (["--block", "7"], "no block 7 at level 1"),
        (["--ratio", "2"], "ratio must be in [0, 1)"),
        (["--out", "/nowhere/at/all.png"], "there is no folder /nowhere/at"),
    ],
)
def test_mistakes_about_clusters_are_named(arguments, says, tmp_path, capsys):
    import unet_clusters

    call = ["pizza", "--steps", "2", "--out", str(tmp_path / "none.png"), *arguments]
    with pytest.raises(SystemExit):
        unet_clusters.main(call)
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_example_of_a_model_of_ones_own_learns():
    import token_merger
    import torch
    import torch.nn.functional as F

    symbols = torch.randn(token_merger.SYMBOLS, token_merger.WIDTH)
    model = token_merger.Encoder(20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(20):
        x, ids, labels = token_merger.batch(symbols, 8)
        answer = model(x, ids)
        assert answer.shape == (*labels.shape, token_merger.SYMBOLS)
        losses.append(F.cross_entropy(answer.flatten(0, 1), labels.flatten()))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.6 * losses[0]
