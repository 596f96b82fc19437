"""The command as a whole: help, exit codes, errors; explain and trace; what scripts look for."""

import importlib.metadata
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import missing
import numpy as np
import pytest
from PIL import Image

import tomesd
from tomesd.__main__ import COMMANDS, main
from tomesd.commands import common, drawing, pipelines, tune
from tomesd.commands.common import ROOT


def test_commands_are_listed_and_unknown_ones_refused(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert set(COMMANDS) <= set(printed.split())
    assert "130  stopped by Ctrl-C" in printed
    assert main(["fly"]) == 2
    assert "invalid choice: 'fly'" in capsys.readouterr().err
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"tomesd {tomesd.__version__}, torch ")


@pytest.mark.parametrize("arguments", [[], ["--version"], ["generate", "--help"]], ids=str)
def test_a_reader_who_has_seen_enough_is_no_error(arguments, monkeypatch):
    class Closed(io.StringIO):
        def flush(self):
            raise BrokenPipeError

        def fileno(self):
            return spare.fileno()

    with tempfile.TemporaryFile() as spare:
        monkeypatch.setattr(sys, "stdout", Closed())
        assert main(arguments) == 0


@pytest.mark.parametrize("name", ["picture", "picture.odd"])
def test_a_picture_of_no_known_kind_is_refused_before_anything_is_drawn(name, tmp_path, capsys):
    out = str(tmp_path / name)
    assert main(["trace", "emoji", "pizza", "--out", out]) == 2
    assert main(["tune", "--plot", out]) == 2
    assert main(["plot", "none.csv", "--out", out]) == 2
    assert capsys.readouterr().err.count(f"the name of {out} has to end in one of .eps, ") == 3
    assert list(tmp_path.iterdir()) == []


def test_output_that_is_closed_or_lacks_letters_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["--version"]) == 0
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert common.guarded("x", lambda: print("Rübe") or 0) == 0
    assert written.getvalue().strip() == rb"R\xfcbe"


def test_prompts_may_begin_with_a_mark_of_their_encoding(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("red apple\n", encoding="utf-8-sig")
    assert pipelines.prompts_in(file) == ["red apple"]


def test_a_list_is_no_pipeline(tmp_path):
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(common.UserError, match="it names no parts of a pipeline"):
        pipelines.check_model(str(tmp_path))


def test_users_without_a_home_have_a_cache(monkeypatch):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    assert common.cache_folder() == Path(tempfile.gettempdir()) / "tomesd"


def test_help_and_errors_need_nothing_but_torch():
    code = """
import sys
for name in "numpy PIL diffusers transformers accelerate matplotlib tqdm skimage torchvision gradio".split():
    sys.modules[name] = None
import torch, tomesd, tomesd.vit
assert "tomesd.commands" not in sys.modules
from tomesd.__main__ import COMMANDS, main
for name in COMMANDS:
    try:
        main([name, "--help"])
    except SystemExit as stop:
        assert stop.code == 0, name
for call in ("generate", "generate-4k x", "app", "tune", "explain", "trace emoji x --out x.png"):
    assert main(call.split()) == 2
for call in (
    lambda: tomesd.make_visualization(None, None),
    lambda: tomesd.vit.make_visualization(None, None),
    lambda: tomesd.vit.utils.benchmark(torch.nn.Linear(1, 1), "cpu", (1,), 1, 2, verbose=True),
):
    try:
        call()
    except ImportError as error:
        print(error, file=sys.stderr)
assert tomesd.vit.utils.benchmark(torch.nn.Linear(1, 1), "cpu", (1,), 1, 2) > 0
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for command in COMMANDS:
        assert f"usage: tomesd {command} " in run.stdout
        assert f"    tomesd {command}" in run.stdout  # an example
    lines = [line for line in run.stderr.splitlines() if "not installed: pip install 'tomesd[" in line]
    assert len(lines) == 9, run.stderr


def test_what_is_not_installed_is_named():
    says = r"needs no_such_thing, which is not installed: pip install 'tomesd\[dev\]'"
    with pytest.raises(common.UserError, match=says):
        common.need("no_such_thing")


def test_explain_as_a_table_and_as_json(tmp_path, capsys):
    assert main(["explain", "--ratio", "0.9", "--device", "cpu"]) == 0
    table, notes = capsys.readouterr()
    assert notes.count("note: ratio 0.9 is above 0.75") == 1
    assert "3 of 16 blocks compute less at 128 x 128 pixels" in table
    names = [line.split()[0] for line in table.splitlines()[1:-1]]
    tomesd.Recipe({names[0]: tomesd.SampleKeys(0.5)}).save(tmp_path / "r.json")
    call = ["explain", "emoji", "--size", "256x128", "--recipe", str(tmp_path / "r.json"), "--json"]
    assert main([*call, "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["width"], found["height"]) == (256, 128)
    assert [row["name"] for row in found["rows"]] == names
    assert tomesd.Method.from_dict(found["rows"][0]["method"]) == tomesd.SampleKeys(0.5)
    assert 0 < found["rows"][0]["saved"] < 1
    assert {row["method"] for row in found["rows"][1:]} == {None}
    assert main(["explain", "--size", "12", "--device", "cpu"]) == 2
    assert "--size 12x12: 12 is not a multiple of 8; take 8 or 16" in capsys.readouterr().err


def test_what_merged_is_drawn(tmp_path, capsys):
    out = tmp_path / "trace.png"
    call = ["trace", "emoji", "red apple", "--out", str(out), "--device", "cpu", "--size", "64"]
    call += ["--steps", "3", "--max-downsample", "2"]
    assert main(call) == 0
    *plans, path = capsys.readouterr().out.strip().splitlines()
    assert path == str(out)
    assert [line.split(", ")[1] for line in plans] == [f"step {i}" for i in (0, 1, 2)] * 2
    assert sum("at downsample 2" in line for line in plans) == 3
    width, height = Image.open(out).size
    assert width > 1.8 * height  # two levels; the picture and three steps
    assert main([*call, "--at", "1", "7"]) == 2
    assert "there are steps 0 to 2, not 1, 7" in capsys.readouterr().err
    assert main([*call, "--at", "-1"]) == 2
    assert "argument --at: '-1' is not a whole number of at least 0" in capsys.readouterr().err
    assert main([*call, "--block", "unet.nowhere"]) == 2
    said = capsys.readouterr().err  # before it draws
    assert "nothing merges at unet.nowhere, only at unet.down_blocks.0" in said
    assert "trace: red apple" not in said
    assert main([*call, "--at", "9" * 99]) == 2
    assert "99 is above 2147483647" in capsys.readouterr().err
    assert main(["explain", "--size", "9" * 99]) == 2
    assert "is neither a side like 512" in capsys.readouterr().err
    assert main([*call, "--ratio", "0"]) == 2
    assert main([*call[:3], "--out", "no/where.png"]) == 2


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "stopped"),
        (OSError(28, "No space left on device", "x.png"), 2, "No space left on device: 'x.png'"),
        (MemoryError(), 2, "out of memory"),
        (common.UserError("no"), 2, "tomesd tune: error: no"),
    ],
)
def test_whatever_stops_a_command_is_a_line_and_a_code(error, code, says, monkeypatch, capsys):
    def fail(*args):
        raise error

    monkeypatch.setattr(tune, "make_parser", fail)
    assert main(["tune"]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


@pytest.mark.parametrize(
    "call",
    [["generate", "x", "--out"], ["generate-4k", "x", "--out"], ["tune", "--cache"], ["quality", "--cache"]],
)
def test_a_folder_that_cannot_be_had_is_told_at_once(call, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main([*call, str(tmp_path / "file")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"error: argument {call[-1]}: cannot make the folder {tmp_path / 'file'}: File exists" in line


def test_files_appear_whole_or_not_at_all(tmp_path):
    file = tmp_path / "new" / "a.txt"
    with pytest.raises(ZeroDivisionError), common.whole(file) as part:
        part.write_text(f"ha{1 / 0}")
    assert list(file.parent.iterdir()) == []
    with common.whole(file) as part:
        part.write_text("all of it")
    assert file.read_text() == "all of it"


def test_files_that_were_cut_are_as_none(tmp_path, capsys):
    drawn = drawing.Drawn(np.zeros((1, 2, 2, 3), np.uint8), np.ones(1), np.ones(1))
    files = {tmp_path / "a.npz": drawing.read, tmp_path / "b.json": tune.known_trials}
    np.savez_compressed(tmp_path / "a.npz", **vars(drawn))
    (tmp_path / "b.json").write_text('{"a Merge(0.5)": [0.1, 0.2]}')
    for file, read in files.items():
        assert common.kept(file, read) is not None
        whole = file.read_bytes()
        for length in (0, 10, len(whole) // 2, len(whole) - 2):
            file.write_bytes(whole[:length])
            assert common.kept(file, read) is None
            assert f"{file} cannot be read" in capsys.readouterr().err
        file.unlink()
        assert common.kept(file, read) is None
        assert capsys.readouterr().err == ""


def test_the_shipped_model_is_found_by_its_name(tmp_path, monkeypatch):
    assert pipelines.find_model("emoji") == str(ROOT / "tomesd" / "emoji-model")
    assert pipelines.find_model("OWNER/MODEL") == "OWNER/MODEL"
    (tmp_path / "emoji").mkdir()
    monkeypatch.chdir(tmp_path)  # where somebody has one of that name
    assert pipelines.find_model("emoji") == "emoji"


def test_scripts_know_what_is_missing(tmp_path, monkeypatch):
    """Of another checkout, of another version, or not there at all."""
    site, root = tmp_path / "site", tmp_path / "root"
    info = site / "tomesd-1.dist-info"
    for folder in (info, root / "tomesd"):
        folder.mkdir(parents=True)
    (root / "setup.py").touch()
    asks = ["torch>=99", "numpy", 'no-such-thing; extra == "a"', 'other-thing; extra == "b"']
    (info / "METADATA").write_text(
        "Name: tomesd\nVersion: 1\n" + "".join(f"Requires-Dist: {r}\n" for r in asks)
    )
    (info / "RECORD").write_text("tomesd-1.dist-info/METADATA,,\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "tomesd")
    assert list(missing.missing("a", root)) == [f"tomesd of {root}"]
    (root / "tomesd" / "__init__.py").touch()
    monkeypatch.syspath_prepend(root)
    assert list(missing.missing("a", root)) == [
        f"torch>=99, not {importlib.metadata.version('torch')}",  # torch itself may say which CUDA it is for
        'no-such-thing; extra == "a"',
    ]
    os.utime(root / "setup.py", (2**33, 2**33))
    assert list(missing.missing("a", root)) == ["what setup.py has come to ask for"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_what_is_freed_is_kept():
    """Large tensors that come and go take pages from the system once, and not each time."""
    code = """
import resource, sys, torch
from tomesd.commands.memory import keep_freed
if "keep" in sys.argv:
    keep_freed()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    kept, given_back = (
        int(subprocess.check_output([sys.executable, "-c", code, word], env=environment))
        for word in ("keep", "no")
    )
    assert kept < given_back / 10
