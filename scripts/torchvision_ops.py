"""Makes torchvision importable where its compiled part is of another build than torch.

    python scripts/torchvision_ops.py examples/some_script.py its arguments

timm and transformers import torchvision, which then stops with "operator torchvision::nms does not exist".
Its Python part, all that they need of it, works once the missing operators have a name. Where torchvision
works, or is not installed, nothing is done. Scripts call `define()` before they import such packages; others
are run through this one.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

import torch

MISSING = ("nms", "qnms")
# Operators live as long as the library object that defines them.
LIBRARY: list[torch.library.Library] = []


def define() -> None:
    """Defines the operators that torchvision's import looks up, if it fails for want of them."""
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


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    define()
    # As `python SCRIPT` would: its arguments, and imports from its folder.
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
