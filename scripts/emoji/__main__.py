"""Train the small Stable Diffusion pipeline in ``tomesd/emoji-model`` from nothing.

The model draws emoji from their names ("red apple", "cat face").  It has the parts of every Stable
Diffusion model (CLIP text encoder, attention UNet, KL autoencoder, DDIM sampler), only small, so that the
examples and tests of this package have a real trained model to work on without any download.  Its latents
are 64x64, so the finest level has 4,096 tokens, as many as that of Stable Diffusion 1.5 at 512 pixels.

The pictures come from the Noto Color Emoji font (Debian: ``apt-get install fonts-noto-color-emoji``), the
names from ``names.tsv``.  Single things are also shown in other colours ("purple dog face"); one in five
of these combinations is never shown, to see whether the model puts colour and thing together itself.

    python scripts/emoji                                       # an hour and a half on two CPU cores
    python scripts/emoji --minutes 4,4,10 --batch 512,256,128  # on a GPU

The UNet grows as it learns: first it denoises 16x16 means of the latents, then 32x32, then all of them, each
time with one level more around what it is (``grow.grown``).  What to draw is learnt where a step costs a
twentieth.  An interrupted run goes on where it stopped with ``--resume``.

The loss first falls to a level where pictures have the right colours, and stays there for a while; shapes
come when it falls again.  A run that ends before was too short.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here comes from a hub
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its hints concern parts that are not used here
from tomesd.commands import mend_torchvision

mend_torchvision()  # before anything imports torchvision

import numpy as np  # noqa: E402
import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.utils import set_seed  # noqa: E402
from card import command_line, facts_of, write_card  # noqa: E402
from data import EmojiFont, UserError, emoji_table, jittered, painted_table, to_tensor  # noqa: E402
from grow import Parts, build_scheduler, build_text_encoder, build_tokenizer, build_unet  # noqa: E402
from options import parse_args, pick_precision  # noqa: E402
from train import CaptionSampler, Training, sheet_prompts  # noqa: E402
from vae import make_latents, make_vae  # noqa: E402


def main(argv: list[str]) -> None:
    """Make the pictures, train the autoencoder and then the UNet, and save the pipeline with its card."""
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
    pictures = [font.render(e, args.resolution) for e in emoji + shown]
    rng = np.random.default_rng(args.seed)
    versions = [jittered(p, rng) if k else p for p in pictures for k in range(args.variants)]
    vae, vae_facts = make_vae(args, accelerator, to_tensor(pictures))
    latents = make_latents(args, vae, to_tensor(versions))

    set_seed(args.seed + 1)  # the same start whether the autoencoder was trained now or loaded
    tokenizer = build_tokenizer([c for e in emoji + shown + held for c in e.captions()])
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
        f"first unet {parts.unet.num_parameters():,}, text {parts.text_encoder.num_parameters():,}, "
        f"vae {vae.num_parameters():,}",
        flush=True,
    )
    sampler = CaptionSampler(
        emoji,
        shown,
        tokenizer,
        variants=args.variants,
        painted=args.painted,
        dropout=args.caption_dropout,
    )
    training = Training(args, accelerator, parts, sampler, latents, sheet_prompts(emoji, held))
    training.run()
    parts.save(args.out)
    facts = vae_facts | facts_of(training, emoji, shown, held)
    facts |= dict(font_version=font.version, command=command_line(argv))
    write_card(args.out, emoji, pictures[: len(emoji)], facts)
    size = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file())
    print(f"saved {args.out} ({size:,} bytes); logs and sheets in {args.work}", flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"emoji: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; go on with --resume", file=sys.stderr)
        sys.exit(130)
