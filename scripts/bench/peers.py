"""Fetches the packages that tomesd is compared with, or tried beside, from PyPI.

    python scripts/bench peers

Each is known by its hash. They lie in the ignored folder .cache/peers of the checkout and are unpacked, never
installed: tomesd 0.1.3 would shadow this package. `load` imports one from there.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from tomesd.commands.common import ROOT, Parser, UserError, guarded, say

PROGRAM = "python scripts/bench peers"
FOLDER = ROOT / ".cache" / "peers"


class Peer(NamedTuple):
    """A wheel on PyPI. Its code is run here, so no other one than the one that was looked at will do."""

    requirement: str
    sha256: str
    megabytes: float


PEERS = {
    "tomesd": Peer("tomesd==0.1.3", "3d5aa0857fe2c2aab253891050601ca13a87d8d7a99b6760b9ca0856aa0c6355", 0.01),
    # The code of Stable Diffusion 2 by CompVis and Stability AI, as the package `ldm`.
    "ldm": Peer(
        "stable-diffusion-sdkit==2.1.5",
        "552075efc72e81182b34a0c7b6579202a24d1d6cd6712a11979bf81d106625a4",
        0.1,
    ),
    # What is tried beside tomesd: see docs/composition.md.
    "DeepCache": Peer(
        "DeepCache==0.1.1", "aa4aa5f8e9a2e5a41d59900305c3c86c20834537d0c67bf2d8bb7075618ae48a", 0.2
    ),
    "tgate": Peer("tgate==1.0.0", "bb1e9b324442c025bf9e9fa47a508730229ad6b08906fcddfb690e977425a6dd", 0.05),
}


class Unavailable(RuntimeError):
    """A peer that is neither here nor to be had from PyPI."""


def fetch(name: str, peer: Peer | None = None) -> Path:
    """The folder that holds an unpacked package; downloads it first if need be.

    Args:
        name: of the package, as it is imported.
        peer: where it comes from; that of `PEERS` by default.

    Raises:
        Unavailable: pip could not download it, or got another file.
    """
    peer = peer or PEERS[name]
    folder = FOLDER / f"{peer.requirement.replace('==', '-')}-{peer.sha256[:8]}"
    if (folder / name).is_dir():
        return folder
    say(f"downloading {peer.requirement} from PyPI ({peer.megabytes:g} MB) into {folder}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    # Unpacked beside its place, which it takes as a whole.
    with tempfile.TemporaryDirectory(dir=FOLDER, prefix="partial-") as download:
        wanted = Path(download) / "requirements.txt"
        wanted.write_text(f"{peer.requirement} --hash=sha256:{peer.sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", download]
        command += ["--disable-pip-version-check", "--only-binary", ":all:", "--require-hashes"]
        pip = subprocess.run([*command, "--requirement", str(wanted)], capture_output=True, text=True)
        if pip.returncode:
            lines = pip.stderr.strip().splitlines() or ["no reason given"]
            cause = "not the file that was expected" if "HASHES" in pip.stderr else "no network?"
            # The last line says what, the ones before it how often it was tried.
            raise Unavailable(f"pip cannot download {peer.requirement} ({cause}): {lines[-1].strip()}")
        with zipfile.ZipFile(next(Path(download).glob("*.whl"))) as wheel:
            wheel.extractall(Path(download) / "unpacked")
        try:
            (Path(download) / "unpacked").rename(folder)
        except OSError:
            if not (folder / name).is_dir():  # else another process was faster
                raise
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
