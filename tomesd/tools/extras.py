"""Packages that only some functions need, and how to get them."""

from __future__ import annotations

import importlib
from typing import Any

# The extra of setup.py that brings a package, by the name that it is imported by; of others it is `dev`.
EXTRAS = {
    **dict.fromkeys(("PIL", "accelerate", "diffusers", "matplotlib", "numpy"), "diffusers"),
    **dict.fromkeys(("tqdm", "transformers"), "diffusers"),
    **dict.fromkeys(("scipy", "skimage"), "bench"),
    "gradio": "app",
    **dict.fromkeys(("timm", "torchvision"), "vit"),
}


def need(module: str, what: str = "this") -> Any:
    """Imports a module for a function, which `what` names.

    Raises:
        ImportError: it cannot be imported; says which package is missing and the command that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = (error.name or module).split(".")[0]
        if package == __name__.split(".")[0]:
            raise  # not missing, but broken
        absent = isinstance(error, ModuleNotFoundError)
        why = "is not installed" if absent else f"cannot be imported ({str(error).splitlines()[0]})"
        line = f"{what} needs {package}, which {why}: pip install 'tomesd[{EXTRAS.get(package, 'dev')}]'"
        raise ImportError(line, name=error.name) from None
