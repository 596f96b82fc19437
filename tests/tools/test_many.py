"""`tomesd generate --prompts-file`: killed, stopped and shared out, it draws the same pictures, each once."""

import csv
import functools
import os
import signal
import socket

import pytest
import tiny
from accelerate import PartialState
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch.multiprocessing import ProcessExitedException, start_processes

from tomesd.__main__ import main
from tomesd.commands import many

PROMPTS = ["a cat", "a dog", "a cat", "a bird"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny.sd().save_pretrained(folder)
    return folder


@pytest.fixture
def draw(model, tmp_path, monkeypatch):
    """Runs the command; `prompts` as a file, and what a call of the pipeline does first of all."""

    def run(out, prompts=PROMPTS, before=None, options=()):
        (tmp_path / "prompts.txt").write_text("\n".join(prompts))
        draw = StableDiffusionPipeline.__call__
        with monkeypatch.context() as patch:
            if before is not None:

                @functools.wraps(draw)
                def first(self, *args, **kwargs):
                    before(kwargs["prompt"])
                    return draw(self, *args, **kwargs)

                patch.setattr(StableDiffusionPipeline, "__call__", first)
            call = ["generate", "--prompts-file", str(tmp_path / "prompts.txt"), "--model", str(model)]
            call += ["--out", str(tmp_path / out), "--steps", "1", "--size", "64", "--device", "cpu"]
            try:
                return main([*call, *options])
            finally:
                PartialState._reset_state()

    return run


def table(folder, name=many.TABLE):
    with open(folder / name, newline="") as file:
        return [{key: row[key] for key in row if key != "seconds"} for row in csv.DictReader(file)]


def pictures(folder):
    whole = [path for path in folder.glob("*.png") if not path.name.startswith("partial-")]
    return {path.name: Image.open(path).tobytes() for path in whole}


def by_two(draw, *arguments):
    """As two processes of `torchrun`, without the seconds that their imports would take."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def worker(rank):
        PartialState._reset_state()  # of other tests of this process
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}.items():
            os.environ[name] = str(value)
        os.environ.update(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
        assert draw(*arguments) == 0

    start_processes(worker, nprocs=2, start_method="fork")


def test_each_picture_has_a_seed_of_its_own_wherever_it_stands(draw, tmp_path):
    assert draw("a", options=["--images", "2"]) == 0
    rows = table(tmp_path / "a")
    # The second "a cat" goes on counting.
    assert [(row["prompt"], row["number"]) for row in rows] == [
        *(("a bird", str(i)) for i in range(2)),
        *(("a cat", str(i)) for i in range(4)),
        *(("a dog", str(i)) for i in range(2)),
    ]
    assert len(set(pictures(tmp_path / "a").values())) == len({row["seed"] for row in rows}) == 8
    assert {row["file_name"] for row in rows} == set(pictures(tmp_path / "a"))
    assert {(row["width"], row["height"]) for row in rows} == {("64", "64")}
    assert draw("b", prompts=PROMPTS[::-1]) == 0
    few = pictures(tmp_path / "b")
    assert few.items() < pictures(tmp_path / "a").items()
    assert draw("c", options=["--seed", "1"]) == 0
    assert not set(pictures(tmp_path / "c")) & set(few)


def test_what_was_stopped_goes_on_and_what_fails_is_noted(draw, tmp_path, capsys):
    asked = []

    def stop(prompt):
        asked.append(prompt)
        if len(asked) == 3:
            raise KeyboardInterrupt
        if prompt == "a dog":
            raise ValueError("no dogs\nat all")

    assert draw("a", before=stop) == 130
    assert [row["prompt"] for row in table(tmp_path / "a")] == ["a cat"]
    assert [(row["prompt"], row["why"]) for row in table(tmp_path / "a", many.FAILED)] == [
        ("a dog", "ValueError: no dogs")
    ]
    # What a kill leaves of a picture that it hit.
    (tmp_path / "a" / "partial-a-cat-1.png").write_bytes(b"\x89PNG")
    asked[:] = [""] * 3
    assert draw("a", before=stop) == 1
    assert asked[3:] == ["a dog", "a cat", "a bird"]
    assert "1 failed" in capsys.readouterr().out
    asked.clear()
    assert draw("a", before=asked.append) == 0
    assert asked == ["a dog"]
    assert not (tmp_path / "a" / many.FAILED).exists()
    assert draw("b") == 0
    assert table(tmp_path / "a") == table(tmp_path / "b")
    (tmp_path / "a" / "partial-a-cat-1.png").unlink()
    assert pictures(tmp_path / "a") == pictures(tmp_path / "b")
    assert draw("a", options=["--ratio", "0.25"]) == 2
    assert "holds pictures of --method Merge(0.5): take these, or another --out" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes by fork")
def test_two_processes_one_of_them_killed_draw_what_one_draws(draw, tmp_path, model):
    prompts = [f"a cat {i}" for i in range(8)]

    def kill(prompt):
        if len(list((tmp_path / "a").glob("*.png"))) >= 3:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        by_two(draw, "a", prompts, kill)
    done = pictures(tmp_path / "a")
    assert 3 <= len(done) < 8
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    by_two(draw, "a", prompts, lambda prompt: (drawn / f"{prompt}, {os.getpid()}").touch())
    assert len(list(drawn.iterdir())) == 8 - len(done)
    assert len({path.name.split(", ")[1] for path in drawn.iterdir()}) == 2
    assert draw("b", prompts) == 0
    assert pictures(tmp_path / "a") == pictures(tmp_path / "b")
    assert table(tmp_path / "a") == table(tmp_path / "b")
