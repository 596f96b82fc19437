"""Makes torchvision importable where its compiled part is of another build than torch."""

from __future__ import annotations

import importlib.util

import torch

MISSING = ("nms", "qnms")
# Operators live as long as the library object that defines them.
LIBRARY: list[torch.library.Library] = []


def mend_torchvision() -> None:
    """Defines the operators that torchvision's import looks up, if it fails without them.

    timm and transformers import torchvision, which then stops with "operator torchvision::nms does not
    exist". Its Python part, all that they need of it, works once these operators have a name. To be called
    before such packages are imported. Where torchvision works, or is not installed, nothing changes.
    """
    if LIBRARY or importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        LIBRARY.append(library)
        for name in MISSING:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
