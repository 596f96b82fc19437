"""Devices, precisions and pipelines of diffusers, by what a user calls them."""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import torch

import tomesd

from .common import UserError, check_multiple, first_line, need, say

# The model that comes with the package, and what it is called on command lines.
EMOJI_MODEL = Path(tomesd.__file__).resolve().parent / "emoji-model"
EMOJI = "emoji"
# Pixels above which autoencoders work in tiles, each with statistics of its own.
TILED = 2**21
SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where to draw, and how precisely."""
    best = "cpu, cuda, cuda:1, mps, ... (default: the best there is)"
    parser.add_argument("--device", default="auto", help=best)
    precision = "default: fp16 on cuda, else fp32"
    parser.add_argument("--dtype", choices=("auto", *SHORT), default="auto", help=precision)


def add_places(parser: argparse.ArgumentParser) -> None:
    """Where to draw, how precisely, and where the pictures go."""
    add_device(parser)
    pictures = "folder for pictures (default: outputs)"
    parser.add_argument("--out", type=Path, default=Path("outputs"), help=pictures)


def find_model(name: str) -> str:
    """A folder or hub id as it was given; the folder of the shipped model for its name."""
    return str(EMOJI_MODEL) if name == EMOJI and not Path(name).is_dir() else name


def pick_device(wanted: str) -> torch.device:
    """The device of that name; of `auto` the best there is.

    Raises:
        UserError: there is no such device, or it cannot be used.
    """
    if wanted == "auto":
        mps = getattr(torch.backends, "mps", None)
        best = "cuda" if torch.cuda.is_available() else "mps" if mps and mps.is_available() else "cpu"
        return torch.device(best)
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise UserError(
            f"--device {wanted}: there is no such device; cpu, cuda, cuda:1 and mps are some"
        ) from None
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {wanted} cannot be used here: {first_line(error)}") from None
    if device.type == "meta":
        raise UserError("--device meta computes nothing")
    return device


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The precision of that name, in torch or short; of `auto` float16 on CUDA and float32 elsewhere."""
    if wanted == "auto":
        wanted = "fp16" if device.type == "cuda" else "fp32"
    dtype = getattr(torch, SHORT.get(wanted, wanted))
    assert isinstance(dtype, torch.dtype)
    return dtype


def check_model(model: str) -> None:
    """Raises a UserError for what cannot be a pipeline, before anything slow is imported."""
    try:
        path = Path(model).expanduser()
    except RuntimeError as error:  # ~nobody
        raise UserError(f"there is no folder {model}: {first_line(error)}") from None
    if path.is_dir():
        try:
            index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
            if not isinstance(index, dict):
                raise ValueError("it names no parts of a pipeline")
        except FileNotFoundError:
            raise UserError(f"{path} is not a pipeline folder: it has no model_index.json") from None
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path / 'model_index.json'}: {error}") from None
    elif path.is_file():
        raise UserError(f"{path} is a file; a model is the folder or hub id of a diffusers pipeline")
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith("."):
        raise UserError(f"there is no folder {model}, and {model!r} cannot be a hub id (owner/name)")


def load_pipeline(
    model: str,
    device: torch.device,
    dtype: torch.dtype,
    otherwise: str = "take the shipped model: emoji",
) -> Any:
    """A pipeline that draws from prompts, on its device.

    Raises:
        UserError: it cannot be had; says what to do `otherwise`.
    """
    check_model(model)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its hints concern parts that are not used here
    local = Path(model).expanduser()
    source = str(local) if local.is_dir() else model
    diffusers = need("diffusers")
    say(f"loading {source} on {device} as {str(dtype).removeprefix('torch.')}")
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(source, **dtype_option(dtype))
    except Exception as error:
        if local.is_dir():
            raise UserError(f"{local} cannot be loaded as a pipeline: {first_line(error)}") from None
        cause = first_line(error)
        if "not fully cached" in str(error) or "onnect" in str(error):
            cause = "cannot be reached, and it is not in the local cache"
        raise UserError(
            f"cannot get the model {model!r}: no such folder here, and from the Hugging Face Hub: {cause}. "
            f"Check the name and the network, or {otherwise}"
        ) from None
    if "prompt" not in inspect.signature(pipe.__call__).parameters:
        raise UserError(f"{model} is a {type(pipe).__name__}, which draws nothing from a prompt")
    return pipe.to(device)


def dtype_option(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The precision as an option of `from_pretrained`, whose name changed in diffusers 0.42."""
    version = need("diffusers").__version__.split(".")[:2]
    return {"dtype" if tuple(map(int, version)) >= (0, 42) else "torch_dtype": dtype}


def prompts_in(file: Path) -> list[str]:
    """The prompts of --prompts-file, one a line.

    Raises:
        UserError: it cannot be read, or there are none.
    """
    try:
        # Some editors begin a file with a mark of its encoding.
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"argument --prompts-file: {error}") from error
    except UnicodeError:
        raise UserError(f"argument --prompts-file: {file} is no text in UTF-8") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"argument --prompts-file: {file} is empty")
    return prompts


def weights_of(model: Path) -> list[tuple[str, int, int]]:
    """What tells whether a pipeline in a folder has changed: path, size and time of each of its files."""
    files = sorted(file for file in model.rglob("*") if file.suffix in (".safetensors", ".bin", ".json"))
    return [(str(f.relative_to(model)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]


def prepare(pipe: Any) -> None:
    """Makes a pipeline draw what is to be compared, and no bars."""
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None  # it would blacken pictures
    pipe.set_progress_bar_config(disable=True)


def chunk_feed_forward(network: torch.nn.Module) -> None:
    """Feed-forward layers of transformers take one picture, or one half of guidance, after the other."""
    module: Any
    for module in network.modules():
        if hasattr(module, "set_chunk_feed_forward"):
            module.set_chunk_feed_forward(1, dim=0)


def spare_memory(pipe: Any, size: tuple[int, int]) -> None:
    """Makes what would set the peak of memory work in pieces: with large pictures that costs no time."""
    chunk_feed_forward(pipe.unet)
    vae = getattr(pipe, "vae", None)
    if vae is not None and math.prod(size) > TILED:
        vae.enable_tiling()


def check_pipeline_size(pipe: Any, size: tuple[int, int] | None) -> None:
    """The size against what a pipeline's autoencoder and network need."""
    if size:
        check_multiple(size, math.lcm(8, int(getattr(pipe, "vae_scale_factor", 8))))
