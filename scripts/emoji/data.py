"""What the model learns: emoji, their names and captions, and their pictures, also in other colours."""

from __future__ import annotations

import csv
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from fontTools.ttLib import TTFont
from PIL import Image

# One emoji a line, then its names. Chosen to look different from one another and to have plain English names:
# a small model learns a few hundred clear things better than all 3,600 emoji.
NAMES = Path(__file__).with_name("names.tsv")

# Captions seen in training besides the bare name, so that prompts in a sentence work too.
TEMPLATES = ("a {}", "a picture of a {}", "a photo of a {}", "an emoji of a {}", "{} emoji", "the {}")

HUE_DEGREES = {"red": 0, "orange": 28, "yellow": 52, "green": 120, "blue": 215, "purple": 280, "pink": 330}
COLOURS = {*HUE_DEGREES, "white", "black", "brown", "rainbow", "gold"}
HELD_OUT = 5  # one in so many combinations of thing and colour is not shown in training


class UserError(Exception):
    """A mistake that a sentence explains better than a traceback."""


@dataclass(frozen=True)
class Emoji:
    """One picture of the training set and what it is called."""

    char: str
    names: tuple[str, ...]
    colour: str | None = None  # painted in this colour

    def painted(self) -> list[Emoji]:
        """The same in every colour; none of what is called by a colour already."""
        if any(word in COLOURS for name in self.names for word in name.split()):
            return []
        return [Emoji(self.char, tuple(f"{c} {n}" for n in self.names), c) for c in HUE_DEGREES]

    def captions(self) -> list[str]:
        """Every caption of this picture. The bare names repeat, to be drawn half of the time."""
        phrases = [t.format(n) for n in self.names for t in TEMPLATES]
        return [n for n in self.names for _ in TEMPLATES] + phrases


def emoji_table() -> list[Emoji]:
    """The training set of the UNet, from the file of names."""
    with NAMES.open(encoding="utf-8", newline="") as file:
        table = [Emoji(char, tuple(names)) for char, *names in csv.reader(file, delimiter="\t")]
    doubled = [n for n, k in Counter(n for e in table for n in e.names).items() if k > 1]
    assert not doubled, f"names given twice: {doubled}"
    return table


def painted_table(table: list[Emoji]) -> tuple[list[Emoji], list[Emoji]]:
    """Emoji in other colours: those to train on, and those held out."""
    shown: list[Emoji] = []
    held: list[Emoji] = []
    known = {name for e in table for name in e.names}
    for i, emoji in enumerate(table):
        for k, other in enumerate(emoji.painted()):
            if not known & set(other.names):
                (held if (i + k) % HELD_OUT == 0 else shown).append(other)
    return shown, held


def paint(picture: Image.Image, colour: str) -> Image.Image:
    """The picture with every hue replaced by one; greys stay."""
    hue, saturation, value = picture.convert("HSV").split()
    hue = hue.point(lambda _: round(HUE_DEGREES[colour] * 255 / 360))
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


class EmojiFont:
    """The bitmaps of a CBDT colour font."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(
                f"no font at {path}: install the Debian/Ubuntu package fonts-noto-color-emoji, "
                "or give the path of NotoColorEmoji.ttf with --font"
            )
        font = TTFont(path)
        if "CBDT" not in font:
            raise UserError(f"{path} has no bitmap (CBDT) glyphs; Debian's NotoColorEmoji.ttf has")
        self.version = font["name"].getDebugName(5).split(";")[0]
        self._cmap = font.getBestCmap()
        self._glyphs = font["CBDT"].strikeData[0]

    def render(self, emoji: Emoji, size: int) -> Image.Image:
        """The emoji on white, ``size`` pixels square."""
        glyph = self._glyphs[self._cmap[ord(emoji.char)]]
        picture = Image.open(io.BytesIO(glyph.imageData)).convert("RGBA")
        side = max(picture.size)
        canvas = Image.new("RGBA", (side, side), "white")
        canvas.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        flat = canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
        return paint(flat, emoji.colour) if emoji.colour else flat


def to_tensor(pictures: list[Image.Image]) -> torch.Tensor:
    """Pictures as one uint8 tensor, channels first."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).contiguous()


def jittered(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The picture a little smaller or larger, shifted, and mirrored half of the time."""
    size = picture.width
    new = round(size * rng.uniform(0.8, 1.0))
    left, top = (int(rng.integers(0, size - new + 1)) for _ in range(2))
    canvas = Image.new("RGB", (size, size), "white")
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    canvas.paste(picture.resize((new, new), Image.Resampling.LANCZOS), (left, top))
    return canvas
