"""`tomesd generate` on the shipped pipeline, `generate-4k` on a tiny random one."""

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from tomesd.__main__ import main
from tomesd.commands import generate_4k, models
from tomesd.commands.common import ROOT


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"), dtype=float)


def test_compare_draws_what_it_is_asked_for_plain_and_merged(tmp_path, capsys):
    call = ["red apple", "blue heart", "--compare", "--steps", "10", "--seed", "3"]
    assert main(["generate", *call, "--out", str(tmp_path)]) == 0
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
        call = ["generate", "pizza", "--ratio", "0.25", "--steps", "3", "--out", str(tmp_path / folder)]
        assert main(call) == 0
    assert str(tmp_path / "b" / "pizza-0-merged.png") in capsys.readouterr().out
    assert np.array_equal(*(pixels(tmp_path / folder / "pizza-0-merged.png") for folder in ("a", "b")))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--method", "sample-keys", "--ratio", "1"], "ratio must be in [0, 1)"),
        (["--ratio", "-1"], "ratio must be in [0, 1]"),
        (["--size", "60"], "60 is not a multiple of 8; take 56 or 64"),
        (["--model", "/nowhere/at/all"], "there is no folder /nowhere/at/all"),
        (["--model", "tests"], "tests is not a pipeline folder: it has no model_index.json"),
        (["--model", "nobody/nothing"], "cannot get the model 'nobody/nothing'"),
        (["--device", "abacus"], "--device abacus: there is no such device"),
        ([" "], "a prompt is empty"),
        (["R\udcfcbe"], r"the prompt 'R\udcfcbe' is no text in utf-8"),
        (["--model", "~nobody-here/x"], "there is no folder ~nobody-here/x: Could not determine home"),
        (["--guidance", "-2"], "argument --guidance: '-2' is not a number of at least 0"),
        (["--seed", "-5"], "argument --seed: '-5' is not a whole number in 0..2^63-1"),
        (
            ["--steps", "5000", "--size", "16"],
            "it cannot be drawn: `num_inference_steps`: 5000 cannot be larger",
        ),
        (
            ["--recipe", "r.json", "--ratio", "0.3"],
            "argument --recipe: it goes without --method, --ratio and",
        ),
        (["--recipe", "r.json", "--max-downsample", "2"], "argument --recipe: it goes without"),
    ],
)
def test_mistakes_are_explained_in_one_line(arguments, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["generate", *arguments, "--out", str(tmp_path)]) == 2
    last = capsys.readouterr().err.strip().split("\n")[-1]
    assert last.startswith("tomesd generate: error: ")
    assert says in last
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny.sd().save_pretrained(folder)
    return str(folder)


def draw(folder, *arguments):
    return main(["generate-4k", *arguments, "--out", str(folder), "--device", "cpu"])


def figures(text, first):
    """The columns of a line of the table: size, seconds, steps, seconds of a step, of 50, ..."""
    line = next(line for line in text.split("\n") if line.startswith(first))
    return line.removeprefix(first).split()


def test_a_picture_is_drawn_small_then_refined_at_the_size_asked_for(model, tmp_path, capsys):
    call = ["a cat", "--model", model, "--size", "320x192", "--steps", "5", "--compare"]
    assert draw(tmp_path, *call) == 0
    printed, told = capsys.readouterr()
    # The model's own size is 128 x 128; two of five steps refine.
    sizes = {"base": "192x128", "plain": "320x192", "merged": "320x192"}
    for name, size in sizes.items():
        path = tmp_path / f"a-cat-0-{size}-{name}.png"
        assert str(path) in printed
        assert "x".join(map(str, Image.open(path).size)) == size
    for label, size, steps in (("base", "192x128", 5), ("plain", "320x192", 2), ("merged 75%", "320x192", 2)):
        shown, seconds, number, step, fifty, *_ = figures(printed, label)
        assert (shown, int(number)) == (size, steps)
        assert 0 < steps * float(step) < 2 * float(seconds)
        assert float(fifty) == pytest.approx(50 * float(step), abs=0.1)
    plain, merged = (Image.open(tmp_path / f"a-cat-0-320x192-{name}.png") for name in ("plain", "merged"))
    assert plain.tobytes() != merged.tobytes()
    assert "peak process memory" in printed
    assert "times as fast" in printed
    assert "cropped" not in told
    assert "6 of 10 blocks compute less at 320 x 192 pixels" in told


def test_directly_and_merged_alone(model, tmp_path, capsys):
    assert draw(tmp_path, "a cat", "--model", model, "--size", "192x128", "--steps", "2", "--direct") == 0
    printed, _ = capsys.readouterr()
    assert [path.name for path in tmp_path.iterdir()] == ["a-cat-0-192x128-merged.png"]
    assert Image.open(tmp_path / "a-cat-0-192x128-merged.png").size == (192, 128)
    assert figures(printed, "merged 75%")[:3:2] == ["192x128", "2"]


def test_what_is_large_is_drawn_with_deep_shrink(model, tmp_path, capsys):
    call = ["a cat", "--model", model, "--size", "256", "--steps", "3", "--ratio", "0"]
    assert main(["generate", *call, "--out", str(tmp_path)]) == 0
    assert draw(tmp_path, *call, "--direct") == 0
    note = "note: 2.0 times the model's own size, so with DeepShrink(factor=2.0, until=0.35, downsample=2)"
    assert capsys.readouterr().err.count(note) == 2
    one, two = (pixels(tmp_path / f"a-cat-0{size}-plain.png") for size in ("", "-256x256"))
    assert np.array_equal(one, two)
    plain = tiny.sd()("a cat", 256, 256, 3, generator=torch.Generator().manual_seed(0)).images[0]
    assert not np.array_equal(one, np.asarray(plain, dtype=float))


def test_a_base_of_another_shape_and_strength(model, tmp_path, capsys):
    call = ["a cat", "--model", model, "--size", "128x64", "--base-size", "64", "--strength", "0.7"]
    assert draw(tmp_path, *call, "--steps", "3", "--ratio", "0") == 0
    printed, told = capsys.readouterr()
    assert "64x64 is of another shape than the picture, and will be cropped" in told
    assert {path.name for path in tmp_path.iterdir()} == {
        "a-cat-0-64x64-base.png",
        "a-cat-0-128x64-plain.png",
    }
    assert figures(printed, "plain")[2] == "2"


@pytest.mark.parametrize(
    ("size", "base"),
    [
        ((3840, 2176), (704, 384)),
        ((2176, 3840), (384, 704)),
        ((4096, 4096), (512, 512)),
        ((4096, 2048), (768, 384)),
    ],
)
def test_the_base_has_the_area_of_the_model_and_the_shape_of_the_picture(size, base):
    pipe = models.random_pipeline(torch.device("meta"), torch.float16)
    assert generate_4k.base_size(pipe, size) == base


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--base-size", "100x64"], "--base-size 100x64: 100 is not a multiple of 8; take 96 or 104"),
        (["--model", "nobody/nothing"], "or take --random or --model"),
        (["--ratio", "1.5", "--method", "merge-stage"], "ratio must be in [0, 1]"),
        (["--strength", "1.5"], "--strength has to be above 0 and at most 1, not 1.5"),
        (["--random", "--model", "x"], "not allowed with argument"),
        (["--direct", "--strength", "0.3"], "--strength means nothing with --direct"),
        (["--random", "--base-size", "512"], "--base-size means nothing with --random"),
        (["--size", "big"], "'big' is neither a side like 512 nor a size like 3840x2176"),
        (["--steps", "2"], "--steps 2 times --strength 0.4 leaves no step to refine"),
    ],
)
def test_mistakes_about_large_pictures_are_explained_in_one_line(arguments, says, tmp_path, capsys):
    assert draw(tmp_path, "a cat", *arguments) == 2
    last = capsys.readouterr().err.strip().split("\n")[-1]
    assert last.startswith("tomesd generate-4k: error: ")
    assert says in last
    assert list(tmp_path.iterdir()) == []


def test_the_random_pipeline_is_of_full_size():
    pipe = models.random_pipeline(torch.device("meta"), torch.float16)
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    # As published.
    assert sizes == {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
    assert pipe.dtype == torch.float16
    assert torch.get_default_dtype() == torch.float32
    assert len(pipe.tokenizer("noise", padding="max_length").input_ids) == 77
