"""`tomesd quality`, with the rivals, and with these columns by real DINOv2 ViT-S/14 weights:

dinov2_cosine   of class tokens: same thing, or another?
fd_dinov2       Frechet distance of these tokens, all pictures of a point against all plain ones (Stein et
                al., 2023). Of fewer than thousands of pictures it ranks the points and no more
name_top1, 5    share of pictures whose own reference is the nearest, among the 5 nearest, by these tokens, if
                the folder of the model has references: names.png, and names.txt for them
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import dinov2
import numpy as np
import peers
import rivals
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tomesd.commands import quality
from tomesd.commands.common import kept, whole
from tomesd.commands.metrics import (
    METRICS,
    Floats,
    Measure,
    Metric,
    Missing,
    Pictures,
    References,
    Task,
    unit,
)

# The side of the pictures that DINOv2 is given.
SIDE = 224


class Dino:
    """Class tokens of DINOv2 ViT-S/14, kept in a folder by the pictures that they are of.

    Raises:
        Missing: onnx, transformers or the weights cannot be had.
    """

    def __init__(self, device: str, folder: Path) -> None:
        try:
            self.model: nn.Module = dinov2.transformers_model().to(device)
        except (ImportError, OSError, RuntimeError, peers.Unavailable) as error:
            raise Missing(str(error).splitlines()[0]) from error
        self.device, self.folder = device, folder

    def __call__(self, pictures: Pictures) -> Floats:
        """`[n, width]`"""
        about = f"{pictures.shape} {SIDE}".encode() + pictures.tobytes()
        file = self.folder / f"{hashlib.sha256(about).hexdigest()[:16]}.npy"
        features: Floats | None = kept(file, np.load)
        if features is None:
            made = [self.tokens(pictures[i : i + 16]).numpy() for i in range(0, len(pictures), 16)]
            features = np.concatenate(made)
            with whole(file) as part:
                np.save(part, features)
        return features

    @torch.no_grad()
    def tokens(self, pictures: Pictures) -> Tensor:
        x = unit(pictures, self.device)
        x = F.interpolate(x, size=(SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)
        tokens: Tensor = self.model(dinov2.normalised(x)).last_hidden_state[:, 0]
        return tokens.double().cpu()


def cosine(features: Floats, others: Floats) -> Floats:
    """Of each with its own: `[n]`."""
    products = np.multiply(features, others).sum(1)
    return np.asarray(products / np.linalg.norm(features, axis=1) / np.linalg.norm(others, axis=1))


def frechet(features: Floats, others: Floats) -> float | None:
    """Frechet distance of the normal distributions that have their means and covariances; None of one each.

    Source: Dowson and Landau, 1982; on features of DINOv2: Stein et al., 2023.
    """
    if min(len(features), len(others)) < 2:
        return None
    # Each root r has r.T @ r = covariance, and the trace of the root of a product of two such is the sum of
    # the singular values of r @ s.T: exact for any number of pictures, without a root of a singular matrix.
    x, y = map(torch.from_numpy, (features, others))
    r, s = (torch.linalg.qr((z - z.mean(0)) / (len(z) - 1) ** 0.5, mode="r").R for z in (x, y))
    means = (x.mean(0) - y.mean(0)).square().sum()
    spread = r.square().sum() + s.square().sum() - 2 * torch.linalg.svdvals(r @ s.mT).sum()
    return max(0.0, float(means + spread))  # of equal ones rounding may leave less than 0


def measure_distance(task: Task) -> Measure:
    dino = Dino(task.device, task.cache / "dinov2")

    def measure(pictures: Pictures, plain: Pictures | None) -> dict[str, float | None]:
        if plain is None:
            return {}
        features, others = dino(pictures), dino(plain)
        distance = frechet(features, others)
        return {"dinov2_cosine": float(cosine(features, others).mean()), "fd_dinov2": distance}

    return measure


def measure_names(task: Task) -> Measure:
    dino, references = Dino(task.device, task.cache / "dinov2"), References(task)
    known = dino(references.pictures)
    return lambda pictures, plain: references.hits("name", dino(pictures), known)


DINOV2 = (
    Metric(
        {"dinov2_cosine": ".4f", "fd_dinov2": ".1f"},
        measure_distance,
        {"dinov2_cosine": "cosine of DINOv2", "fd_dinov2": "FD-DINOv2"},
    ),
    Metric({"name_top1": ".3f", "name_top5": ".3f"}, measure_names, {}),
)
COMPARISON = quality.Comparison(rivals.ALL, (*METRICS, *DINOV2))


def main(arguments: Sequence[str] | None = None) -> int:
    return quality.main(arguments, "python scripts/bench quality", COMPARISON)


if __name__ == "__main__":
    sys.exit(main())
