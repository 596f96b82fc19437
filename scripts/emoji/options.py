"""The options of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")

Number = TypeVar("Number", int, float)


def numbers(kind: Callable[[str], Number]) -> Callable[[str], list[Number]]:
    """Numbers with commas between them."""

    def parse(text: str) -> list[Number]:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 8,4,4") from None

    return parse


def channels(text: str) -> list[int]:
    """ "32,64" as numbers; group normalisation has 16 groups, hence the multiples."""
    widths = numbers(int)(text)
    if any(width <= 0 or width % 16 for width in widths):
        raise argparse.ArgumentTypeError(f"{text!r}: channels have to be multiples of 16")
    return widths


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, checked against each other."""
    p = argparse.ArgumentParser(
        prog="emoji",
        description="Train the small Stable Diffusion pipeline in tomesd/emoji-model from nothing.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    g = p.add_argument_group("files")
    g.add_argument("--font", type=Path, default=DEFAULT_FONT, help="NotoColorEmoji.ttf with bitmap glyphs")
    g.add_argument("--out", type=Path, default=ROOT / "tomesd" / "emoji-model", help="folder of the model")
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
