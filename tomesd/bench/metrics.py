"""How far pictures are from others. Pictures are `[n, height, width, 3]`, uint8."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import dinov2, peers

Pictures = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

# PSNR of pictures that are equal, in dB. One of 512 x 512 pixels that differs in one value by 1 has 107.
EQUAL = 120.0
# What DINOv2 is given: pictures of this side, scaled as those that it was trained on.
SIDE, MEAN, STD = 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Side of a picture in an atlas, in pixels.
CELL = 64
# How many of the nearest references may be the right one.
FIRST = (1, 5)
# The file that torchvision downloads for the backbone of LPIPS.
ALEXNET = "alexnet-*.pth"


class Missing(RuntimeError):
    """A measure that cannot be had here; says why."""


def psnr(pictures: Pictures, plain: Pictures) -> Floats:
    """dB, of each picture; `EQUAL` at most."""
    import skimage.metrics

    level: Any = skimage.metrics.peak_signal_noise_ratio
    pairs = zip(pictures, plain, strict=True)
    levels = [EQUAL if np.array_equal(a, b) else level(b, a) for a, b in pairs]
    return np.minimum(levels, EQUAL)


def ssim(pictures: Pictures, plain: Pictures) -> Floats:
    """Structural similarity of each picture, 1 for equal ones."""
    import skimage.metrics

    similarity: Any = skimage.metrics.structural_similarity
    pairs = zip(pictures, plain, strict=True)
    return np.array([similarity(b, a, channel_axis=2) for a, b in pairs])


def unit(pictures: Pictures, device: str) -> Tensor:
    """`[n, 3, height, width]` in 0..1."""
    return torch.tensor(pictures, device=device).permute(0, 3, 1, 2) / 255


class Lpips:
    """LPIPS (Zhang et al., 2018) with AlexNet, through torchmetrics; nothing is downloaded for it.

    Raises:
        Missing: there is no torchmetrics, or the weights of AlexNet are not where torch keeps what it loads.
    """

    def __init__(self, device: str) -> None:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        try:
            from torchmetrics.image.lpip import (  # type: ignore[import-not-found]
                LearnedPerceptualImagePatchSimilarity,
            )

            if not list(folder.glob(ALEXNET)):
                raise Missing(f"torchvision's weights of AlexNet are not in {folder}")
            metric = LearnedPerceptualImagePatchSimilarity("alex", normalize=True)
        except (ImportError, RuntimeError) as error:
            raise Missing(str(error)) from error
        self.device = device
        self.metric: Any = metric.eval().to(device)

    @torch.no_grad()
    def __call__(self, pictures: Pictures, plain: Pictures) -> Floats:
        """The distance of each picture, 0 for equal ones."""
        pairs = zip(unit(pictures, self.device), unit(plain, self.device), strict=True)
        return np.array([float(self.metric(a[None], b[None])) for a, b in pairs])


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
        if not file.exists():
            made = [self.tokens(pictures[i : i + 16]).numpy() for i in range(0, len(pictures), 16)]
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(".partial.npy")
            np.save(part, np.concatenate(made))
            part.rename(file)
        features: Floats = np.load(file)
        return features

    @torch.no_grad()
    def tokens(self, pictures: Pictures) -> Tensor:
        x = unit(pictures, self.device)
        x = F.interpolate(x, size=(SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (MEAN, STD))
        tokens: Tensor = self.model((x - mean) / std).last_hidden_state[:, 0]
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


def nearest(features: Floats, references: Floats, own: list[int], first: int) -> float:
    """Share of the features whose own reference is among the `first` nearest of all by cosine."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (features, references))
    order = np.argsort(-(a @ b.T), axis=1)[:, :first]
    return float((order == np.array(own)[:, None]).any(1).mean())


def shapes(pictures: Pictures) -> Floats:
    """Colours on 16 x 16 squares, as they differ from white, which names go by as well: `[n, 768]`."""
    small = F.interpolate(unit(pictures, "cpu"), size=(16, 16), mode="area")
    return np.asarray((1 - small).flatten(1), np.float64) + 1e-9  # a white picture has no direction


def read_names(folder: Path) -> list[list[str]]:
    """What a model can draw, by its `names.txt`: a line for each thing, its names apart by " / "."""
    text = (folder / "names.txt").read_text(encoding="utf-8")
    return [line.strip().split(" / ") for line in text.splitlines() if line.strip()]


def read_atlas(folder: Path, things: int) -> Pictures:
    """The things of `names.txt` as `names.png` shows them, row by row: `[things, CELL, CELL, 3]`.

    Raises:
        Missing: there is no such picture, or it has no room for them.
    """
    from PIL import Image

    file = folder / "names.png"
    if not file.is_file():
        raise Missing(f"{folder} has no names.png, the pictures that belong to names.txt")
    with Image.open(file) as image:
        atlas = np.asarray(image.convert("RGB"))
    rows, columns = atlas.shape[0] // CELL, atlas.shape[1] // CELL
    if rows * columns < things:
        raise Missing(f"{file} has {rows * columns} cells of {CELL} pixels, names.txt {things} lines")
    cells = atlas[: rows * CELL, : columns * CELL].reshape(rows, CELL, columns, CELL, 3).swapaxes(1, 2)
    return cells.reshape(-1, CELL, CELL, 3)[:things]


class Measures:
    """How far pictures are from plain ones, by all that can be had here; `missing` says of the rest why not.

    Args:
        device: where to compute.
        kept: the folder for class tokens.
        model: the folder of the model that draws, which may hold references.
        prompts: of all pictures that there will be.
    """

    def __init__(self, device: str, kept: Path, model: Path, prompts: list[str]) -> None:
        self.missing: dict[str, str] = {}
        self.lpips: Lpips | None = None
        self.dino: Dino | None = None
        self.references: dict[str, Floats] = {}  # by the column that they are for
        self.shown: list[int] = []  # pictures of things that have a reference
        self.own: list[int] = []  # and these references
        with self.without("lpips"):
            self.lpips = Lpips(device)
        names, shapes = ([f"{name}_top{first}" for first in FIRST] for name in ("name", "shape"))
        with self.without("dinov2_cosine", "fd_dinov2", *names):
            self.dino = Dino(device, kept)
        with self.without(*names, *shapes):
            self.read(model, prompts)

    @contextlib.contextmanager
    def without(self, *columns: str) -> Iterator[None]:
        try:
            yield
        except Missing as why:
            self.missing.update(dict.fromkeys(columns, str(why)))

    def read(self, folder: Path, prompts: list[str]) -> None:
        """Reads the references of a model, if its folder has some."""
        if not (folder / "names.txt").is_file():
            raise Missing(f"{folder} has no names.txt")
        things = read_names(folder)
        atlas = read_atlas(folder, len(things))
        where = {name: i for i, names in enumerate(things) for name in names}
        self.shown = [i for i, prompt in enumerate(prompts) if prompt in where]
        self.own = [where[prompts[i]] for i in self.shown]
        if not self.own:
            raise Missing("no prompt is a name of names.txt")
        self.references["shape"] = shapes(atlas)
        if self.dino is not None:
            self.references["name"] = self.dino(atlas)

    def __call__(self, pictures: Pictures, plain: Pictures | None) -> dict[str, float | None]:
        """The figures of pictures; without plain ones, only those that need none."""
        row: dict[str, float | None] = {}
        features = None if self.dino is None else self.dino(pictures)
        if plain is not None:
            row["psnr_db"] = float(psnr(pictures, plain).mean())
            row["ssim"] = float(ssim(pictures, plain).mean())
            if self.lpips is not None:
                row["lpips"] = float(self.lpips(pictures, plain).mean())
            if self.dino is not None and features is not None:
                others = self.dino(plain)
                row["dinov2_cosine"] = float(cosine(features, others).mean())
                row["fd_dinov2"] = frechet(features, others)
        for name, references in self.references.items():
            own = shapes(pictures) if name == "shape" else features
            assert own is not None
            for first in FIRST:
                row[f"{name}_top{first}"] = nearest(own[self.shown], references, self.own, first)
        return row
