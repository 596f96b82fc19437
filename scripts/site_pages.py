"""Puts into the site what lies outside of docs/: README as its first page, other pages, pictures.

A hook of mkdocs. Links of pages are as GitHub wants them; here they are moved along.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "index.md": "README.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "emoji-model.md": "tomesd/emoji-model/README.md",
    "token_merger.py": "examples/token_merger.py",
    "vlm.py": "examples/vlm.py",
}
PICTURES = [*ROOT.glob("examples/pictures/*"), *ROOT.glob("tomesd/emoji-model/*.png")]


def on_files(files: Files, config: Any) -> Files:
    """Adds the files."""
    for place, source in OUTSIDE.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    for picture in PICTURES:
        files.append(File.generated(config, f"pictures/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Moves the links of a page."""
    source = Path(page.file.abs_src_path)
    places = {(ROOT / path).resolve(): place for place, path in OUTSIDE.items()}
    places |= {picture.resolve(): f"pictures/{picture.name}" for picture in PICTURES}
    places |= {path.resolve(): path.name for path in ROOT.glob("docs/*.md")}

    def moved(link: re.Match[str]) -> str:
        path, hash_, anchor = link[1].partition("#")
        place = places.get((source.parent / path).resolve()) if path else None
        return f"]({place}{hash_}{anchor})" if place else link[0]

    return re.sub(r"\]\(([^)\s:]+)\)", moved, markdown)
