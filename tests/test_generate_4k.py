"""Drawing large pictures, on a tiny random pipeline, and what it takes to know what that costs."""

import count_unet
import generate_4k
import pytest
import step_4k
import tiny
import torch
from PIL import Image

from tomesd.bench import memory, models


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny.sd().save_pretrained(folder)
    return str(folder)


def draw(folder, *arguments):
    return generate_4k.main([*arguments, "--out", str(folder), "--device", "cpu"])


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
    assert "6 of 10 blocks merge at 320 x 192 pixels" in told


def test_directly_and_merged_alone(model, tmp_path, capsys):
    assert draw(tmp_path, "a cat", "--model", model, "--size", "192x128", "--steps", "2", "--direct") == 0
    printed, _ = capsys.readouterr()
    assert [path.name for path in tmp_path.iterdir()] == ["a-cat-0-192x128-merged.png"]
    assert Image.open(tmp_path / "a-cat-0-192x128-merged.png").size == (192, 128)
    assert figures(printed, "merged 75%")[:3:2] == ["192x128", "2"]


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
    pipe = generate_4k.random_pipeline(torch.device("meta"), torch.float16)
    assert generate_4k.base_size(pipe, size) == base


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--size", "3840x2161"], "--size 3840x2161: 2161 is not a multiple of 8; take 2160 or 2168"),
        (["--base-size", "100x64"], "--base-size 100x64: 100 is not a multiple of 8; take 96 or 104"),
        (["--model", "/nowhere/at/all"], "there is no folder /nowhere/at/all"),
        (["--model", "nobody/nothing"], "or take --random or --model"),
        (["--ratio", "0.9", "--merge-stage"], "ratio 0.9 is above 0.75"),
        (["--ratio", "1"], "ratio must be in [0, 1)"),
        (["--strength", "1.5"], "--strength has to be above 0 and at most 1, not 1.5"),
        (["--steps", "2"], "--steps 2 times --strength 0.4 leaves no step to refine"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, says, tmp_path, capsys):
    assert draw(tmp_path, "a cat", *arguments) == 2
    last = capsys.readouterr().err.strip().split("\n")[-1]
    assert last.startswith("generate_4k.py: error: ")
    assert says in last
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give a prompt in quotes, or --random"),
        (["a cat", "--random", "--model", "x"], "not allowed with argument"),
        (["a cat", "--direct", "--strength", "0.3"], "--strength means nothing with --direct"),
        (["--random", "--base-size", "512"], "--base-size means nothing with --random"),
        (["a cat", "--size", "big"], "'big' is neither a number such as 512 nor WxH"),
    ],
)
def test_calls_that_make_no_sense(arguments, says, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        draw(tmp_path, *arguments)
    assert says in capsys.readouterr().err


def test_the_random_pipeline_is_of_full_size():
    pipe = generate_4k.random_pipeline(torch.device("meta"), torch.float16)
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    # As published.
    assert sizes == {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
    assert pipe.dtype == torch.float16
    assert torch.get_default_dtype() == torch.float32
    assert len(pipe.tokenizer("noise", padding="max_length").input_ids) == 77


def test_what_a_step_costs_is_counted():
    setting = models.Setting("unet", "tiny", "bfloat16", 192, 128, 0.75, 2, "meta")
    network = models.build(setting)
    plain, merged = (count_unet.count(network, name, setting) for name in ("plain", "4k"))
    n = 24 * 16
    # Three transformers of two blocks at the finest level with 16 channels, one in the middle with 32.
    own = 2 * 4 * (6 * n**2 * 16 + 2 * (n // 4) ** 2 * 32)
    text = 2 * 4 * 77 * (6 * n * 16 + 2 * (n // 4) * 32)
    assert plain.attention == own + text
    assert merged.attention == own // 16 + text
    assert merged.conv == plain.conv
    assert 0 < count_unet.count(network, "4k-stage", setting).matrices < merged.matrices
    # At least the two halves of what the first feed-forward makes, and its input.
    assert plain.memory > 2 * 2 * n * (8 + 1) * 16


def test_what_is_alive_is_counted_once_and_forgotten():
    with count_unet.Alive() as alive:
        a = torch.empty(100, device="meta")
        a.view(10, 10).add_(1)
        b = a + 1
        del a, b
        torch.empty(50, device="meta")
    assert (alive.peak, alive.now) == (800, 0)


def test_a_step_of_the_shipped_model_in_each_way(capsys):
    tiny.peer("tomesd", alias="tomesd_0_1_3")
    step_4k.main(["--latents", "32x16", "--rounds", "2"])
    first, *ways, plan = capsys.readouterr().out.strip().split("\n")
    assert first.startswith("32x16 latents, 512 tokens at the finest level, 2 images")
    assert [line.split(":")[0] for line in ways] == list(step_4k.WAYS)
    errors = [float(line.split("error ")[1]) for line in ways]
    assert errors[0] == 0
    assert all(0 < error < 1 for error in errors[1:])
    assert plan.startswith("one plan: ")


def test_the_old_release_is_left_out_where_its_similarities_do_not_fit(monkeypatch, capsys):
    monkeypatch.setattr(memory, "available", lambda device: 100)
    step_4k.main(["--latents", "16x16", "--ways", "tomesd 0.1.3", "4k"])
    _, old, ours, _ = capsys.readouterr().out.strip().split("\n")
    assert old.startswith("tomesd 0.1.3: left out, needs")
    assert ours.startswith("4k: ")
