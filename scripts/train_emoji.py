"""Train the small Stable Diffusion pipeline in ``examples/emoji-model`` from nothing.

The model draws emoji from their names ("red apple", "cat face").  It has the parts of every Stable
Diffusion model (CLIP text encoder, attention UNet, KL autoencoder, DDIM sampler), only small, so that the
examples and tests of this package have a real trained model to work on without any download.  Its latents
are 64x64, so the finest level has 4,096 tokens, as many as that of Stable Diffusion 1.5 at 512 pixels.

The pictures come from the Noto Color Emoji font (Debian: ``apt-get install fonts-noto-color-emoji``), the
names from the table below.  Single things are also shown in other colours ("purple dog face"); one in five
of these combinations is never shown, to see whether the model puts colour and thing together itself.

    python scripts/train_emoji.py                                       # an hour and a half on two CPU cores
    python scripts/train_emoji.py --minutes 4,4,10 --batch 512,256,128  # on a GPU

The UNet grows as it learns: first it denoises 16x16 means of the latents, then 32x32, then all of them, each
time with one level more around what it is (``grown``).  What to draw is learnt where a step costs a
twentieth.  An interrupted run goes on where it stopped with ``--resume``.

The loss first falls to a level where pictures have the right colours, and stays there for a while; shapes
come when it falls again.  A run that ends before was too short.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import os
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here comes from a hub
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its hints concern parts that are not used here

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
ATLAS_COLUMNS, ATLAS_CELL = 20, 64  # of names.png, in pictures and in pixels
MAX_TOKENS = 16  # the longest caption is far shorter, and every token costs cross-attention time

# One entry is "<emoji> <name>/<other name>/...".  Chosen to look different from one another and to have
# plain English names: a small model learns a few hundred clear things better than all 3,600 emoji.
EMOJI = """
🍎 red apple/apple, 🍏 green apple, 🍌 banana, 🍊 orange/tangerine, 🍉 watermelon, 🍓 strawberry,
🍇 grapes, 🍍 pineapple, 🍋 lemon, 🍒 cherries, 🍕 pizza/slice of pizza, 🍔 hamburger/burger,
🍩 donut/doughnut, 🎂 birthday cake, 🍦 ice cream cone/ice cream, 🍞 bread, 🧀 cheese, 🌭 hot dog,
☕ cup of coffee/coffee, 🍳 fried egg, 🐱 cat face/cat, 🐶 dog face/dog, 🐼 panda face/panda,
🐸 frog face/frog, 🐷 pig face/pig, 🦊 fox face/fox, 🐻 bear face/bear, 🦁 lion face/lion, 🐨 koala,
🐰 rabbit face/rabbit, 🐭 mouse face/mouse, 🐵 monkey face/monkey, 🐔 chicken, 🐧 penguin, 🐝 bee,
🦋 butterfly, 🐟 fish, 🐙 octopus, 🐢 turtle, 🐞 ladybug, ❤ red heart/heart, 🧡 orange heart,
💛 yellow heart, 💚 green heart, 💙 blue heart, 💜 purple heart, 🖤 black heart, 🔴 red circle,
🟡 yellow circle, 🟢 green circle, 🔵 blue circle, 🟣 purple circle, 🟠 orange circle, 🟥 red square,
🟨 yellow square, 🟩 green square, 🟦 blue square, 🟪 purple square, ⭐ yellow star/star,
🔶 orange diamond, 🔷 blue diamond, 🔺 red triangle, 🙂 smiley face/smiley, 😎 face with sunglasses,
😍 face with heart eyes, 😂 laughing face, 😢 crying face, 😡 angry face, 👻 ghost, 💀 skull,
🤖 robot face/robot, 🎃 pumpkin, 👽 alien, 🚗 red car/car, 🚌 bus, 🚀 rocket, ⛵ sailboat, 🚕 taxi,
✈ airplane, 🏠 house, ☀ sun, 🌙 crescent moon/moon, 🌈 rainbow, ⛄ snowman, ☁ cloud, 🔥 fire,
🌵 cactus, 🌻 sunflower, 🌳 tree, 🎄 christmas tree, 🌷 tulip, 🍄 mushroom, ❄ snowflake,
⚡ lightning, ⚽ soccer ball/football, 🏀 basketball, 🎾 tennis ball, 🎸 guitar,
🎈 red balloon/balloon, 🎁 gift box/gift, 💡 light bulb, 🔑 key, 📕 red book/book, 📘 blue book,
☂ umbrella, 👑 crown, ⏰ alarm clock, 💧 water drop,
🍐 pear, 🫐 blueberries, 🍑 peach, 🥭 mango, 🥥 coconut, 🥝 kiwi, 🍅 tomato, 🍆 eggplant/aubergine,
🥑 avocado, 🥦 broccoli, 🥒 cucumber, 🌶 hot pepper/chili, 🫑 bell pepper, 🌽 corn, 🥕 carrot,
🧄 garlic, 🧅 onion, 🥔 potato, 🥐 croissant, 🥨 pretzel, 🥞 pancakes, 🧇 waffle, 🥓 bacon,
🍗 chicken leg, 🍟 french fries, 🥪 sandwich, 🌮 taco, 🍝 spaghetti, 🍣 sushi, 🍤 fried shrimp,
🍙 rice ball, 🍿 popcorn, 🍪 cookie, 🍰 piece of cake/cake, 🧁 cupcake, 🍫 chocolate bar/chocolate,
🍬 candy, 🍭 lollipop, 🍯 honey pot, 🥛 glass of milk/milk, 🫖 teapot, 🍷 wine glass, 🍸 cocktail,
🍺 beer mug/beer, 🥤 cup with straw, 🥄 spoon, 🍴 fork and knife, 🐹 hamster, 🐯 tiger face/tiger,
🐮 cow face/cow, 🐦 bird, 🐤 baby chick, 🦆 duck, 🦅 eagle, 🦉 owl, 🦇 bat, 🐺 wolf face/wolf,
🐴 horse face, 🦄 unicorn, 🐛 caterpillar, 🐌 snail, 🐜 ant, 🕷 spider, 🐍 snake, 🦎 lizard,
🦑 squid, 🦐 shrimp, 🦀 crab, 🐡 blowfish, 🐠 tropical fish, 🐬 dolphin, 🐳 whale, 🦈 shark,
🐊 crocodile, 🐘 elephant, 🦒 giraffe, 🐎 horse, 🐑 sheep, 🐇 white rabbit, 🦢 swan, 🦩 flamingo,
🦔 hedgehog, 🐉 dragon, 🦕 dinosaur, 🐾 paw prints, 🐚 seashell, 🌲 pine tree, 🌴 palm tree,
🌱 seedling, 🍀 four leaf clover/clover, 🍁 maple leaf, 🌹 rose, 🌺 hibiscus, 🌸 cherry blossom,
🌼 daisy, 💐 bouquet of flowers, 🪴 potted plant, 🤎 brown heart, 🤍 white heart, 💔 broken heart,
🟤 brown circle, ⚫ black circle, 🟧 orange square, 🟫 brown square, ⬛ black square,
😴 sleeping face, 😱 screaming face, 🤓 nerd face, 🥳 party face, 🤢 sick face, 🥶 cold face,
😇 angel face, 😈 devil face, 🤡 clown face, 🤠 cowboy face, 💩 poo, 💎 diamond/gem, 💍 ring,
👀 eyes, 👍 thumbs up, ✋ raised hand/hand, 🚙 blue car, 🚓 police car, 🚑 ambulance, 🚒 fire engine,
🚜 tractor, 🚚 truck, 🏎 racing car, 🚲 bicycle/bike, 🛵 motor scooter, 🚂 train/locomotive,
🚁 helicopter, 🛸 flying saucer/ufo, 🚢 ship, ⚓ anchor, 🚦 traffic light, 🛑 stop sign, 🏰 castle,
🏭 factory, ⛺ tent, 🗼 tower, ⛪ church, 🌋 volcano, 🏔 snowy mountain/mountain, 🌕 full moon,
🌍 earth, 🪐 planet saturn/planet, 🌧 rain cloud, 🌩 lightning cloud, 🌊 ocean wave, 🌪 tornado,
🏈 american football, ⚾ baseball, 🏐 volleyball, 🎱 billiard ball, 🏆 trophy, 🥇 gold medal,
🎯 dart board, 🎲 dice, 🧩 puzzle piece, 🎮 game controller, 🎹 piano keys, 🎺 trumpet, 🎻 violin,
🥁 drum, 🎧 headphones, 🎨 paint palette, 🎀 pink ribbon, 🎉 party popper, 🧸 teddy bear, 🪁 kite,
📷 camera, 📺 television, 📱 phone, 💻 laptop, ⌚ watch, ⌛ hourglass, 🕯 candle, 📗 green book,
📙 orange book, ✏ pencil, ✂ scissors, 📎 paperclip, 🔒 lock, 🔨 hammer, 🔧 wrench, 🔔 bell,
🧲 magnet, 💣 bomb, 💊 pill, 🔍 magnifying glass, 🔭 telescope, 🔬 microscope, 🧭 compass,
💰 money bag, ✉ envelope, 📦 package, 🪑 chair, 🛏 bed, 🚪 door, 🪣 bucket, 🧹 broom, 🎩 top hat,
👕 shirt, 👖 jeans, 👗 dress, 🧦 socks, 🧤 gloves, 🧣 scarf, 👟 sneaker/shoe, 👠 high heel,
👓 glasses, 🎒 backpack, 👜 handbag, ⚠ warning sign, ♻ recycling symbol, ✅ green check mark,
❌ red cross mark, ❓ question mark, 🎵 musical note, 💬 speech bubble, 🏁 checkered flag
"""

# Captions seen in training besides the bare name, so that prompts in a sentence work too.
TEMPLATES = ("a {}", "a picture of a {}", "a photo of a {}", "an emoji of a {}", "{} emoji", "the {}")


# Hues in degrees, as words.
HUES = {"red": 0, "orange": 28, "yellow": 52, "green": 120, "blue": 215, "purple": 280, "pink": 330}
COLOURS = {*HUES, "white", "black", "brown", "rainbow", "gold"}
HELD_OUT = 5  # one in so many combinations of thing and colour is not shown in training


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
        return [Emoji(self.char, tuple(f"{c} {n}" for n in self.names), c) for c in HUES]

    def captions(self) -> list[str]:
        """Every caption of this picture; the bare names stand three times, to be drawn half of the time."""
        phrases = [t.format(n) for n in self.names for t in TEMPLATES]
        return [n for n in self.names for _ in range(len(TEMPLATES))] + phrases


class UserError(Exception):
    """A mistake that a sentence explains better than a traceback."""


def emoji_table() -> list[Emoji]:
    """The training set of the UNet, from the table at the top of this file."""
    entries = [e.strip() for e in EMOJI.replace("\n", " ").split(",") if e.strip()]
    table = [Emoji(c, tuple(names.split("/"))) for c, names in (e.split(" ", 1) for e in entries)]
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
    hue = hue.point(lambda _: round(HUES[colour] * 255 / 360))
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
        self.version = font["name"].getDebugName(5)
        self._cmap = font.getBestCmap()
        self._glyphs = font["CBDT"].strikeData[0]

    def render(self, emoji: Emoji, size: int) -> Image.Image:
        """The emoji on white, ``size`` pixels square."""
        glyph = self._glyphs[self._cmap[ord(emoji.char[0])]]
        picture = Image.open(io.BytesIO(glyph.imageData)).convert("RGBA")
        side = max(picture.size)
        canvas = Image.new("RGBA", (side, side), "white")
        canvas.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        flat = canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
        return paint(flat, emoji.colour) if emoji.colour else flat


def to_tensor(pictures: list[Image.Image]) -> torch.Tensor:
    """Pictures as one uint8 tensor, channels first."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).contiguous()


def to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels in the range -1..1 that diffusers' models use."""
    return pixels.float() / 127.5 - 1


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


def build_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A byte-level BPE tokenizer in which every word of the captions is one token."""
    alphabet = sorted(ByteLevel.alphabet())
    vocab = {s: i for i, s in enumerate(alphabet + [c + "</w>" for c in alphabet])}
    words = Counter("".join(c if c.isalnum() else " " for c in " ".join(captions)).split())
    split = {w: [*w[:-1], w[-1] + "</w>"] for w in words}
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(p for w, s in split.items() for p in pairwise(s) for _ in range(words[w]))
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], p))  # ties broken by name: the same vocabulary every time
        merges.append(best)
        vocab.setdefault("".join(best), len(vocab))
        for symbols in split.values():
            i = 0
            while i < len(symbols) - 1:
                if (symbols[i], symbols[i + 1]) == best:
                    symbols[i : i + 2] = ["".join(best)]
                i += 1
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids as the pipeline makes them."""
    return tokenizer(
        captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def build_text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_attention_heads=max(1, width // 32),
        num_hidden_layers=layers,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_vae(channels: list[int], resolution: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=resolution,
        scaling_factor=1.0,  # fold_latent_statistics() makes the latents unit variance
        mid_block_add_attention=False,  # lets training crops and drawing sizes differ
        force_upcast=False,
    )


def build_unet(
    channels: list[int], latent_size: int, text_width: int, heads: list[int] | None = None
) -> UNet2DConditionModel:
    """A Stable Diffusion UNet with attention at every resolution, the finest included."""
    return UNet2DConditionModel(
        sample_size=latent_size,
        block_out_channels=channels,
        down_block_types=["CrossAttnDownBlock2D"] * len(channels),
        up_block_types=["CrossAttnUpBlock2D"] * len(channels),
        layers_per_block=1,
        # diffusers calls the number of heads attention_head_dim; few heads at the finest level, where
        # attention over all positions is dear
        attention_head_dim=heads or [max(1, c // (64 if i == 0 else 32)) for i, c in enumerate(channels)],
        cross_attention_dim=text_width,
        norm_num_groups=16,
        use_linear_projection=True,
        time_embedding_dim=128,
        conv_in_kernel=1,  # 1x1 at both ends, so that grown() is exact
        conv_out_kernel=1,
    )


@torch.no_grad()
def grown(small: UNet2DConditionModel) -> UNet2DConditionModel:
    """A UNet with one level more outside, of the width of ``small``'s first, that starts as its equal.

    Of latents `x` of twice the side it gives what ``small`` gives of their 2x2 means, doubled in size. The
    new layers begin as identities, and have the details to learn.
    """
    config = small.config
    first, *rest = config.block_out_channels
    heads = config.attention_head_dim
    large = build_unet(
        [first, first, *rest], 2 * config.sample_size, config.cross_attention_dim, [heads[0], *heads]
    )
    weights = {}
    for name, value in small.state_dict().items():
        if name.startswith("down_blocks."):
            _, level, tail = name.split(".", 2)
            name = f"down_blocks.{int(level) + 1}.{tail}"
        weights[name] = value
    large.load_state_dict(weights, strict=False)

    outer_down, outer_up = large.down_blocks[0], large.up_blocks[-1]
    for module in [*outer_down.resnets, *outer_up.resnets]:
        nn.init.zeros_(module.conv2.weight)
        nn.init.zeros_(module.conv2.bias)
    for module in [*outer_down.attentions, *outer_up.attentions]:
        nn.init.zeros_(module.proj_out.weight)
        nn.init.zeros_(module.proj_out.bias)
    identity = torch.eye(first)
    n = config.in_channels
    large.conv_in.weight[:n] = identity[:n, :n, None, None]  # the latents travel in the first channels
    large.conv_in.bias[:n] = 0
    mean = torch.tensor([0.0, 0.5, 0.5])  # a stride of 2 with padding of 1 takes each pair so
    down = outer_down.downsamplers[0].conv
    down.weight.zero_()
    down.weight[:, :n] = small.conv_in.weight * torch.outer(mean, mean)
    down.bias.copy_(small.conv_in.bias)
    up = large.up_blocks[-2].upsamplers[0].conv
    up.weight.zero_()
    up.weight[:, :, 1, 1] = identity
    up.bias.zero_()
    for resnet in outer_up.resnets:  # of what comes from below and of the skip only the former
        resnet.conv_shortcut.weight.zero_()
        resnet.conv_shortcut.weight[:, :first, 0, 0] = identity
        resnet.conv_shortcut.bias.zero_()
    return large


def build_scheduler() -> DDIMScheduler:
    """DDIM with a last step of pure noise: without it pictures cannot have a white background."""
    return DDIMScheduler(
        beta_schedule="linear",  # noisier than Stable Diffusion's: a latent here is 2 x 2 pixels, not 8 x 8
        beta_start=0.0001,
        beta_end=0.02,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # not used with trailing spacing, but the pipeline warns about anything else
    )


class Clock:
    """How far a stage of training is, by its time."""

    def __init__(self, minutes: float, done_s: float = 0.0, done_steps: int = 0) -> None:
        self.minutes, self.step = minutes, done_steps
        self._start = time.monotonic() - done_s

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    @property
    def progress(self) -> float:
        return min(1.0, self.seconds / max(60 * self.minutes, 1e-9))

    def rate(self, warmup: float = 0.02, floor: float = 0.01) -> float:
        """The share of the full learning rate that is due now: warm-up, then half a cosine."""
        p = self.progress
        if self.step < 200 and p < warmup:
            return max(self.step + 1, 200 * p / warmup) / 200
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * p))


class Ema:
    """A running mean of weights, which draws better pictures than the last weights."""

    def __init__(self, modules: list[torch.nn.Module], decay: float) -> None:
        self.params = [p for m in modules for p in m.parameters()]
        self.mean = [p.detach().clone() for p in self.params]
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.mean, self.params, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and mean; a second call undoes the first."""
        for p, m in zip(self.params, self.mean, strict=True):
            keep = p.detach().clone()
            p.copy_(m)
            m.copy_(keep)


class Log:
    """Losses in a CSV file."""

    def __init__(self, path: Path, append: bool) -> None:
        self._path = path
        new = not (append and path.exists())
        self._file = path.open("w" if new else "a", newline="")
        self._csv = csv.writer(self._file)
        if new:
            self._csv.writerow(["step", "seconds", "rate", "loss"])

    def write(self, step: int, seconds: float, rate: float, loss: float) -> None:
        self._csv.writerow([step, round(seconds, 1), f"{rate:.3e}", f"{loss:.5f}"])
        self._file.flush()

    def last_loss(self, rows: int = 50) -> float:
        """The mean of the last rows: the loss of one step depends on what was drawn for it."""
        with self._path.open(newline="") as file:
            losses = [float(row["loss"]) for row in csv.DictReader(file)]
        return float(np.mean(losses[-rows:])) if losses else math.nan


def random_crops(pixels: torch.Tensor, count: int, size: int) -> torch.Tensor:
    """Crops for the autoencoder: it is convolutional, so small crops teach it the same for less."""
    top = pixels.shape[-1] - size + 1
    out = []
    for i in torch.randint(len(pixels), (count,)).tolist():
        y, x = torch.randint(top, (2,)).tolist()
        crop = pixels[i, :, y : y + size, x : x + size]
        out.append(crop.flip(-1) if torch.rand(()) < 0.5 else crop)
    return to_unit(torch.stack(out))


def gradient_loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How much edges differ; an absolute error alone leaves them soft."""
    return sum(F.l1_loss(a.diff(dim=d), b.diff(dim=d)) for d in (-1, -2))


def train_vae(
    args: argparse.Namespace, accelerator: Accelerator, vae: AutoencoderKL, pixels: torch.Tensor
) -> dict:
    """Train the autoencoder on crops of the pictures."""
    model = accelerator.prepare(vae.to(memory_format=torch.channels_last))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.vae_lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=True
    )
    ema = Ema([vae], decay=0.995)
    clock, log = Clock(args.vae_minutes), Log(args.work / "vae.csv", append=False)
    size = min(64, args.resolution)
    mean_loss = 0.0
    bar = tqdm(total=100, desc="autoencoder", unit="%", mininterval=args.bar_seconds)
    while clock.progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.vae_lr * clock.rate()
        x = random_crops(pixels, args.vae_batch, size).to(
            accelerator.device, memory_format=torch.channels_last
        )
        with accelerator.autocast():
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        y = y.float()
        error = F.l1_loss(y, x) + 0.1 * F.mse_loss(y, x) + 0.5 * gradient_loss(y, x)
        kl = (
            0.5
            * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        )
        loss = error + args.kl * kl
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.step += 1
        ema.update(clock.step)
        if clock.step % 20 == 0:
            value = loss.item()
            mean_loss = value if mean_loss == 0 else 0.9 * mean_loss + 0.1 * value
            log.write(clock.step, clock.seconds, args.vae_lr * clock.rate(), value)
            bar.set_postfix(step=clock.step, loss=f"{mean_loss:.4f}", kl=f"{kl.item():.2f}", refresh=False)
        bar.update(int(100 * clock.progress) - bar.n)
    bar.close()
    ema.swap()
    return {
        "vae_resolution": args.resolution,
        "vae_steps": clock.step,
        "vae_seconds": round(clock.seconds),
        "vae_loss": round(mean_loss, 4),
    }


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """The mean latents of the pictures, in full precision."""
    device = next(vae.parameters()).device
    return torch.cat([vae.encode(to_unit(p).to(device)).latent_dist.mean.float() for p in pixels.split(32)])


@torch.no_grad()
def fold_latent_statistics(vae: AutoencoderKL, latents: torch.Tensor) -> None:
    """Give the latents mean 0 and standard deviation 1 per channel, inside the autoencoder's weights.

    The pipeline can only scale all latents by one number (``scaling_factor``); the 1x1 convolutions at
    both ends of the latents can do the whole normalisation.
    """
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    n = len(mean)
    out, back = vae.quant_conv, vae.post_quant_conv
    back.bias.add_(back.weight[:, :, 0, 0] @ mean)
    back.weight.mul_(std.view(1, n, 1, 1))
    out.weight[:n].div_(std.view(n, 1, 1, 1))
    out.bias[:n].sub_(mean).div_(std)
    out.bias[n:].sub_(2 * std.log())  # the other half of the outputs are log variances


@torch.no_grad()
def psnr_of(vae: AutoencoderKL, pixels: torch.Tensor) -> float:
    """How well the autoencoder gives pictures back, in dB."""
    device = next(vae.parameters()).device
    errors = []
    for p in pixels.split(16):
        x = to_unit(p).to(device)
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        errors.append((x - y).square().mean((1, 2, 3)).cpu() / 4)
    return (-10 * torch.cat(errors).log10()).mean().item()


class CaptionSampler:
    """Draws pictures in shuffled rounds, each with one of its captions, or with none.

    ``painted`` of each batch are from the end of the table, which holds the painted ones.
    """

    def __init__(
        self,
        table: list[Emoji],
        plain: int,
        held: list[Emoji],
        tokenizer: CLIPTokenizer,
        variants: int,
        args: argparse.Namespace,
    ) -> None:
        self.table, self.held = table, held
        self.ids = [tokenize(tokenizer, e.captions()) for e in table]
        self.empty = tokenize(tokenizer, [""])[0]
        self.plain, self.variants = plain, variants
        self.painted, self.dropout = args.painted, args.caption_dropout
        self._queue = torch.empty(0, dtype=torch.long)

    def __call__(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        while len(self._queue) < batch:
            self._queue = torch.cat([self._queue, torch.randperm(self.plain)])
        which, self._queue = self._queue[:batch], self._queue[batch:]
        if self.plain < len(self.ids):
            other = torch.randint(self.plain, len(self.ids), (batch,))
            which = torch.where(torch.rand(batch) < self.painted, other, which)
        ids = [self.ids[i][torch.randint(len(self.ids[i]), ())] for i in which.tolist()]
        dropped = torch.rand(batch) < self.dropout
        ids = torch.where(dropped[:, None], self.empty, torch.stack(ids))
        return which * self.variants + torch.randint(self.variants, (batch,)), ids


def loss_weight(alphas_cumprod: torch.Tensor, t: torch.Tensor, gamma: float = 5.0) -> torch.Tensor:
    """Less weight for steps with little noise: there the v-loss only polishes what is plain to see."""
    snr = alphas_cumprod[t] / (1 - alphas_cumprod[t])
    return (snr.clamp(max=gamma) + 1) / (snr + 1)


@dataclass
class Parts:
    """Everything that is saved as the pipeline."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler: DDIMScheduler

    def pipeline(self) -> StableDiffusionPipeline:
        pipe = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe


def train_unet(
    args: argparse.Namespace,
    accelerator: Accelerator,
    parts: Parts,
    table: list[Emoji],
    plain: int,
    held: list[Emoji],
    latents: torch.Tensor,
) -> list[tuple[int, float]]:
    """Train UNet and text encoder, growing the UNet; gives steps and seconds of each stage."""
    checkpoint = args.work / "unet.pt"
    state = None
    if args.resume and checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if state["stages"] != len(args.minutes):
            raise UserError(f"{checkpoint} is of {state['stages']} stages: give --minutes for as many")
    done: list[tuple[int, float]] = state["done"] if state else []
    sampler = CaptionSampler(table, plain, held, parts.tokenizer, len(latents) // len(table), args)
    log = Log(args.work / "unet.csv", append=state is not None)
    for stage in range(len(args.minutes)):
        if stage > 0:
            parts.unet = grown(parts.unet.cpu())
        if stage >= len(done):
            parts.unet.to(accelerator.device)
            done.append(train_stage(args, accelerator, parts, sampler, latents, done, log, state))
            state = None
    return done


def train_stage(
    args: argparse.Namespace,
    accelerator: Accelerator,
    parts: Parts,
    sampler: CaptionSampler,
    latents: torch.Tensor,
    done: list[tuple[int, float]],
    log: Log,
    state: dict | None,
) -> tuple[int, float]:
    """Train on means of the latents, as small as the UNet of this stage; its weights end as running means."""
    stage, device = len(done), accelerator.device
    shrink = latents.shape[-1] // parts.unet.config.sample_size
    batch, peak = args.batch[stage], args.lr * args.lr_decay**stage
    unet, text = accelerator.prepare(parts.unet, parts.text_encoder)
    unet.train()
    text.train()
    params = [*unet.parameters(), *text.parameters()]
    optimizer = torch.optim.AdamW(params, lr=peak, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    ema = Ema([parts.unet, parts.text_encoder], decay=args.ema)
    alphas = parts.scheduler.alphas_cumprod.to(device)
    checkpoint = args.work / "unet.pt"
    clock = Clock(args.minutes[stage])
    if state:
        load_weights(parts.unet, state["unet"], checkpoint)
        load_weights(parts.text_encoder, state["text"], checkpoint)
        optimizer.load_state_dict(state["optimizer"])
        ema.mean = [m.to(device) for m in state["ema"]]
        clock = Clock(args.minutes[stage], state["seconds"], state["step"])
        print(f"resumed at step {clock.step} of stage {stage + 1}, after {clock.seconds:.0f} s", flush=True)
    latents = F.avg_pool2d(latents, shrink).to(device)
    mean_loss, next_save = 0.0, clock.seconds + 60 * args.save_minutes
    name = f"UNet {latents.shape[-1]}x{latents.shape[-1]}"
    start = int(100 * clock.progress)
    bar = tqdm(total=100, desc=name, unit="%", mininterval=args.bar_seconds, initial=start)
    while clock.progress < 1:
        lr = peak * clock.rate()
        for group in optimizer.param_groups:
            group["lr"] = lr
        which, ids = sampler(batch)
        x0 = latents[which.to(device)]
        noise = torch.randn_like(x0) / shrink  # the mean of shrink x shrink values of the full size
        # one time per slice of the range in every batch: the same loss with less variance
        t = ((torch.arange(batch) + torch.rand(batch)) / batch * len(alphas)).long().to(device)
        noisy = parts.scheduler.add_noise(x0, noise, t)
        target = parts.scheduler.get_velocity(x0, noise, t)
        with accelerator.autocast():
            v = unet(noisy, t, text(ids.to(device)).last_hidden_state).sample
        loss = ((v.float() - target).square().mean((1, 2, 3)) * loss_weight(alphas, t)).mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.step += 1
        ema.update(clock.step)
        if clock.step % 10 == 0:
            value = loss.item()
            mean_loss = value if mean_loss == 0 else 0.97 * mean_loss + 0.03 * value
            log.write(clock.step, clock.seconds, lr, value)
            bar.set_postfix(step=clock.step, loss=f"{mean_loss:.4f}", refresh=False)
        bar.update(int(100 * clock.progress) - bar.n)
        if clock.seconds > next_save or clock.progress >= 1:
            next_save = clock.seconds + 60 * args.save_minutes
            save_state(checkpoint, parts, optimizer, ema, clock, done, len(args.minutes))
    bar.close()
    ema.swap()
    prompts = sheet_prompts(sampler)
    draw_sheet(parts.pipeline(), prompts, args.work / f"sheet-{stage + 1}.png", accelerator, shrink)
    return clock.step, clock.seconds


def load_weights(module: torch.nn.Module, weights: dict, path: Path) -> None:
    try:
        module.load_state_dict(weights)
    except RuntimeError:
        raise UserError(
            f"{path} is of a model with other options: give the same ones, or another --work"
        ) from None


def save_state(
    path: Path,
    parts: Parts,
    optimizer: torch.optim.Optimizer,
    ema: Ema,
    clock: Clock,
    done: list[tuple[int, float]],
    stages: int,
) -> None:
    """Write a checkpoint to go on from, whole or not at all."""
    state = {
        "unet": parts.unet.state_dict(),
        "text": parts.text_encoder.state_dict(),
        "optimizer": optimizer.state_dict(),
        "ema": ema.mean,
        "step": clock.step,
        "seconds": clock.seconds,
        "done": done,
        "stages": stages,
    }
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def draw(
    pipe: StableDiffusionPipeline,
    prompts: list[str],
    accelerator: Accelerator,
    steps: int = 20,
    guidance: float = 3.0,
    shrink: int = 1,
) -> list[Image.Image]:
    """One picture per prompt, of latents shrunk as in this stage; picture ``i`` starts from seed ``i``."""
    pictures: list[Image.Image] = []
    training = [m for m in (pipe.unet, pipe.text_encoder) if m.training]
    for m in training:
        m.eval()
    for i in range(0, len(prompts), 12):
        part = prompts[i : i + 12]
        shape = (1, pipe.unet.config.in_channels, *2 * [pipe.unet.config.sample_size])
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(i + k)) for k in range(len(part))]
        latents = (torch.cat(noise) / shrink).to(accelerator.device)
        with accelerator.autocast():
            call = dict(num_inference_steps=steps, guidance_scale=guidance, latents=latents)
            pictures += pipe(part, **call).images
    for m in training:
        m.train()
    return pictures


def sheet_prompts(sampler: CaptionSampler, count: int = 36) -> list[str]:
    """Names from all over the table, and the last few from the combinations that are never shown."""
    few = min(6, len(sampler.held))
    names = [e.names[0] for e in sampler.table[: sampler.plain]]
    return names[:: max(1, len(names) // (count - few))][: count - few] + [
        e.names[0] for e in sampler.held[:: max(1, len(sampler.held) // 6)][:few]
    ]


def draw_sheet(
    pipe: StableDiffusionPipeline, prompts: list[str], path: Path, accelerator: Accelerator, shrink: int = 1
) -> None:
    """A grid of pictures with their prompts under them."""
    pictures = draw(pipe, prompts, accelerator, shrink=shrink)
    columns = math.ceil(math.sqrt(len(prompts)))
    width, height = pictures[0].size
    cell = (width + 8, height + 20)
    sheet = Image.new("RGB", (columns * cell[0], math.ceil(len(prompts) / columns) * cell[1]), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        x, y = i % columns * cell[0] + 4, i // columns * cell[1]
        sheet.paste(picture, (x, y))
        pen.text((x, y + height + 2), prompt, fill="black")
    sheet.save(path)


def save_pipeline(parts: Parts, folder: Path) -> None:
    """Save in half precision."""
    modules = (parts.unet, parts.text_encoder, parts.vae)
    for m in modules:
        m.half()
    parts.pipeline().save_pretrained(folder, safe_serialization=True)
    for m in modules:
        m.float()
    # transformers loads in the precision of this file, diffusers in float32: they have to agree
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))


CARD = """---
license: other
license_name: apache-2.0-code-and-ofl-1.1-pictures
library_name: diffusers
pipeline_tag: text-to-image
---

# emoji-model

A very small Stable Diffusion pipeline that draws emoji from their names, {resolution} x {resolution} pixels,
on white.  It gives the examples and tests a real, trained model without a download.

```python
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained("examples/emoji-model")
pipe("red apple", guidance_scale=3.0, num_inference_steps=20).images[0].save("apple.png")
```

| part | what | parameters |
|---|---|---|
| `unet` | {unet_channels} channels, attention at every level, at most {latent}x{latent} | {unet_params:,} |
| `vae` | {vae_channels} channels, one latent per {scale}x{scale} pixels | {vae_params:,} |
| `text_encoder` | CLIP, {text_layers} layers of {text_width} | {text_params:,} |
| `scheduler` | DDIM, v-prediction, zero terminal SNR | |

## Data and licence

The pictures are the bitmaps of the font Noto Color Emoji, copyright Google Inc., under the SIL Open Font
License 1.1 (Debian package `fonts-noto-color-emoji`; {font_version}).
The captions are the plain names below, written for this model.  No pretrained weights were used.  The weights
may be used under the licence of this repository; pictures that closely repeat a glyph remain under the
licence of the font.

## How it was trained

    {command}

On {device}: autoencoder {vae_steps:,} steps in {vae_seconds} s (loss {vae_loss}; {psnr:.1f} dB PSNR),
UNet and text encoder {stages}, from the coarsest latents to all of them:
{samples:,} samples (last loss {unet_loss}); seed {seed}, bfloat16 autocast: {precision}.  The schedule
follows the clock, so another run gives other weights.

## What it can draw

{count} things, under the names below (and "a ...", "a picture of a ...", "... emoji").  Things that are not
called by a colour are drawn in others, too: {shown} combinations such as "purple dog face" were shown in
training, {held} never, to see what it makes of them.  It does not draw scenes, numbers of things or text.
At other sizes than {resolution} x {resolution} things repeat or melt together.

`names.png` shows all of them as they are in the font, in the order of `names.txt`; with it
`python scripts/quality.py --prompts {count}` tells how often what is drawn is nearest to what was asked for.

{names}

Never shown in training: {held_names}
"""


def write_card(folder: Path, table: list[Emoji], pictures: list[Image.Image], facts: dict) -> None:
    """README.md for people; names.txt and names.png, what each name looks like, for examples and benches."""
    (folder / "README.md").write_text(CARD.format(**facts), encoding="utf-8")
    lines = (" / ".join(e.names) + "\n" for e in table)
    (folder / "names.txt").write_text("".join(lines), encoding="utf-8")
    rows = math.ceil(len(table) / ATLAS_COLUMNS)
    atlas = Image.new("RGB", (ATLAS_COLUMNS * ATLAS_CELL, rows * ATLAS_CELL), "white")
    for i, picture in enumerate(pictures):
        small = picture.resize((ATLAS_CELL, ATLAS_CELL), Image.Resampling.LANCZOS)
        atlas.paste(small, (i % ATLAS_COLUMNS * ATLAS_CELL, i // ATLAS_COLUMNS * ATLAS_CELL))
    atlas.quantize(256, dither=Image.Dither.NONE).save(folder / "names.png", optimize=True)


def numbers(kind: type) -> Callable[[str], list]:
    """Numbers with commas between them."""

    def parse(text: str) -> list:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 8,4,4") from None

    return parse


def channels(text: str) -> list[int]:
    """ "32,64" as numbers; group normalisation has 16 groups, hence the multiples."""
    try:
        out = [int(c) for c in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 32,64,64") from None
    if not out or any(c <= 0 or c % 16 for c in out):
        raise argparse.ArgumentTypeError(f"{text!r}: channels have to be multiples of 16")
    return out


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    g = p.add_argument_group("files")
    g.add_argument("--font", type=Path, default=DEFAULT_FONT, help="NotoColorEmoji.ttf with bitmap glyphs")
    g.add_argument("--out", type=Path, default=ROOT / "examples" / "emoji-model", help="folder of the model")
    g.add_argument(
        "--work", type=Path, default=ROOT / ".cache" / "train_emoji", help="checkpoints, logs, sheets"
    )
    g.add_argument("--resume", action="store_true", help="go on from the checkpoints in --work")
    g = p.add_argument_group("how long")
    g.add_argument(
        "--minutes",
        type=numbers(float),
        default="32,18,32",
        help="for each stage of the UNet, each twice as large",
    )
    g.add_argument("--vae-minutes", type=float, default=4, help="minutes for the autoencoder")
    g.add_argument("--save-minutes", type=float, default=5, help="minutes between checkpoints")
    g = p.add_argument_group("the model")
    g.add_argument("--resolution", type=int, default=128, help="side of a picture in pixels")
    g.add_argument(
        "--vae-channels", type=channels, default="32,48", help="n levels: latents are 2^(n-1) smaller"
    )
    g.add_argument(
        "--unet-channels",
        type=channels,
        default="32,128,128",
        help="one number per level of the first stage; later ones have more levels of the first width",
    )
    g.add_argument("--text-width", type=int, default=128, help="width of the text encoder")
    g.add_argument("--text-layers", type=int, default=2, help="layers of the text encoder")
    g = p.add_argument_group("training")
    g.add_argument("--batch", type=numbers(int), default="32,24,12", help="batch of each stage of the UNet")
    g.add_argument("--lr", type=float, default=1.3e-3, help="highest learning rate of the UNet")
    g.add_argument(
        "--lr-decay", type=float, default=0.6, help="the same of each stage to that of the one before"
    )
    g.add_argument("--ema", type=float, default=0.998, help="decay of the running mean of weights")
    g.add_argument("--caption-dropout", type=float, default=0.1, help="share of pictures without caption")
    g.add_argument("--painted", type=float, default=0.2, help="share of pictures in other colours")
    g.add_argument(
        "--variants", type=int, default=1, help="versions of each picture, all but one moved or mirrored"
    )
    g.add_argument("--vae-batch", type=int, default=8, help="batch of the autoencoder (crops of 64 pixels)")
    g.add_argument("--vae-lr", type=float, default=1.5e-3, help="highest learning rate of the autoencoder")
    g.add_argument("--kl", type=float, default=5e-4, help="weight of the autoencoder's KL term")
    g.add_argument("--limit", type=int, help="learn the first N emoji of the table (default: all)")
    g.add_argument("--precision", choices=("auto", "no", "bf16"), default="auto", help="autocast")
    g.add_argument("--threads", type=int, help="CPU threads")
    g.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    args.bar_seconds = 0.5 if sys.stderr.isatty() else 30
    if len(args.batch) != len(args.minutes):
        p.error(f"--batch has {len(args.batch)} stages, --minutes {len(args.minutes)}: give as many")
    divisor = 2 ** (len(args.vae_channels) + len(args.unet_channels) + len(args.minutes) - 3)
    if args.resolution % divisor:
        p.error(f"--resolution has to be a multiple of {divisor} with these channels and stages")
    if args.text_width % 32:
        p.error("--text-width has to be a multiple of 32")
    if args.variants < 1 or min(args.batch) < 1:
        p.error("--variants and --batch have to be at least 1")
    return args


def pick_precision(wanted: str) -> str:
    """bf16 where the machine is fast at it."""
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    return "bf16" if "AVX512" in torch.backends.cpu.get_cpu_capability() else "no"


def command_line(argv: list[str]) -> str:
    """The command for the model card, without what does not change the model."""
    kept, skip = [], False
    for word in argv:
        if not skip and word not in ("--resume", "--work", "--out"):
            kept.append(word)
        skip = word in ("--work", "--out")
    return " ".join(["python scripts/train_emoji.py", *kept])


def count_parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def make_vae(
    args: argparse.Namespace, accelerator: Accelerator, pixels: torch.Tensor, facts: dict
) -> AutoencoderKL:
    """The trained autoencoder, from its checkpoint when there is one to resume from."""
    vae = build_vae(args.vae_channels, args.resolution).to(accelerator.device)
    checkpoint = args.work / "vae.pt"
    if args.resume and checkpoint.exists():
        state = torch.load(checkpoint, map_location=accelerator.device, weights_only=True)
        load_weights(vae, state["vae"], checkpoint)
        facts.update(state["facts"])
    else:
        facts.update(train_vae(args, accelerator, vae, pixels))
        fold_latent_statistics(vae, encode(vae, pixels))
        torch.save({"vae": vae.state_dict(), "facts": facts}, checkpoint)
    facts["psnr"] = psnr_of(vae, pixels[:256])
    print(f"autoencoder: {facts['psnr']:.1f} dB PSNR", flush=True)
    return vae.eval().requires_grad_(False)


def make_latents(args: argparse.Namespace, vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """The latents of all pictures, from their file when there is one to resume from."""
    file = args.work / "latents.pt"
    scale = 2 ** (len(args.vae_channels) - 1)
    if args.resume and file.exists():
        latents = torch.load(file, weights_only=True)
        if len(latents) == len(pixels) and latents.shape[-1] == pixels.shape[-1] // scale:
            return latents
    latents = encode(vae, pixels)
    torch.save(latents.cpu(), file)
    return latents


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    accelerator = Accelerator(mixed_precision=pick_precision(args.precision))
    torch.set_float32_matmul_precision("high")
    set_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    if not args.resume:  # or a later --resume would go on from a run before this one
        for name in ("vae.pt", "latents.pt", "unet.pt"):
            (args.work / name).unlink(missing_ok=True)

    font = EmojiFont(args.font)
    emoji = emoji_table()[: args.limit]
    shown, held = painted_table(emoji)
    table = emoji + shown
    rng = np.random.default_rng(args.seed)
    pictures = [font.render(e, args.resolution) for e in table]
    pixels = to_tensor(pictures)
    versions = to_tensor([p if k == 0 else jittered(p, rng) for p in pictures for k in range(args.variants)])
    facts: dict = {}
    vae = make_vae(args, accelerator, pixels, facts)
    latents = make_latents(args, vae, versions)

    set_seed(args.seed + 1)  # the same start whether the autoencoder was trained now or loaded
    tokenizer = build_tokenizer([c for e in [*table, *held] for c in e.captions()])
    smallest = latents.shape[-1] // 2 ** (len(args.minutes) - 1)
    parts = Parts(
        tokenizer=tokenizer,
        text_encoder=build_text_encoder(tokenizer, args.text_width, args.text_layers).to(accelerator.device),
        vae=vae,
        unet=build_unet(args.unet_channels, smallest, args.text_width),
        scheduler=build_scheduler(),
    )
    print(
        f"{len(emoji)} emoji, {len(shown)} in other colours, {len(held)} held out; {len(latents)} latents of "
        f"{tuple(latents.shape[1:])}, {len(tokenizer)} tokens; parameters: "
        f"first unet {count_parameters(parts.unet):,}, text {count_parameters(parts.text_encoder):,}, "
        f"vae {count_parameters(vae):,}",
        flush=True,
    )
    done = train_unet(args, accelerator, parts, table, len(emoji), held, latents)
    parts.unet.eval()
    parts.text_encoder.eval()
    save_pipeline(parts, args.out)
    facts.update(
        resolution=args.resolution,
        unet_channels=", ".join(map(str, parts.unet.config.block_out_channels)),
        vae_channels=", ".join(map(str, args.vae_channels)),
        latent=latents.shape[-1],
        scale=args.resolution // latents.shape[-1],
        text_layers=args.text_layers,
        text_width=args.text_width,
        unet_params=count_parameters(parts.unet),
        vae_params=count_parameters(vae),
        text_params=count_parameters(parts.text_encoder),
        font_version=font.version.split(";")[0],
        command=command_line(sys.argv[1:] if argv is None else argv),
        device=torch.cuda.get_device_name()
        if accelerator.device.type == "cuda"
        else f"{torch.get_num_threads()} CPU core(s)",
        seed=args.seed,
        precision="yes" if accelerator.mixed_precision == "bf16" else "no",
        stages=", then ".join(
            f"{steps:,} steps of {batch} ({seconds / 60:.0f} minutes)"
            for (steps, seconds), batch in zip(done, args.batch, strict=True)
        ),
        samples=sum(steps * batch for (steps, _), batch in zip(done, args.batch, strict=True)),
        unet_loss=round(Log(args.work / "unet.csv", append=True).last_loss(), 4),
        count=len(emoji),
        shown=len(shown),
        held=len(held),
        held_names=textwrap.fill(", ".join(e.names[0] for e in held) + ".", 108),
        names=textwrap.fill(", ".join(" / ".join(e.names) for e in emoji) + ".", 108),
    )
    write_card(args.out, emoji, pictures[: len(emoji)], facts)
    size = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file())
    print(f"saved {args.out} ({size:,} bytes); logs and sheets in {args.work}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"train_emoji.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("stopped; go on with --resume")
