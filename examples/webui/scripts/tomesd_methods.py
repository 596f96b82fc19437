"""Methods of tomesd in the web UIs of AUTOMATIC1111, Forge and SD.Next: an extension of one script.

Copy the folder `examples/webui` into `extensions` and install tomesd where the web UI runs: docs/hosts.md.
"""

from __future__ import annotations

import weakref
from typing import Any

import gradio as gr
from modules import scripts

try:
    from tomesd.hosts.unets import find_networks
    from tomesd.tools.patcher import Merge, MergeKeys, Method, SampleKeys, patch
except ImportError as error:
    raise ImportError(
        "tomesd 1.0 is needed where this program runs, not the older one that pip finds: see docs/hosts.md"
    ) from error

import tomesd

METHODS = {"SampleKeys": SampleKeys, "Merge": Merge, "MergeKeys": MergeKeys}
FINEST = "finest"
# Networks that this script has patched: after an error in the midst of drawing one may still be. Not the
# models that hold them, as SD.Next puts a network into another pipeline.
PATCHED: weakref.WeakSet[Any] = weakref.WeakSet()


class Script(scripts.Script):
    def title(self) -> str:
        return "Token merging (tomesd)"

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        with gr.Accordion(self.title(), open=False):
            return [
                gr.Checkbox(label="Enable", value=False),
                gr.Radio(label="Method", choices=list(METHODS), value="SampleKeys"),
                gr.Slider(label="Ratio: the share of the tokens to save", maximum=0.98, step=0.01, value=0.5),
                gr.Dropdown(
                    label="Work where the image is at most so many times smaller than the latent image",
                    choices=[FINEST, "1", "2", "4", "8"],
                    value=FINEST,
                ),
                gr.Number(label="Seed of the tokens that are drawn", value=0, precision=0),
            ]

    def process(self, p: Any, *inputs: Any) -> None:
        _remove()
        if inputs[0]:
            # So that a picture tells how it was drawn.
            p.extra_generation_params[self.title()] = _described(*inputs[1:])
            if not _has_patcher(p):
                _apply(p, *inputs[1:])

    def process_before_every_sampling(self, p: Any, *inputs: Any, **kwargs: Any) -> None:
        """Of Forge and newer AUTOMATIC1111, whose own setting may have patched the model in between."""
        if inputs[0]:
            _apply(p, *inputs[1:])

    def postprocess(self, p: Any, processed: Any, *inputs: Any) -> None:
        _remove()


def _has_patcher(p: Any) -> bool:
    """Whether this is Forge: there a patched clone is drawn with once, and dropped by Forge itself."""
    return hasattr(p.sd_model, "forge_objects")


def _apply(p: Any, *inputs: Any) -> None:
    method, limit = _method(*inputs)
    if _has_patcher(p):
        objects = p.sd_model.forge_objects
        objects.unet = patch(objects.unet, method, limit)
    else:
        tomesd.apply_patch(p.sd_model, method, max_downsample=limit)
        PATCHED.update(network.module for network in find_networks(p.sd_model))


def _remove() -> None:
    for network in list(PATCHED):
        tomesd.remove_patch(network)
    PATCHED.clear()


def _method(name: str, ratio: float, limit: str, seed: float) -> tuple[Method, int | None]:
    return METHODS[name](ratio, seed=int(seed)), None if limit == FINEST else int(limit)


def _described(*inputs: Any) -> str:
    method, limit = _method(*inputs)
    return repr(method) if limit is None else f"{method!r} up to {limit}"
