"""Trains the autoencoder, and turns pictures into latents."""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL
from grow import build_vae
from loop import Log, Loop, load_weights


def to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels in the range -1..1 that diffusers' models use."""
    return pixels.float() / 127.5 - 1


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
) -> dict[str, Any]:
    """Train the autoencoder on crops of the pictures; gives what the model card says of it."""
    accelerator.prepare(vae.to(memory_format=torch.channels_last))
    loop = Loop(
        accelerator,
        list(vae.parameters()),
        minutes=args.vae_minutes,
        peak_rate=args.vae_lr,
        weight_decay=1e-4,
        ema_decay=0.995,
    )
    size = min(64, args.resolution)

    def losses_of_step() -> dict[str, torch.Tensor]:
        x = random_crops(pixels, args.vae_batch, size)
        x = x.to(accelerator.device, memory_format=torch.channels_last)
        with accelerator.autocast():
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        y = y.float()
        error = F.l1_loss(y, x) + 0.1 * F.mse_loss(y, x) + 0.5 * gradient_loss(y, x)
        mean, var, logvar = posterior.mean.float(), posterior.var.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + var - 1 - logvar).mean()
        return {"loss": error + args.kl * kl, "kl": kl}

    mean_loss = loop.run(
        losses_of_step,
        Log(args.work / "vae.csv", append=False),
        name="autoencoder",
        log_every=20,
        smoothing=0.9,
    )
    return {
        "vae_resolution": args.resolution,
        "vae_steps": loop.clock.step,
        "vae_seconds": round(loop.clock.seconds),
        "vae_loss": round(mean_loss, 4),
    }


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """The mean latents of the pictures, in full precision."""
    return torch.cat(
        [vae.encode(to_unit(p).to(vae.device)).latent_dist.mean.float() for p in pixels.split(32)]
    )


@torch.no_grad()
def fold_latent_statistics(vae: AutoencoderKL, latents: torch.Tensor) -> None:
    """Give the latents mean 0 and standard deviation 1 per channel, inside the autoencoder's weights.

    The pipeline can only scale all latents by one number (``scaling_factor``). The 1x1 convolutions at both
    ends of the latents can do the whole normalisation.
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
    errors = []
    for p in pixels.split(16):
        x = to_unit(p).to(vae.device)
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        errors.append((x - y).square().mean((1, 2, 3)).cpu() / 4)
    return (-10 * torch.cat(errors).log10()).mean().item()


def make_vae(
    args: argparse.Namespace, accelerator: Accelerator, pixels: torch.Tensor
) -> tuple[AutoencoderKL, dict[str, Any]]:
    """The trained autoencoder and what the model card says of it, from a checkpoint with ``--resume``."""
    vae = build_vae(args.vae_channels, args.resolution).to(accelerator.device)
    checkpoint = args.work / "vae.pt"
    if args.resume and checkpoint.exists():
        state = torch.load(checkpoint, map_location=accelerator.device, weights_only=True)
        load_weights(vae, state["vae"], checkpoint)
        facts = state["facts"]
    else:
        facts = train_vae(args, accelerator, vae, pixels)
        fold_latent_statistics(vae, encode(vae, pixels))
        torch.save({"vae": vae.state_dict(), "facts": facts}, checkpoint)
    facts["psnr"] = psnr_of(vae, pixels[:256])
    print(f"autoencoder: {facts['psnr']:.1f} dB PSNR", flush=True)
    return vae.eval().requires_grad_(False), facts


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
