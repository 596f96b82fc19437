"""The examples, on the trained pipeline that the repository ships."""

import generate
import generate_4k
import pytest
import token_merger
import torch
import torch.nn.functional as F
import unet_clusters
import vit_clusters
import vlm
from PIL import Image

import tomesd
from tomesd.commands.common import guarded
from tomesd.commands.pipelines import EMOJI_MODEL


def test_the_shipped_model_is_explained():
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(EMOJI_MODEL)
    tomesd.apply_patch(pipe)
    table = tomesd.explain(pipe)
    assert (table.height, table.width) == (128, 128)
    assert [(row.before, row.after) for row in table.rows if row.left_alone is None] == [(4096, 2048)] * 3


def test_a_picture_is_drawn_plain_and_merged(tmp_path):
    out = tmp_path / "both.png"
    generate.main(["red apple", "--steps", "2", "--out", str(out)])
    both = Image.open(out)
    assert both.size == (256, 128)
    halves = [both.crop((x, 0, x + 128, 128)).tobytes() for x in (0, 128)]
    assert halves[0] != halves[1]


def test_a_picture_is_refined_at_a_larger_size(tmp_path):
    out = tmp_path / "large.png"
    call = ["red apple", "--model", str(EMOJI_MODEL), "--size", "192", "128", "--steps", "3"]
    generate_4k.main([*call, "--out", str(out)])
    assert Image.open(out).size == (192, 128)


def test_clusters_are_drawn_at_the_steps_asked_for(tmp_path, capsys):
    out = tmp_path / "clusters.png"
    unet_clusters.main(["pizza", "--steps", "2", "--out", str(out)])
    assert capsys.readouterr().out.strip() == str(out)
    width, height = Image.open(out).size
    assert width > 3 * 400  # the picture and both steps
    assert height > 2 * 400


@pytest.mark.parametrize(
    ("example", "call", "says"),
    [
        (unet_clusters, "--steps 2 --at 2", "argument --at: there are steps 0 to 1"),
        (unet_clusters, "--out .", "argument --out: cannot write ."),
        (unet_clusters, "--out x.nope", "the name of x.nope has to end in one of .eps"),
        (vit_clusters, "--layers 13", "argument --layers: invalid choice: 13"),
        (vit_clusters, "--weights nowhere.pth", "no weights from nowhere.pth: "),
        (vlm, "--keep nan", "argument --keep: nan must be above 0 and below 1"),
        (vlm, "--keep 65", "there are 64 tokens of a picture, of which 65 cannot be kept"),
        (vlm, "--image nowhere.jpg", "No such file or directory: "),
    ],
)
def test_mistakes_at_an_example_are_a_line(example, call, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert guarded(example.PROGRAM, lambda: example.main(call.split())) == 2
    assert f"{example.PROGRAM}: error: " in (line := capsys.readouterr().err.splitlines()[-1])
    assert says in line
    assert list(tmp_path.iterdir()) == []


def test_clusters_of_a_photo_are_drawn_with_weights_of_a_file(tmp_path, capsys):
    timm = pytest.importorskip("timm")
    weights, out = tmp_path / "vit.pth", tmp_path / "clusters.jpg"
    torch.save(
        timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=56).state_dict(), weights
    )
    call = ["--weights", str(weights), "--images", "chelsea", "--size", "56", "--layers", "1", "12"]
    vit_clusters.main([*call, "--out", str(out)])
    assert capsys.readouterr().out == f"{out}: r = 1\n"
    assert Image.open(out).width > 600


def test_the_example_of_a_model_of_ones_own_learns():
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
