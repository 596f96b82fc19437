"""How far pictures are from others. Pictures are `[n, height, width, 3]`, uint8."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import Lazy, UserError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Pictures: TypeAlias = npt.NDArray[np.uint8]
    Floats: TypeAlias = npt.NDArray[np.float64]
else:
    np, Pictures, Floats = Lazy("numpy"), Any, Any

# PSNR of pictures that are equal, in dB. One of 512 x 512 pixels that differs in one value by 1 has 107.
EQUAL = 120.0
# Side of a picture in an atlas, in pixels.
CELL = 64
# How many of the nearest references may be the right one.
FIRST = (1, 5)
# The file that torchvision downloads for the backbone of LPIPS.
ALEXNET = "alexnet-*.pth"


# From pictures and the plain ones to a figure for each column; without plain ones, columns that need them are
# left out.
Measure = Callable[[Pictures, Pictures | None], dict[str, float | None]]


class Missing(RuntimeError):
    """A metric that cannot be had here; says why."""


@dataclass(frozen=True)
class Task:
    """What metrics may depend on.

    Args:
        device: where to compute.
        cache: a folder to keep what is slow to compute.
        model: the folder of the model that draws, which may hold references.
        prompts: of all pictures that there will be.
    """

    device: str
    cache: Path
    model: Path
    prompts: list[str]


@dataclass(frozen=True)
class Metric:
    """Columns of the table, with how their figures are written.

    Args:
        columns: their names and formats.
        make: gives what computes them; raises Missing where they cannot be had.
        axes: how plots call those that are worth one.
    """

    columns: dict[str, str]
    make: Callable[[Task], Measure]
    axes: dict[str, str]


def psnr(pictures: Pictures, plain: Pictures) -> Floats:
    """dB, of each picture; `EQUAL` at most."""
    errors = [
        np.square(np.subtract(a, b, dtype=np.float64)).mean() for a, b in zip(pictures, plain, strict=True)
    ]
    with np.errstate(divide="ignore"):
        decibel: Floats = np.minimum(10 * np.log10(255**2 / np.array(errors)), EQUAL)
    return decibel


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
            lpip: Any = importlib.import_module("torchmetrics.image.lpip")
            if not list(folder.glob(ALEXNET)):
                raise Missing(f"torchvision's weights of AlexNet are not in {folder}")
            metric = lpip.LearnedPerceptualImagePatchSimilarity("alex", normalize=True)
        except (ImportError, RuntimeError) as error:
            raise Missing(str(error)) from error
        self.device = device
        self.metric: Any = metric.eval().to(device)

    @torch.no_grad()
    def __call__(self, pictures: Pictures, plain: Pictures) -> Floats:
        """The distance of each picture, 0 for equal ones."""
        pairs = zip(unit(pictures, self.device), unit(plain, self.device), strict=True)
        return np.array([float(self.metric(a[None], b[None])) for a, b in pairs])


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


def own_prompts(model: str) -> list[str]:
    """All that a model can draw; a UserError if it has no `names.txt`."""
    if not (Path(model) / "names.txt").is_file():
        raise UserError(f"{model} has no names.txt to take prompts from: give a --prompts-file")
    return [names[0] for names in read_names(Path(model))]


def check_enough(wanted: int, prompts: list[str]) -> None:
    """Raises a UserError if there are fewer prompts than `--prompts` says."""
    if wanted > len(prompts):
        raise UserError(f"argument --prompts: {wanted}, where there are {len(prompts)} to take from")


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
    cells: Pictures = atlas[: rows * CELL, : columns * CELL].reshape(rows, CELL, columns, CELL, 3)
    cells = cells.swapaxes(1, 2).reshape(-1, CELL, CELL, 3)
    return cells[:things]


class References:
    """Pictures of what the model can draw, if its folder has some, and who is to be compared with whom.

    Raises:
        Missing: there are none for these prompts.
    """

    def __init__(self, task: Task) -> None:
        if not (task.model / "names.txt").is_file():
            raise Missing(f"{task.model} has no names.txt")
        things = read_names(task.model)
        self.pictures = read_atlas(task.model, len(things))
        where = {name: i for i, names in enumerate(things) for name in names}
        self.shown = [i for i, prompt in enumerate(task.prompts) if prompt in where]
        self.own = [where[task.prompts[i]] for i in self.shown]
        if not self.own:
            raise Missing("no prompt is a name of names.txt")

    def hits(self, name: str, features: Floats, references: Floats) -> dict[str, float | None]:
        """For how many of all pictures the nearest references hold their own."""
        return {
            f"{name}_top{first}": nearest(features[self.shown], references, self.own, first)
            for first in FIRST
        }


def measure_pixels(pictures: Pictures, plain: Pictures | None) -> dict[str, float | None]:
    if plain is None:
        return {}
    return {"psnr_db": float(psnr(pictures, plain).mean()), "ssim": float(ssim(pictures, plain).mean())}


def measure_lpips(task: Task) -> Measure:
    lpips = Lpips(task.device)
    return lambda pictures, plain: {} if plain is None else {"lpips": float(lpips(pictures, plain).mean())}


def measure_shapes(task: Task) -> Measure:
    references = References(task)
    known = shapes(references.pictures)
    return lambda pictures, plain: references.hits("shape", shapes(pictures), known)


METRICS = (
    Metric(
        {"psnr_db": ".2f", "ssim": ".4f"},
        lambda task: measure_pixels,
        {"psnr_db": "PSNR, dB", "ssim": "SSIM"},
    ),
    Metric({"lpips": ".4f"}, measure_lpips, {"lpips": "LPIPS"}),
    Metric({"shape_top1": ".3f", "shape_top5": ".3f"}, measure_shapes, {}),
)
