"""What the training of the shipped model rests on."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import card
import data
import grow
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "--limit 3 --resolution 16 --vae-channels 16,16 --unet-channels 16,16 --text-width 32 --text-layers 1 "
    "--batch 2,2 --vae-batch 2 --vae-minutes 0.001 --minutes 0.001,0.001 --precision no"
)


class PlainFont:
    """Stands in for the font, which not every machine has: a square for every emoji."""

    version = "Version 0"

    def __init__(self, path: Path) -> None:
        pass

    def render(self, emoji: data.Emoji, size: int) -> Image.Image:
        return Image.new("RGB", (size, size), emoji.colour or "gray")


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


def test_the_shipped_model_knows_the_names_of_the_table() -> None:
    shipped = (ROOT / "tomesd" / "emoji-model" / "names.txt").read_text(encoding="utf-8").splitlines()
    assert shipped == [" / ".join(emoji.names) for emoji in data.emoji_table()]


def test_the_card_shows_the_options_that_make_a_model() -> None:
    argv = ["--resume", "--minutes", "1,2", "--work", "a", "--out", "b", "--seed", "3"]
    assert card.command_line(argv) == "python scripts/emoji --minutes 1,2 --seed 3"


def test_a_short_run_saves_a_pipeline_and_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main = runpy.run_path(str(ROOT / "scripts" / "emoji" / "__main__.py"))["main"]
    monkeypatch.setitem(main.__globals__, "EmojiFont", PlainFont)
    monkeypatch.setattr(
        torch, "set_float32_matmul_precision", lambda precision: None
    )  # it would outlive the test
    work, out = tmp_path / "work", tmp_path / "model"
    argv = [*TINY.split(), "--work", str(work), "--out", str(out)]
    try:
        main(argv)
        trained = torch.load(work / "vae.pt", weights_only=True)["vae"]
        main([*argv, "--resume"])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    resumed = torch.load(work / "vae.pt", weights_only=True)["vae"]
    assert all(torch.equal(trained[name], resumed[name]) for name in trained)
    assert torch.load(work / "unet.pt", weights_only=True)["stages"] == 2
    assert {path.name for path in work.glob("sheet-*.png")} == {"sheet-1.png", "sheet-2.png"}
    assert "red apple / apple, green apple, banana." in (out / "README.md").read_text(encoding="utf-8")
    assert json.loads((out / "text_encoder" / "config.json").read_text())["dtype"] == "float32"
    # What transformers 4 needs.
    assert {path.name for path in (out / "tokenizer").iterdir()} >= {"vocab.json", "merges.txt"}
    weights = load_file(out / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in weights)
    pipe = StableDiffusionPipeline.from_pretrained(out, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("banana", num_inference_steps=1).images[0].size == (16, 16)
