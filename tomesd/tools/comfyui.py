"""Nodes of tomesd for ComfyUI: self-attention of Stable Diffusion's UNets on fewer tokens or keys.

ComfyUI finds them by a file in its folder `custom_nodes` that imports the two names at the end of this one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..methods.merge import Merge
from ..methods.merge_keys import MergeKeys
from ..methods.recipe import Recipe
from ..methods.sample_keys import SampleKeys
from .patcher import patch

METHODS = {"SampleKeys": SampleKeys, "Merge": Merge, "MergeKeys": MergeKeys}
FINEST = "finest"
SHARE = {"min": 0.0, "max": 1.0, "step": 0.01}
WHEN = {
    "start_percent": ("FLOAT", {**SHARE, "default": 0.0, "tooltip": "Leave steps before it alone."}),
    "end_percent": ("FLOAT", {**SHARE, "default": 1.0, "tooltip": "Leave steps after it alone."}),
}


class TokenMerging:
    """One method for all blocks up to a downsampling of the image."""

    CATEGORY = "model_patches/unet"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    DESCRIPTION = (
        "Makes a Stable Diffusion UNet faster: its self-attention works on fewer tokens or keys. SampleKeys "
        "lets every token look at a sample of the others; Merge merges similar tokens and gives them back "
        "after it; MergeKeys lets every token look at merged ones."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        levels = "Work where the image is at most so many times smaller than the latent image."
        return {
            "required": {
                "model": ("MODEL",),
                "method": (list(METHODS),),
                "ratio": (
                    "FLOAT",
                    {
                        **{"default": 0.5, "min": 0.0, "max": 0.98, "step": 0.01},
                        "tooltip": "The share of the tokens to save. Merge can save up to 0.75.",
                    },
                ),
                "max_downsample": ([FINEST, "1", "2", "4", "8"], {"tooltip": levels}),
                "seed": (
                    "INT",
                    {
                        **{"default": 0, "min": 0, "max": 2**32 - 1, "control_after_generate": False},
                        "tooltip": "Which tokens are drawn. The same seed draws the same picture.",
                    },
                ),
                **WHEN,
            }
        }

    def patch(
        self,
        model: Any,
        method: str,
        ratio: float,
        max_downsample: str,
        seed: int,
        start_percent: float,
        end_percent: float,
    ) -> tuple[Any]:
        limit = None if max_downsample == FINEST else int(max_downsample)
        chosen = METHODS[method](ratio, seed=seed)
        return (patch(model, chosen, limit, _sigmas(model, start_percent, end_percent), _weighs()),)


class TokenMergingRecipe:
    """A method for each block, as `tomesd.tune` has found it."""

    CATEGORY = "model_patches/unet"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    DESCRIPTION = (
        "A method for each block of a Stable Diffusion UNet: a file that python -m tomesd tune has written."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        where = "A file of tomesd.Recipe.save: its whole path, or its place in ComfyUI's input folder."
        return {
            "required": {
                "model": ("MODEL",),
                "recipe": ("STRING", {"default": "recipe.json", "tooltip": where}),
                **WHEN,
            }
        }

    @classmethod
    def IS_CHANGED(cls, model: Any, recipe: str, **when: float) -> float:
        path = _path(recipe)
        return os.path.getmtime(path) if path.exists() else float("nan")  # which is never the same

    def patch(self, model: Any, recipe: str, start_percent: float, end_percent: float) -> tuple[Any]:
        methods = Recipe.load(_path(recipe))
        return (patch(model, methods, None, _sigmas(model, start_percent, end_percent), _weighs()),)


def _path(recipe: str) -> Path:
    import folder_paths  # ComfyUI's

    return Path(folder_paths.get_input_directory()) / recipe


def _sigmas(model: Any, start: float, end: float) -> tuple[float, float] | None:
    """The noise at the start and at the end of a part of sampling; None for all of it."""
    if not start < end:
        raise ValueError(f"start_percent must be below end_percent, got {start:g} and {end:g}")
    if (start, end) == (0, 1):
        return None
    sampling = model.get_model_object("model_sampling")
    return float(sampling.percent_to_sigma(start)), float(sampling.percent_to_sigma(end))


def _weighs() -> bool:
    """Whether this ComfyUI lets patches take the place of attention, by which merged keys get weights."""
    from comfy.ldm.modules import attention

    return hasattr(attention, "wrap_attn")


NODE_CLASS_MAPPINGS = {"TokenMergingTomesd": TokenMerging, "TokenMergingRecipeTomesd": TokenMergingRecipe}
NODE_DISPLAY_NAME_MAPPINGS = {
    "TokenMergingTomesd": "Token Merging (tomesd)",
    "TokenMergingRecipeTomesd": "Token Merging by Recipe (tomesd)",
}
