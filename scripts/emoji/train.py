"""Trains the UNet and the text encoder, stage by stage, and draws a sheet of pictures after each."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from data import Emoji, UserError
from diffusers import StableDiffusionPipeline
from grow import Parts, grown, tokenize
from loop import Log, Loop, load_weights
from PIL import Image, ImageDraw
from transformers import CLIPTokenizer

DRAWN_AT_ONCE = 12
HELD_ON_SHEET = 6


class CaptionSampler:
    """Draws pictures in shuffled rounds, each with one of its captions, or with none.

    A share ``painted`` of each batch is drawn from ``shown``, which are in other colours. Pictures are
    numbered as in ``emoji + shown``, with ``variants`` of each side by side.
    """

    def __init__(
        self,
        emoji: list[Emoji],
        shown: list[Emoji],
        tokenizer: CLIPTokenizer,
        *,
        variants: int,
        painted: float,
        dropout: float,
    ) -> None:
        self.ids = [tokenize(tokenizer, e.captions()) for e in emoji + shown]
        self.empty = tokenize(tokenizer, [""])[0]
        self.plain, self.variants = len(emoji), variants
        self.painted, self.dropout = painted, dropout
        self._queue = torch.empty(0, dtype=torch.long)

    def __call__(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers of pictures, and token ids of a caption of each."""
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


class Training:
    """The training of UNet and text encoder, which ``run`` goes through or on with."""

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        parts: Parts,
        sampler: CaptionSampler,
        latents: torch.Tensor,
        prompts: list[str],
    ) -> None:
        self.args, self.accelerator, self.parts = args, accelerator, parts
        self.sampler, self.latents, self.prompts = sampler, latents, prompts
        self.checkpoint: Path = args.work / "unet.pt"
        self.done: list[tuple[int, float]] = []  # steps and seconds of each stage

    def run(self) -> None:
        """All stages, from the checkpoint if there is one to be resumed."""
        stages = len(self.args.minutes)
        state = None
        if self.args.resume and self.checkpoint.exists():
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            if state["stages"] != stages:
                raise UserError(
                    f"{self.checkpoint} is of {state['stages']} stages: give --minutes for as many"
                )
            self.done = state["done"]
        self.log = Log(self.args.work / "unet.csv", append=state is not None)
        for stage in range(stages):
            if stage > 0:
                self.parts.unet = grown(self.parts.unet.cpu())
            if stage >= len(self.done):
                self.parts.unet.to(self.accelerator.device)
                self.done.append(self._run_stage(stage, state))
                state = None

    def _run_stage(self, stage: int, state: dict[str, Any] | None) -> tuple[int, float]:
        """Train on means of the latents, as small as the UNet of this stage. Gives steps and seconds."""
        args, parts, device = self.args, self.parts, self.accelerator.device
        shrink = self.latents.shape[-1] // parts.unet.config.sample_size
        batch = args.batch[stage]
        unet, text = self.accelerator.prepare(parts.unet, parts.text_encoder)
        unet.train()
        text.train()
        loop = Loop(
            self.accelerator,
            [*unet.parameters(), *text.parameters()],
            minutes=args.minutes[stage],
            peak_rate=args.lr * args.lr_decay**stage,
            weight_decay=1e-3,
            ema_decay=args.ema,
        )
        if state:
            load_weights(parts.unet, state["unet"], self.checkpoint)
            load_weights(parts.text_encoder, state["text"], self.checkpoint)
            loop.restore(state)
            step, seconds = loop.clock.step, loop.clock.seconds
            print(f"resumed at step {step} of stage {stage + 1}, after {seconds:.0f} s", flush=True)
        alphas = parts.scheduler.alphas_cumprod.to(device)
        latents = F.avg_pool2d(self.latents, shrink).to(device)
        next_save = loop.clock.seconds + 60 * args.save_minutes

        def losses_of_step() -> dict[str, torch.Tensor]:
            which, ids = self.sampler(batch)
            x0 = latents[which.to(device)]
            noise = torch.randn_like(x0) / shrink  # the mean of shrink x shrink values of the full size
            # one time per slice of the range in every batch: the same loss with less variance
            t = ((torch.arange(batch) + torch.rand(batch)) / batch * len(alphas)).long().to(device)
            noisy = parts.scheduler.add_noise(x0, noise, t)
            target = parts.scheduler.get_velocity(x0, noise, t)
            with self.accelerator.autocast():
                v = unet(noisy, t, text(ids.to(device)).last_hidden_state).sample
            errors = (v.float() - target).square().mean((1, 2, 3))
            return {"loss": (errors * loss_weight(alphas, t)).mean()}

        def save_if_due() -> None:
            nonlocal next_save
            if loop.clock.seconds > next_save or loop.clock.progress >= 1:
                next_save = loop.clock.seconds + 60 * args.save_minutes
                self._save(loop)

        loop.run(
            losses_of_step,
            self.log,
            name=f"UNet {latents.shape[-1]}x{latents.shape[-1]}",
            log_every=10,
            smoothing=0.97,
            after_step=save_if_due,
        )
        unet.eval()
        text.eval()
        draw_sheet(
            parts.pipeline(), self.prompts, args.work / f"sheet-{stage + 1}.png", self.accelerator, shrink
        )
        return loop.clock.step, loop.clock.seconds

    def _save(self, loop: Loop) -> None:
        """Write a checkpoint to go on from, whole or not at all."""
        state = {
            "unet": self.parts.unet.state_dict(),
            "text": self.parts.text_encoder.state_dict(),
            **loop.state(),
            "done": self.done,
            "stages": len(self.args.minutes),
        }
        unfinished = self.checkpoint.with_suffix(".tmp")
        torch.save(state, unfinished)
        unfinished.replace(self.checkpoint)


def sheet_prompts(emoji: list[Emoji], held: list[Emoji], count: int = 36) -> list[str]:
    """Names from all over the table, and the last few from the combinations that are never shown."""
    few = min(HELD_ON_SHEET, len(held))
    plain = emoji[:: max(1, len(emoji) // (count - few))][: count - few]
    never_shown = held[:: max(1, len(held) // HELD_ON_SHEET)][:few]
    return [e.names[0] for e in plain + never_shown]


def draw(
    pipe: StableDiffusionPipeline, prompts: list[str], accelerator: Accelerator, shrink: int
) -> list[Image.Image]:
    """One picture per prompt, of latents shrunk as in this stage; the same noise every time."""
    pictures: list[Image.Image] = []
    shape = (1, pipe.unet.config.in_channels, *2 * [pipe.unet.config.sample_size])
    for i in range(0, len(prompts), DRAWN_AT_ONCE):
        part = prompts[i : i + DRAWN_AT_ONCE]
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(i + k)) for k in range(len(part))]
        latents = (torch.cat(noise) / shrink).to(accelerator.device)
        with accelerator.autocast():
            pictures += pipe(part, num_inference_steps=20, guidance_scale=3.0, latents=latents).images
    return pictures


def draw_sheet(
    pipe: StableDiffusionPipeline, prompts: list[str], path: Path, accelerator: Accelerator, shrink: int
) -> None:
    """A grid of pictures with their prompts under them."""
    pictures = draw(pipe, prompts, accelerator, shrink)
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
