"""What the training of the autoencoder and of the UNet share: a clock, a log, and steps on a loss."""

from __future__ import annotations

import csv
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from data import UserError
from torch import nn
from tqdm.auto import tqdm


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

    def __init__(self, params: list[nn.Parameter], decay: float) -> None:
        self.params, self.decay = params, decay
        self.mean = [p.detach().clone() for p in params]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.mean, self.params, 1 - decay)

    @torch.no_grad()
    def copy_to_params(self) -> None:
        """Let the mean take the place of the weights."""
        torch._foreach_copy_(self.params, self.mean)


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


class Loop:
    """Steps of AdamW on a loss until the time is over. The parameters end as their running means."""

    def __init__(
        self,
        accelerator: Accelerator,
        params: list[nn.Parameter],
        *,
        minutes: float,
        peak_rate: float,
        weight_decay: float,
        ema_decay: float,
    ) -> None:
        self.accelerator, self.params, self.peak_rate = accelerator, params, peak_rate
        self.optimizer = torch.optim.AdamW(
            params, lr=peak_rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
        )
        self.ema = Ema(params, ema_decay)
        self.clock = Clock(minutes)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs besides the weights."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.mean,
            "step": self.clock.step,
            "seconds": self.clock.seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state()`` in a checkpoint."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.mean = [m.to(self.accelerator.device) for m in state["ema"]]
        self.clock = Clock(self.clock.minutes, state["seconds"], state["step"])

    def run(
        self,
        losses_of_step: Callable[[], dict[str, torch.Tensor]],
        log: Log,
        *,
        name: str,
        log_every: int,
        smoothing: float,
        after_step: Callable[[], None] = lambda: None,
    ) -> float:
        """Minimise the ``loss`` of every step, and give its running mean. Other losses are only shown."""
        clock, mean_loss = self.clock, 0.0
        start = int(100 * clock.progress)
        pause = 0.5 if sys.stderr.isatty() else 30  # a file keeps every state of the bar
        bar = tqdm(total=100, desc=name, unit="%", mininterval=pause, initial=start)
        while clock.progress < 1:
            rate = self.peak_rate * clock.rate()
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            losses = losses_of_step()
            self.accelerator.backward(losses["loss"])
            self.accelerator.clip_grad_norm_(self.params, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            clock.step += 1
            self.ema.update(clock.step)
            if clock.step % log_every == 0:
                shown = {key: value.item() for key, value in losses.items()}
                loss = shown["loss"]
                log.write(clock.step, clock.seconds, rate, loss)
                mean_loss = smoothing * mean_loss + (1 - smoothing) * loss if mean_loss else loss
                shown["loss"] = mean_loss
                bar.set_postfix(step=clock.step, refresh=False, **{k: f"{v:.4f}" for k, v in shown.items()})
            bar.update(int(100 * clock.progress) - bar.n)
            after_step()
        bar.close()
        self.ema.copy_to_params()
        return mean_loss


def load_weights(module: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Load the weights of a checkpoint, which has to be of a model with the same options."""
    try:
        module.load_state_dict(weights)
    except RuntimeError:
        raise UserError(
            f"{path} is of a model with other options: give the same ones, or another --work"
        ) from None
