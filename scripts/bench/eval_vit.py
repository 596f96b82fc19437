"""What does merging cost a vision transformer in accuracy? Real DINOv2 ViT-S/14 weights on Fashion-MNIST.

    python scripts/bench eval-vit --csv eval.csv --plot eval.png             timm, half an hour on one core
    python scripts/bench eval-vit --backend timm transformers --r 0 3 5:-1    a few settings, both hosts
    python scripts/bench eval-vit --test 2000                                 a quick look
    python scripts/bench eval-vit --r tune:0.49 tune:0.45                     schedules that tome.tune finds
    python scripts/bench eval-vit --ways ours ToMe PiToMe ATM DiffRate        timm, beside what others match

A linear probe is trained once, on features of the plain model, and then used with merging: nothing is trained
for it. `probe` and `knn` (20 nearest by cosine among the plain training features) are accuracies in per cent,
`cosine` compares the merged class token with the plain one. `tokens` is the sum over layers of the tokens in
the second half of a block, `flops` the estimated operations relative to plain. Features are kept in
.cache/eval-vit, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import dinov2
import matchers
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import tomesd
import tomesd.vit as tome
from tomesd.commands.common import (
    ROOT,
    Parser,
    guarded,
    kept,
    new_file,
    positive,
    timed,
    whole,
    write_csv,
)
from tomesd.commands.pipelines import pick_device
from tomesd.commands.plot import new_picture

PROGRAM = "python scripts/bench eval-vit"
CACHE = ROOT / ".cache"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CLASSES = 10

# Name -> options of tome.apply_patch.
TOME = {"metric": "keys", "mode": "mean"}
WAYS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ToMe": TOME,
    "tokens, mean": {"mode": "mean"},
    "keys, mlerp": {"metric": "keys"},
    "no proportional attention": {"prop_attn": False},
}
# Whose tokens merge in a way of `matchers`; their means are weighed as ToMe's.
MATCHED = {"PiToMe": "energy", "ATM": "sizes", "DiffRate": "attention"}
WAYS |= dict.fromkeys(MATCHED, TOME)
R = int | tuple[int, float] | list[int] | tome.Schedule
# So many pictures, without their classes, are tuned on: the last ones, which no probe learns from.
TUNED = 512


@contextmanager
def merging(model: nn.Module, way: str, r: R) -> Iterator[None]:
    """Meanwhile a model merges tokens in one of the ways."""
    tome.apply_patch(model, **WAYS[way])
    try:
        tome.set_r(model, r)
        with matchers.merging(model, MATCHED[way]) if way in MATCHED else nullcontext():
            yield
    finally:
        tome.remove_patch(model)


def parse_setting(text: str) -> R:
    """`8` in every layer; `8:-1` with an inflection; `8,8,0,4` layer by layer; a file of `tome.Schedule`."""
    if text.endswith(".json"):
        return tome.Schedule.load(text)
    if "," in text:
        return [int(part) for part in text.split(",")]
    if ":" in text:
        r, inflection = text.split(":")
        return int(r), float(inflection)
    return int(text)


def known_setting(text: str) -> str:
    """A setting as it was given, if `parse_setting` can read it."""
    try:
        float(text[5:]) if text.startswith("tune:") else parse_setting(text)
    except (OSError, TypeError, ValueError) as error:
        known = "8, 8:-1 (inflection), 8,8,4 (layers) and a file of tome.Schedule are"
        raise argparse.ArgumentTypeError(f"{text!r} is no setting; {known} ({error})") from None
    return text


def fashion_mnist(split: str, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` pictures, uint8 `[count, 28, 28]`, and their classes."""
    folder, prefix = DEBIAN, "t10k" if split == "test" else "train"
    if not folder.is_dir():
        from torchvision.datasets import FashionMNIST

        FashionMNIST(CACHE, download=True)
        folder = CACHE / "FashionMNIST" / "raw"

    def read(name: str, header: int) -> np.ndarray:
        with gzip.open(folder / f"{prefix}-{name}-ubyte.gz") as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)

    pictures = read("images-idx3", 16).reshape(-1, 28, 28)[:count]
    return torch.tensor(pictures), torch.tensor(read("labels-idx1", 8)[:count]).long()


def prepare(pictures: Tensor, args: argparse.Namespace) -> Tensor:
    """As DINOv2 takes them: three channels of `args.size` pixels, normalised as ImageNet's."""
    x = pictures[:, None].to(args.device, torch.float32) / 255
    x = F.interpolate(x, size=(args.size, args.size), mode="bicubic", antialias=True).clamp(0, 1)
    return dinov2.normalised(x).to(getattr(torch, args.dtype))


def load(backend: str, args: argparse.Namespace) -> nn.Module:
    model = dinov2.timm_model(args.size) if backend == "timm" else dinov2.transformers_model()
    return model.to(args.device, getattr(torch, args.dtype))


def pooled(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Class token and mean patch token after the final norm, `[n, width]` each."""
    timm = hasattr(model, "forward_features")
    tokens = (model.forward_features(x) if timm else model(x).last_hidden_state).float()
    return tokens[:, 0], tokens[:, 1:].mean(1)


@torch.inference_mode()
def features(model: nn.Module, pictures: Tensor, what: str, args: argparse.Namespace) -> Tensor:
    """What is pooled, side by side: `[n, 2 * width]`."""
    rows = []
    for part in tqdm(pictures.split(args.batch_size), desc=what, unit="batch", leave=False):
        rows.append(torch.cat(pooled(model, prepare(part, args)), dim=1).cpu())
    return torch.cat(rows)


def cached(
    model: nn.Module, pictures: Tensor, key: str, merged: bool, args: argparse.Namespace
) -> tuple[Tensor, float]:
    """The features, and the seconds that it took to compute them."""
    name = f"{key}-{args.size}-{args.dtype}-{len(pictures)}"
    if merged:  # They depend on this code as well.
        sources = [*sorted(Path(tomesd.__file__).parent.rglob("*.py")), Path(matchers.__file__)]
        name += "-" + hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:8]
    file = CACHE / "eval-vit" / f"{name}.pt"
    made = kept(file, lambda file: torch.load(file, weights_only=True))
    if made is None:
        made = timed(lambda: features(model, pictures, key, args), args.device)
        with whole(file) as part:
            torch.save(made, part)
    return made


class Probe:
    """Multinomial logistic regression on standardised features."""

    def __init__(self, x: Tensor, classes: Tensor, l2: float = 0.01) -> None:
        self.mean, self.std = x.mean(0), x.std(0).clamp_min(1e-6)
        self.weight = torch.zeros(x.shape[1], CLASSES, requires_grad=True)
        self.bias = torch.zeros(CLASSES, requires_grad=True)
        optimizer = torch.optim.LBFGS([self.weight, self.bias], max_iter=300, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(self.logits(x), classes) + l2 / 2 * self.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    def logits(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std @ self.weight + self.bias

    @torch.inference_mode()
    def accuracy(self, x: Tensor, classes: Tensor) -> float:
        return 100 * (self.logits(x).argmax(1) == classes).float().mean().item()


def nearest(x: Tensor, classes: Tensor, train: Tensor, train_classes: Tensor, k: int = 20) -> float:
    """Accuracy in per cent of the majority among the k nearest training features by cosine."""
    train = F.normalize(train, dim=1)
    near = torch.cat([(part @ train.mT).topk(k).indices for part in F.normalize(x, dim=1).split(1000)])
    votes = F.one_hot(train_classes[near], CLASSES).sum(1)
    return 100 * (votes.argmax(1) == classes).float().mean().item()


def tuned(model: nn.Module, way: str, flops: str, args: argparse.Namespace) -> tome.Schedule:
    """A schedule that leaves a share of the operations of the blocks, by what probes see."""
    pictures = fashion_mnist("train", 60_000)[0][-TUNED:]
    batches = [prepare(part, args) for part in pictures.split(16)]
    tome.apply_patch(model, **WAYS[way])
    try:
        schedule = tome.tune(model, [partial(pooled, model, x) for x in batches], float(flops))
    finally:
        tome.remove_patch(model)
    print(schedule, flush=True)
    return schedule


def cost(r: R, size: int) -> tuple[int, float]:
    """Tokens summed over layers, and operations of one picture relative to plain."""

    def run(schedule: list[int]) -> tuple[int, float]:
        n, total, width = 1 + (size // dinov2.PATCH) ** 2, 0, dinov2.WIDTH
        flops = (n - 1) * 3 * dinov2.PATCH**2 * width
        for r in schedule:
            merged = n - min(r, (n - 1) // 2)
            # Queries, keys, values and output; both products of attention; the MLP, on the merged tokens.
            flops += 4 * n * width**2 + 2 * n**2 * width + 8 * merged * width**2
            total += merged
            n = merged
        return total, flops

    tokens, flops = run(tome.parse_r(dinov2.LAYERS, r))
    return tokens, flops / run([0] * dinov2.LAYERS)[1]


def evaluate(backend: str, args: argparse.Namespace) -> list[dict[str, object]]:
    """A row for each way and each r."""
    model = load(backend, args)
    width = dinov2.WIDTH
    pictures, classes = fashion_mnist("test", args.test)
    train_pictures, train_classes = fashion_mnist("train", args.train)
    train, _ = cached(model, train_pictures, f"{backend}-train", False, args)
    plain, plain_seconds = cached(model, pictures, f"{backend}-test", False, args)
    # The class token alone, or the mean of the patches too: the better one on plain features is taken.
    probes = {columns: Probe(train[:, :columns], train_classes) for columns in (width, 2 * width)}
    accuracies = {columns: probe.accuracy(plain[:, :columns], classes) for columns, probe in probes.items()}
    columns = max(accuracies, key=lambda columns: accuracies[columns])
    print(f"{backend}: plain probes {accuracies}, {columns} columns taken", flush=True)
    rows: list[dict[str, object]] = []
    for way in args.ways:
        for setting in args.r:
            if setting.startswith("tune:"):
                setting = ",".join(map(str, tuned(model, way, setting.removeprefix("tune:"), args)))
            r = parse_setting(setting)
            tokens, flops = cost(r, args.size)
            merged = flops < 1
            x, seconds = plain, plain_seconds
            if merged:
                options = "-".join(f"{name}={value}" for name, value in WAYS[way].items())
                key = f"{backend}-test-{options}-r={setting}" + (f"-{way}" if way in MATCHED else "")
                with merging(model, way, r):
                    x, seconds = cached(model, pictures, key, True, args)
            cosine = F.cosine_similarity(x[:, :width], plain[:, :width]).mean().item()
            row = {
                "backend": backend,
                "way": way,
                "r": setting,
                "tokens": tokens,
                "flops": round(flops, 3),
                "probe": round(probes[columns].accuracy(x[:, :columns], classes), 2),
                "knn": round(nearest(x[:, :width], classes, train[:, :width], train_classes), 2),
                "cosine": round(cosine, 4),
                "pictures_s": round(len(pictures) / seconds, 1),
            }
            rows.append(row)
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return rows


def plot(rows: list[dict[str, object]], file: Path) -> None:
    """Accuracy over relative operations; a line for each host, way and inflection, a point for each list."""
    from matplotlib import pyplot

    lines: dict[str, list[dict[str, object]]] = {}
    for row in rows:
        kind = "own list" if "," in str(row["r"]) else f"inflection {(str(row['r']) + ':0').split(':')[1]}"
        lines.setdefault(f"{row['backend']}, {row['way']}, {kind}", []).append(row)
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, line in lines.items():
        line = sorted(line, key=lambda row: float(str(row["flops"])))
        axes.plot([row["flops"] for row in line], [row["probe"] for row in line], "o-", label=name)
    axes.set(xlabel="operations relative to plain", ylabel="accuracy of the linear probe, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)


def run(arguments: Sequence[str] | None) -> int:
    parser = Parser(PROGRAM, __doc__)
    parser.add_argument("--backend", nargs="+", default=["timm"], choices=["timm", "transformers"])
    parser.add_argument("--ways", nargs="+", default=["ours", "ToMe"], choices=list(WAYS))
    default = ["0", "2", "3", "4", "5", "6", "3:-1", "4:-1", "5:-1"]
    parser.add_argument(
        "--r",
        type=known_setting,
        nargs="+",
        default=default,
        help="8, or 8:-1 (inflection), or 8,8,4 (layers), or tune:0.5",
    )
    parser.add_argument("--size", type=dinov2.side, default=112, help="pixels, a multiple of 14")
    parser.add_argument("--test", type=positive, default=10_000, help="how many test pictures")
    parser.add_argument(
        "--train", type=positive, default=10_000, help="how many pictures the probe learns from"
    )
    # bfloat16 changes 0.3 per cent of plain guesses, and takes a third of the time on CPUs that have it.
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--batch-size", type=positive, default=50)
    parser.add_argument("--device", default="auto", help="(the best there is)")
    parser.add_argument("--csv", type=new_file)
    parser.add_argument("--plot", type=new_picture)
    args = parser.parse_args(arguments)
    args.device = str(pick_device(args.device))
    rows = [row for backend in args.backend for row in evaluate(backend, args)]
    if args.csv:
        write_csv(rows, args.csv)
    if args.plot:
        plot(rows, args.plot)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded(PROGRAM, lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
