"""`tomesd quality`, with DINOv2 and rivals too: on the shipped pipeline and tiny ones."""

import csv
import json
import os

import dinov2
import numpy as np
import peers
import pytest
import quality as with_dinov2
import rivals
import tiny
import torch
from PIL import Image
from torch.nn.modules.module import register_module_forward_hook
from transformers import Dinov2Config, Dinov2Model

import tomesd
from tomesd.__main__ import main
from tomesd.commands import drawing, metrics, quality
from tomesd.commands.common import ROOT
from tomesd.commands.pipelines import EMOJI_MODEL, load_pipeline
from tomesd.commands.ways import WAYS, Way

FEW = ["--prompts", "2", "--steps", "2", "--rounds", "1", "--ratios", "0.5"]


@pytest.fixture(autouse=True)
def _random_dinov2(monkeypatch):
    """The real weights would be a download of 90 MB."""
    config = Dinov2Config(
        hidden_size=8, num_attention_heads=1, num_hidden_layers=1, image_size=28, patch_size=14
    )
    monkeypatch.setattr(dinov2, "transformers_model", lambda: Dinov2Model(config).eval())


@pytest.fixture
def unet_calls():
    """Grows by one for each call of a UNet."""
    calls = []

    def note(module, args, output):
        if type(module).__name__ == "UNet2DConditionModel":
            calls.append(module)

    handle = register_module_forward_hook(note)
    yield calls
    handle.remove()


def compare(path, *arguments, compared=with_dinov2.COMPARISON) -> list[dict[str, str]]:
    call = ["--csv", path, "--device", "cpu", *arguments]
    assert quality.main([*map(str, call)], compared=compared) == 0
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def pictures(n: int, side: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


@pytest.fixture
def model(tmp_path):
    """The shipped pipeline with names and references of its own."""
    folder = tmp_path / "model"
    folder.mkdir()
    for part in EMOJI_MODEL.iterdir():
        if part.suffix != ".txt" and part.name != "names.png":
            os.symlink(part, folder / part.name)
    (folder / "names.txt").write_text("red apple / apple\npizza\nblue heart\n")
    cells = [np.full((64, 64, 3), colour, np.uint8) for colour in ((200, 0, 0), (200, 150, 50), (0, 0, 200))]
    Image.fromarray(np.concatenate(cells, 1)).save(folder / "names.png")
    return folder


def test_all_that_is_asked_for_is_drawn_measured_and_kept(model, tmp_path, capsys, unet_calls):
    plot, sheet, cache = tmp_path / "p.png", tmp_path / "s.png", tmp_path / "cache"
    call = [tmp_path / "q.csv", "--model", model, "--cache", cache, "--size", "64", *FEW]
    call += ["--ways", "windowed", "keys", "hypertile", "fewer-steps", "--seeds", "2", "--batch", "1"]
    call += ["--plot", plot, "--sheet", sheet, "--plot-metric", "guided_error"]
    rows = compare(*call)
    assert [row["point"] for row in rows] == [
        *("plain", "windowed 0.5", "keys 0.5", "hypertile", "fewer-steps 1")
    ]
    plain, windowed, keys, hypertile, fewer = rows
    # Each of 2 prompts x 2 seeds takes 2 steps; the first of them once more in each way for errors.
    drawn = 4 * (2 + 2 + 2 + 1) + 2 * 2
    measured = 3 * 3
    assert len(unet_calls) == drawn + measured
    assert "single tile" in hypertile["note"]
    assert [row["note"] for row in (plain, windowed, keys, fewer)] == [""] * 4
    assert float(fewer["seconds"]) == pytest.approx(float(plain["seconds"]) / 2, rel=1e-4)
    assert float(plain["speed"]) == 1
    for row in (windowed, keys):
        assert 0 < float(row["step_error"]) < 0.2
        assert 0 < float(row["guided_error"]) < 0.4
        assert 20 < float(row["psnr_db"]) < 80
        assert 0.7 < float(row["ssim"]) < 1
        assert float(row["speed"]) == pytest.approx(float(plain["seconds"]) / float(row["seconds"]), rel=1e-3)
    assert float(keys["step_error"]) < float(windowed["step_error"])
    assert fewer["step_error"] == fewer["guided_error"] == plain["psnr_db"] == ""
    assert float(windowed["psnr_db"]) > float(fewer["psnr_db"])
    for row in (plain, windowed, fewer):
        assert 0 <= float(row["name_top1"]) <= float(row["name_top5"]) == 1  # of three
    for file in (plot, sheet):
        assert file.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "lpips left out: " in printed
    assert "model, 2 prompts x 2 seeds, 64 pixels, 2 steps, guidance 3, float32" in printed

    unet_calls.clear()
    assert compare(*call) == rows
    assert unet_calls == []

    # Of a run that was stopped, what is missing is drawn, with errors if it is the first batch.
    (folder,) = (path for path in cache.iterdir() if (path / "about.json").exists())
    assert json.loads((folder / "about.json").read_text())["prompts"] == ["red apple", "pizza"]
    (folder / "keys 0.5-3.npz").unlink()
    assert compare(*call) == rows
    assert len(unet_calls) == 2
    (folder / "keys 0.5-0.npz").unlink()
    assert compare(*call) == rows
    assert len(unet_calls) == 2 + 2 * 3
    # One more seed is two more batches.
    unet_calls.clear()
    compare(*call, "--ways", "windowed", "--seeds", "3")
    assert len(unet_calls) == 2 * (2 + 2)
    compare(*call, "--fresh", "--ways", "fewer-steps")
    assert len(unet_calls) == 8 + 4 * (2 + 1) + 3


def test_other_pipelines_and_scales_of_latents(tmp_path):
    """SDXL has its finest attention at half the latents, one of which is 8 x 8 pixels here."""
    tiny.peer("tomesd", alias="tomesd_0_1_3")
    tiny.sdxl().save_pretrained(tmp_path / "xl")
    (tmp_path / "prompts.txt").write_text("a cat\n\n a dog \n")
    chosen = ["stage", "stage-0.1.3", "tomesd-0.1.3", "todo"]
    rows = compare(
        *(tmp_path / "q.csv", "--model", tmp_path / "xl", "--cache", tmp_path, *FEW, "--size", "128"),
        *("--prompts-file", tmp_path / "prompts.txt", "--ways", *chosen, "--prompts", "1"),
    )
    assert [row["way"] for row in rows] == ["plain", *chosen]
    assert [row["note"] for row in rows] == [""] * 5
    assert all(float(row["step_error"]) > 0 for row in rows[1:])
    assert rows[0]["name_top1"] == ""


def test_without_guidance_or_dinov2(tmp_path, monkeypatch, capsys):
    def fail():
        raise peers.Unavailable("no network\nat all")

    monkeypatch.setattr(dinov2, "transformers_model", fail)
    call = [tmp_path / "q.csv", "--cache", tmp_path, "--size", "64", *FEW, "--ways", "windowed"]
    (_, row) = compare(*call, "--guidance", "1")
    assert row["guided_error"] == row["dinov2_cosine"] == row["fd_dinov2"] == ""
    assert float(row["step_error"]) > 0
    printed = capsys.readouterr().out
    assert "dinov2_cosine, fd_dinov2, name_top1, name_top5 left out: no network\n" in printed
    assert "guided_error left out: there is none with --guidance 1" in printed


def test_recipes_are_drawn_beside_the_ways(tmp_path):
    pipe = load_pipeline(EMOJI_MODEL, torch.device("cpu"), torch.float32)
    finest = [block.name for block in tomesd.explain(pipe).rows if block.downsample == 1]
    file = tmp_path / "mine.json"
    tomesd.Recipe({finest[0]: tomesd.Merge(0.75)}).save(file)
    call = [tmp_path / "q.csv", "--cache", tmp_path, "--size", "64", *FEW, "--ways", "windowed"]
    _, merged, mine = compare(*call, "--recipes", file)
    assert (mine["way"], mine["ratio"], mine["note"]) == ("mine", "", "")
    assert 0 < float(mine["step_error"]) != float(merged["step_error"])
    tomesd.Recipe({finest[0]: tomesd.Merge(0.25)}).save(file)  # is another one, and drawn anew
    assert float(compare(*call, "--recipes", file)[2]["step_error"]) < float(mine["step_error"])
    tomesd.Recipe({"unet.nowhere": tomesd.Merge(0.25)}).save(file)
    assert "nothing to merge at 'unet.nowhere'" in compare(*call, "--recipes", file)[2]["note"]


def test_a_way_that_fails_when_drawing_has_a_note(tmp_path):
    def fail(unet, setting):
        def count(*_):
            unet.called = getattr(unet, "called", 0) + 1
            if unet.called > 3:
                raise MemoryError("too much")

        unet.register_forward_pre_hook(count)

    compared = quality.Comparison({**WAYS, "exact": Way("fails", "k", fail)}, metrics.METRICS)
    call = [tmp_path / "q.csv", "--cache", tmp_path, "--size", "64", *FEW, "--ways", "exact", "windowed"]
    rows = compare(*call, compared=compared)
    assert [row["note"] for row in rows] == ["", "MemoryError: too much", ""]
    assert rows[1]["psnr_db"] == ""


def test_pipelines_that_need_more_than_a_prompt_say_so(tmp_path, capsys):
    from diffusers import StableDiffusionImg2ImgPipeline

    tiny.sd(StableDiffusionImg2ImgPipeline).save_pretrained(tmp_path / "other")
    (tmp_path / "prompts.txt").write_text("a cat")
    call = ["--model", tmp_path / "other", "--prompts-file", tmp_path / "prompts.txt", "--cache", tmp_path]
    assert main(["quality", *map(str, call)]) == 2
    assert "plain cannot be drawn: ValueError: Input is in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--recipes", "no/where.json"], "argument --recipes: no/where.json: [Errno 2] No such file"),
        (["--recipes", "README.md"], "argument --recipes: README.md: "),
        (["--ways", "ideal"], "invalid choice: 'ideal'"),
        (["--prompts", "10000"], "--prompts: 10000, where there are"),
        (["--prompts-file", "no/where.txt"], "--prompts-file: [Errno 2] No such file"),
        (["--model", "tests"], "tests is not a pipeline folder: it has no model_index.json"),
        (["--model", "OWNER/MODEL"], "has no names.txt to take prompts from: give a --prompts-file"),
        (["--csv", "no/where/q.csv"], "--csv: there is no folder no/where"),
        (["--sheet", "no/where/s.png"], "--sheet: there is no folder no/where"),
        (["--plot", "curves"], "--plot: the name of curves has to end in one of .eps, "),
        (["--guidance", "nan"], "argument --guidance: 'nan' is not a number of at least 0"),
        (["--size", "100"], "--size 100x100: 100 is not a multiple of 8; take 96 or 104"),
        (["--plot-metric", "lpips"], "--plot-metric: "),
        (["--plot-metric", "beauty"], "invalid choice: 'beauty'"),
        (["--plot-metric", "guided_error", "--guidance", "1"], "there is none with --guidance 1"),
    ],
)
def test_mistakes_are_explained_in_one_line(arguments, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["quality", "--cache", str(tmp_path), *arguments]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("tomesd quality: error: ")
    assert says in line


def test_ways_are_listed(capsys):
    assert main(["quality", "--list"]) == 0
    own = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {"windowed", "keys", "fewer-steps"} < set(own)
    assert not set(rivals.RIVALS) & set(own)
    assert with_dinov2.main(["--list"]) == 0
    every = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert set(every) == set(own) | set(rivals.RIVALS)


def test_frechet_distance_of_what_is_known():
    x = np.random.default_rng(0).normal(size=(50, 6))
    assert with_dinov2.frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert with_dinov2.frechet(x, x + np.array([3, 4, 0, 0, 0, 0])) == pytest.approx(25)
    # Of covariances c and 4 c the distance is tr(c + 4 c - 2 * 2 c) = tr(c).
    centred = x - x.mean(0)
    assert with_dinov2.frechet(centred, 2 * centred) == pytest.approx(np.trace(np.cov(x.T)))
    # By the definition, for covariances that do not commute and unequal numbers, of more features or fewer.
    import scipy.linalg

    for features in (6, 3):
        a, b = (
            x[:, :features],
            np.random.default_rng(1).normal(size=(20, 6))[:, :features]
            @ np.triu(np.ones((features, features))),
        )
        root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
        wanted = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
        assert with_dinov2.frechet(a, b) == pytest.approx(wanted)
    few = x[:3]  # their covariance is singular
    assert with_dinov2.frechet(few, few + 1) == pytest.approx(6)
    assert with_dinov2.frechet(x[:1], x) is None


def test_measures_of_equal_and_other_pictures():
    x = pictures(3)
    assert metrics.psnr(x, x).tolist() == [metrics.EQUAL] * 3
    assert metrics.ssim(x, x).tolist() == pytest.approx([1] * 3)
    y = x.copy()
    y[0] = np.where(x[0] < 128, x[0] + 51, x[0] - 51)
    assert metrics.psnr(y, x)[0] == pytest.approx(20 * np.log10(5), abs=1e-9)
    assert metrics.psnr(y, x)[1] == metrics.EQUAL
    assert metrics.ssim(y, x)[0] < 0.9
    vectors = np.array([[1.0, 0], [1, 1]])
    assert with_dinov2.cosine(vectors, np.array([[2.0, 0], [-1, 0]])) == pytest.approx([1, -(2**-0.5)])


def test_references_are_nearest_to_themselves(tmp_path):
    dino = with_dinov2.Dino("cpu", tmp_path / "tokens")
    references = dino(pictures(20))
    assert references.shape == (20, 8)
    assert np.array_equal(dino(pictures(20)), references)  # kept
    assert len(list((tmp_path / "tokens").iterdir())) == 1
    assert metrics.nearest(references, references, list(range(20)), 1) == 1
    shifted = [(i + 1) % 20 for i in range(20)]
    assert metrics.nearest(references, references, shifted, 1) == 0
    assert metrics.nearest(references, references, shifted, 20) == 1
    half = [i if i < 10 else shifted[i] for i in range(20)]
    assert metrics.nearest(references, references, half, 1) == 0.5


def test_an_atlas_is_cut_row_by_row(tmp_path):
    (tmp_path / "names.txt").write_text("red / crimson\n\ngreen\nblue\n")
    assert metrics.read_names(tmp_path) == [["red", "crimson"], ["green"], ["blue"]]
    with pytest.raises(metrics.Missing, match="has no names"):
        metrics.read_atlas(tmp_path, 3)
    cells = np.zeros((2, 64, 2, 64, 3), np.uint8)
    for i in range(3):
        cells[i // 2, :, i % 2, :, i] = 255
    Image.fromarray(cells.reshape(128, 128, 3)).save(tmp_path / "names.png")
    atlas = metrics.read_atlas(tmp_path, 3)
    assert atlas.shape == (3, 64, 64, 3)
    assert [(cell == 255).all((0, 1)).tolist() for cell in atlas] == np.eye(3, dtype=bool).tolist()
    with pytest.raises(metrics.Missing, match=r"has 4 cells of 64 pixels, names\.txt 5 lines"):
        metrics.read_atlas(tmp_path, 5)


def test_errors_before_and_after_guidance():
    wanted = torch.tensor([[3.0, 4.0], [0.0, 5.0]])  # without text, with it
    got = wanted + torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    raw, guided = drawing.errors(lambda: (got,), [((), {}, wanted)], 1, 3.0)
    assert raw.tolist() == pytest.approx([0, 1 / 5])
    assert guided.tolist() == pytest.approx([3 / np.hypot(3 - 9, 4 + 3)])
    raw, guided = drawing.errors(lambda: (got,), [((), {}, wanted)], 2, 3.0)
    assert len(raw) == 2
    assert not guided.size
