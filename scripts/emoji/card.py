"""What is said and shown of the trained model: its card, the names that it knows, and a picture of each."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

import torch
from data import Emoji
from diffusers.utils import make_image_grid
from PIL import Image
from train import Training

TEMPLATE = Path(__file__).with_name("card.md")
ATLAS_COLUMNS, ATLAS_CELL = 20, 64  # of names.png, in pictures and in pixels


def command_line(argv: list[str]) -> str:
    """The command for the model card, without what does not change the model."""
    kept, skip = [], False
    for word in argv:
        if not skip and word not in ("--resume", "--work", "--out"):
            kept.append(word)
        skip = word in ("--work", "--out")
    return " ".join(["python scripts/emoji", *kept])


def facts_of(training: Training, emoji: list[Emoji], shown: list[Emoji], held: list[Emoji]) -> dict[str, Any]:
    """What the card says of a training of UNet and text encoder."""
    args, parts, latent = training.args, training.parts, training.latents.shape[-1]
    device = training.accelerator.device
    stages = [
        (steps, batch, seconds) for (steps, seconds), batch in zip(training.done, args.batch, strict=True)
    ]
    return dict(
        resolution=args.resolution,
        unet_channels=", ".join(map(str, parts.unet.config.block_out_channels)),
        vae_channels=", ".join(map(str, args.vae_channels)),
        latent=latent,
        scale=args.resolution // latent,
        text_layers=args.text_layers,
        text_width=args.text_width,
        unet_params=parts.unet.num_parameters(),
        vae_params=parts.vae.num_parameters(),
        text_params=parts.text_encoder.num_parameters(),
        device=torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.get_num_threads()} CPU core(s)",
        seed=args.seed,
        precision="yes" if training.accelerator.mixed_precision == "bf16" else "no",
        stages=", then ".join(f"{n:,} steps of {b} ({s / 60:.0f} minutes)" for n, b, s in stages),
        samples=sum(steps * batch for steps, batch, _ in stages),
        unet_loss=round(training.log.last_loss(), 4),
        count=len(emoji),
        shown=len(shown),
        held=len(held),
        held_names=textwrap.fill(", ".join(e.names[0] for e in held) + ".", 108),
        names=textwrap.fill(", ".join(" / ".join(e.names) for e in emoji) + ".", 108),
    )


def write_card(folder: Path, emoji: list[Emoji], pictures: list[Image.Image], facts: dict[str, Any]) -> None:
    """README.md for people; names.txt and names.png, what each name looks like, for examples and benches."""
    card = TEMPLATE.read_text(encoding="utf-8").format(**facts)
    (folder / "README.md").write_text(card, encoding="utf-8")
    lines = (" / ".join(e.names) + "\n" for e in emoji)
    (folder / "names.txt").write_text("".join(lines), encoding="utf-8")
    cell = (ATLAS_CELL, ATLAS_CELL)
    small = [picture.resize(cell, Image.Resampling.LANCZOS) for picture in pictures]
    blank = [Image.new("RGB", cell, "white")] * (-len(small) % ATLAS_COLUMNS)
    atlas = make_image_grid([*small, *blank], math.ceil(len(small) / ATLAS_COLUMNS), ATLAS_COLUMNS)
    atlas.quantize(256, dither=Image.Dither.NONE).save(folder / "names.png", optimize=True)
