"""`tomesd generate --prompts-file`: many pictures, by as many processes as `accelerate launch` starts.

What is done is what lies in the folder: each picture appears there whole or not at all, and carries its row
of the table. So there is nothing else that a process which is killed could lose, or leave behind half done.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from . import common, options
from .common import Row, UserError, kept, need, reason, say, timed, whole
from .generate import Drawer, check_cheap, hint_unknown_things, slug
from .pipelines import check_pipeline_size, load_pipeline, pick_device, pick_dtype, prompts_in

# What has to be the same in all runs into one folder.
SETTINGS = ("model", "max_downsample", "auto", "size", "steps", "guidance", "seed")
# The text chunk of a PNG that holds its row of the table.
CHUNK = "tomesd"
ABOUT, TABLE, FAILED = "settings.json", "metadata.csv", "failed.csv"
# How long processes that are done wait for the others.
PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Job:
    """A picture that is asked for."""

    prompt: str
    number: int  # of those with this prompt, from 0
    seed: int

    @property
    def stem(self) -> str:
        return f"{slug(self.prompt)[:40]}-{self.number}-{self.seed:016x}"


def jobs_of(prompts: Sequence[str], images: int, seed: int) -> list[Job]:
    """A job for each picture. Its seed depends on its prompt, its number and `seed`, not on its place."""
    drawn: Counter[str] = Counter()
    jobs = []
    for prompt in prompts:
        for _ in range(images):
            number = drawn[prompt]
            drawn[prompt] += 1
            digest = hashlib.sha256(json.dumps([prompt, number, seed]).encode()).digest()
            jobs.append(Job(prompt, number, int.from_bytes(digest[:8], "big") >> 1))
    return jobs


def processes(wanted: str) -> tuple[Any, torch.device]:
    """This process among those of `accelerate launch` or `torchrun`, the only one without; and its device.

    Raises:
        UserError: one device for several processes, or no way for them to know of each other.
    """
    device = pick_device(wanted)
    state = need("accelerate").PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
    if state.num_processes > 1:
        if wanted not in ("auto", device.type):
            raise UserError(f"--device {wanted}: several processes take one each; leave out which")
        device = state.device
    elif int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"accelerate knows no way to share out work among processes on {device.type}")
    return state, device


def check_settings(args: argparse.Namespace, dtype: torch.dtype, note: bool) -> None:
    """A UserError names settings of an older run that differ; in a new folder one process notes them."""
    method = {"method": repr(options.method_asked(args)), "dtype": str(dtype).removeprefix("torch.")}
    settings = json.loads(json.dumps({name: getattr(args, name) for name in SETTINGS} | method))
    file = args.out / ABOUT
    old = kept(file, read_json) or settings
    differ = [
        f"--{name.replace('_', '-')} {old.get(name)}" for name in settings if old.get(name) != settings[name]
    ]
    if differ:
        raise UserError(f"{args.out} holds pictures of {', '.join(differ)}: take these, or another --out")
    if note and not file.exists():
        with whole(file) as part:
            part.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def row_of(file: Path) -> Row:
    """The row of the table that a picture carries; empty for one that is not ours, or not finished."""
    with need("PIL.Image").open(file) as picture:
        row: Row = json.loads(picture.info.get(CHUNK, "{}"))
    return row if row.get("file_name") == file.name else {}


def failure(out: Path, job: Job) -> Path:
    return out / "failed" / f"{job.stem}.json"


def draw(drawer: Drawer, job: Job) -> bool:
    """Draws a picture and keeps it, or why that could not be done; whether it could."""
    out, file = drawer.args.out, drawer.args.out / f"{job.stem}.png"
    row: Row = {"file_name": file.name, "prompt": job.prompt, "number": job.number, "seed": job.seed}
    noise = torch.Generator().manual_seed(job.seed)
    try:
        call = {"prompt": job.prompt, "generator": noise, **drawer.options}
        picture, seconds = timed(lambda: drawer.pipe(**call).images[0], drawer.device)
    except Exception as error:  # whatever it is, other prompts may do
        say(f"note: {job.prompt!r} is skipped: {reason(error)}")
        with whole(failure(out, job)) as part:
            part.write_text(json.dumps({**row, "why": reason(error)}), encoding="utf-8")
        return False
    row |= {"width": picture.width, "height": picture.height, "seconds": round(seconds, 3)}
    info = need("PIL.PngImagePlugin").PngInfo()
    info.add_text(CHUNK, json.dumps(row))
    with whole(file) as part:
        picture.save(part, pnginfo=info)
    failure(out, job).unlink(missing_ok=True)
    return True


def read_json(file: Path) -> Row:
    return dict(json.loads(file.read_text(encoding="utf-8")))


def tabulate(out: Path, jobs: Sequence[Job]) -> tuple[int, int]:
    """Writes the tables of all pictures that are there, and of these jobs' failures; how many there are."""
    done = [row for file in sorted(out.glob("*.png")) if (row := kept(file, row_of))]
    failed = [row for job in jobs if (row := kept(failure(out, job), read_json))]
    for name, rows in ((TABLE, done), (FAILED, failed)):
        if rows:
            common.write_csv(rows, out / name)
        else:
            (out / name).unlink(missing_ok=True)
    return len(done), len(failed)


def run(args: argparse.Namespace) -> int:
    jobs = jobs_of(prompts_in(args.prompts_file), args.images or 1, args.seed)
    check_cheap(args)
    need("PIL.Image")
    state, device = processes(args.device)
    dtype = pick_dtype(args.dtype, device)
    check_settings(args, dtype, state.is_main_process)
    # Each process could look for itself, but a little later, when others have begun to draw.
    todo = [job for job in jobs if not kept(args.out / f"{job.stem}.png", row_of)]
    need("accelerate.utils").broadcast_object_list(shared := [todo])
    # PartialState's own split gives the last one to two processes where there are fewer than these.
    mine = shared[0][state.process_index :: state.num_processes]
    try:
        if mine:
            draw_all(args, mine, device, dtype, state.is_main_process)
        state.wait_for_everyone()
    finally:
        if state.is_main_process:
            done, failed = tabulate(args.out, jobs)
            print(f"{done} picture(s) in {args.out}, listed in {TABLE}; {failed} failed")
    # Not among several: the first of them to end with an error would end the others.
    return int(failed > 0) if state.num_processes == 1 else 0


def draw_all(
    args: argparse.Namespace, jobs: Sequence[Job], device: torch.device, dtype: torch.dtype, shown: bool
) -> None:
    args.prompts = list(dict.fromkeys(job.prompt for job in jobs))
    if shown:
        hint_unknown_things(args)
    pipe = load_pipeline(args.model, device, dtype)
    check_pipeline_size(pipe, args.size)
    pipe.set_progress_bar_config(disable=True)
    drawer = Drawer(args, pipe, device)
    drawer.patch(merged=True)
    for job in need("tqdm").tqdm(jobs, unit="picture", disable=not shown):
        draw(drawer, job)
