"""Imports run one way: maths <- hosts <- methods <- patch <- tools <- vit <- commands."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2] / "tomesd"
ORDER = ["maths", "hosts", "methods", "patch", "tools", "vit", "commands"]
# The functional API and the merger for models of one's own know no models.
MATHS_ONLY = {"merge", "token_merger"}


def modules():
    """Each module of the package, by its path in it, and the modules that it imports."""
    names = {path.relative_to(ROOT).with_suffix("").parts: path for path in ROOT.rglob("*.py")}
    for parts, path in names.items():
        imported = set()
        package = parts[:-1]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            base = package[: len(package) - node.level + 1] + tuple((node.module or "").split("."))
            base = tuple(part for part in base if part)
            for alias in node.names:
                target = next(t for t in ((*base, alias.name), base, (*base, "__init__")) if t in names)
                imported.add(target)
        yield parts, imported


def room(parts):
    return "maths" if parts[0] in MATHS_ONLY else "patch" if parts[0] == "utils" else parts[0]


def test_rooms_import_what_comes_before_them():
    for parts, imported in modules():
        if parts[0].startswith("__"):
            continue
        for target in imported - {("__init__",)}:
            assert ORDER.index(room(target)) <= ORDER.index(room(parts)), f"{parts} imports {target}"
            if parts[0] in MATHS_ONLY:
                assert target[0] == "maths", f"{parts} imports {target}"


def test_there_is_no_circle():
    TopologicalSorter({parts: imported - {parts} for parts, imported in modules()}).prepare()


def test_no_file_is_long():
    for path in ROOT.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path


def test_the_maths_names_no_part_of_a_model_and_hosts_name_no_method():
    for path in (ROOT / "maths").glob("*.py"):
        assert "nn.Module" not in path.read_text(encoding="utf-8"), path
    for path in (ROOT / "hosts").glob("*.py"):
        for name in ("Merge(", "SampleKeys", "MergeStage"):
            assert name not in path.read_text(encoding="utf-8"), path


def test_names_of_parts_stand_in_rows_alone():
    rows = {"unets.py", "vits.py"}
    for path in ROOT.rglob("*.py"):
        if path.name in rows or path.parent.name in ("commands", "bench"):
            continue
        strings = {
            node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)
        }
        assert not strings & {"norm1", "attn1", "attn2", "ff", "norm2", "drop_path2"}, path
