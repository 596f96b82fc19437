"""Fetches the packages that tomesd is compared with from PyPI, into the ignored folder .cache/peers.

    python scripts/peers.py

They are unpacked, never installed: tomesd 0.1.3 would shadow this package. `load` imports one from there.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType

PEERS = {
    "tomesd": "tomesd==0.1.3",
    # The code of Stable Diffusion 2 by CompVis and Stability AI, as the package `ldm`.
    "ldm": "stable-diffusion-sdkit==2.1.5",
}
FOLDER = Path(__file__).resolve().parent.parent / ".cache" / "peers"


def fetch(name: str) -> Path:
    """The folder that holds the unpacked peer; downloads it first if need be."""
    folder = FOLDER / PEERS[name].replace("==", "-")
    if not (folder / name).is_dir():
        with tempfile.TemporaryDirectory() as download:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", download]
            subprocess.run([*command, "--only-binary", ":all:", PEERS[name]], check=True)
            with zipfile.ZipFile(next(Path(download).glob("*.whl"))) as wheel:
                wheel.extractall(Path(download) / "unpacked")
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(Path(download) / "unpacked", folder, dirs_exist_ok=True)
    return folder


def load(name: str, alias: str | None = None) -> ModuleType:
    """Imports a peer's package, under another name if `alias` is given."""
    alias = alias or name
    if alias not in sys.modules:
        package = fetch(name) / name
        spec = importlib.util.spec_from_file_location(
            alias, package / "__init__.py", submodule_search_locations=[str(package)]
        )
        assert spec is not None
        assert spec.loader is not None
        sys.modules[alias] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[alias]


if __name__ == "__main__":
    for peer in PEERS:
        print(fetch(peer))
