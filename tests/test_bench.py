"""`python -m tomesd bench` and `plot`, on networks of a few channels."""

import argparse
import csv
import math
import subprocess
import sys

import pytest
import torch
from tiny import peer
from tomesd.hooks import recompile
from tomesd.partition import Grid

import tomesd.bench.peers as peers
from tomesd.__main__ import main
from tomesd.bench import memory, models, speed, ways

FEW = ["plain", "ideal", "windowed"]
BLOCK = models.Setting("block", "tiny", "float32", 192, 128, 0.5, 2, "cpu")
UNET = models.Setting("unet", "tiny", "float32", 192, 128, 0.5, 2, "cpu")


def bench(*arguments: str) -> list[dict[str, str]]:
    """The rows of a run on the tiny model."""
    path = arguments[0]
    code = main(["bench", "--model", "tiny", "--rounds", "2", "--csv", *map(str, arguments)])
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert code == (0 if any(not row["note"] for row in rows) else 1)
    return rows


@pytest.mark.parametrize("level", ["block", "unet"])
def test_every_way_is_measured(level, tmp_path, capsys):
    peer("tomesd", alias="tomesd_0_1_3")
    # A side of 640 pixels is 80 tokens: two tiles of HyperTile.
    size = "640x128" if level == "block" else "640x64"
    rows = bench(tmp_path / "b.csv", "--level", level, "--sizes", size, "--dtypes", "float32")
    assert [row["way"] for row in rows] == ways.at(level)
    assert len(ways.at(level)) == {"block": 9, "unet": 20}[level]
    for row in rows:
        assert row["note"] == ""
        assert row["size"] == size
        assert row["model"] == "tiny"
        assert row["tokens"] == ("1280" if level == "block" else "640")
        low, p20, median, p80 = (float(row[name]) for name in ("min_s", "p20_s", "median_s", "p80_s"))
        assert 0 < low <= p20 <= median <= p80
        assert math.isclose(float(row["speed"]), float(rows[0]["median_s"]) / median, rel_tol=1e-4)
        assert int(row["ops"]) >= int(rows[0]["ops"])
        assert (float(row["error"]) == 0) == (row["way"] == "plain")
        assert float(row["error"]) < 2
        assert row["peak_mib"] == "" or float(row["peak_mib"]) >= 0
        assert row["compile_s"] == ""
        assert {row["torch"], row["threads"]} == {torch.__version__, str(torch.get_num_threads())}
    output = capsys.readouterr().out
    assert f"{level} of tiny, {size}" in output
    assert all(f"\n{way} " in output for way in ways.at(level))
    assert output.splitlines()[-1].startswith("device ")


def test_a_row_for_each_setting(tmp_path):
    rows = bench(
        *(tmp_path / "b.csv", "--sizes", "64", "128x64", "--dtypes", "float32", "bfloat16"),
        *("--ratios", "0.25", "0.5", "--ways", "ideal", "--batch", "1"),
    )
    settings = {(row["size"], row["dtype"], row["ratio"], row["batch"]) for row in rows}
    assert len(settings) == 2 * 2 * 2
    assert [row["way"] for row in rows] == ["plain", "ideal"] * 8  # plain is what all are told from


def test_shares_are_told_from_the_own_ideal():
    seconds = {
        "plain": [10.0, 10.0, 12.0],
        "ideal": [4.0, 5.0, 6.0],
        "windowed": [5.0, 6.0, 9.0],
        "ideal-stage": [2.0, 2.0, 2.0],
        "stage": [6.0, 6.0, 6.0],
        "stage-4": [1.0, 1.0, 1.0],
        "todo": [3.0, 3.0, 3.0],
    }
    rows = speed.report(seconds)
    assert rows["windowed"]["share_median"] == (10 - 6) / (10 - 5)
    assert rows["windowed"]["share_min"] == (10 - 5) / (10 - 4)
    assert rows["windowed"]["speed"] == 10 / 6
    assert rows["stage"]["share_median"] == (10 - 6) / (10 - 2)
    assert rows["ideal"]["share_median"] == 1
    assert rows["windowed"]["p20_s"] == pytest.approx(5.4)
    assert rows["windowed"]["p80_s"] == pytest.approx(7.8)
    # Plain and ToDo have no ideal, that of stage-4 was not measured.
    assert {rows[way]["share_median"] for way in ("plain", "todo", "stage-4")} == {None}


def test_no_share_of_next_to_nothing_or_without_plain():
    rows = speed.report({"plain": [1.0, 1.0], "ideal": [0.97, 0.94], "windowed": [0.5, 0.5]})
    assert rows["windowed"]["share_median"] is None
    assert rows["windowed"]["share_min"] == pytest.approx(0.5 / 0.06)
    rows = speed.report({"ideal": [1.0, 1.0], "windowed": [2.0, 2.0]})
    assert rows["windowed"]["share_median"] is None
    assert rows["windowed"]["speed"] is None


@pytest.mark.parametrize("late", [False, True])
def test_a_way_that_fails_does_not_lose_the_others(late, tmp_path, monkeypatch, capsys):
    calls = []

    def work_once(x):
        if calls:
            raise RuntimeError("\n  out of luck\nmore")
        calls.append(x)
        return (x,)

    def fail(network, setting):
        if not late:
            raise NotImplementedError("not today")
        network.forward = work_once

    monkeypatch.setitem(ways.WAYS, "ideal", ways.Way("fails", fail, None, "ideal"))
    rows = bench(tmp_path / "b.csv", "--sizes", "64", "--dtypes", "float32", "--ways", *FEW)
    assert [row["way"] for row in rows] == FEW
    note = "RuntimeError: out of luck" if late else "NotImplementedError: not today"
    assert [row["note"] for row in rows] == ["", note, ""]
    assert rows[1]["median_s"] == rows[1]["error"] == rows[2]["share_median"] == ""
    assert float(rows[2]["speed"]) > 0
    assert note in capsys.readouterr().out


def test_a_failing_plain_leaves_times(tmp_path, monkeypatch):
    def fail(network, setting):
        raise MemoryError("too large")

    monkeypatch.setitem(ways.WAYS, "plain", ways.Way("fails", fail, fail))
    rows = bench(tmp_path / "b.csv", "--sizes", "64", "--dtypes", "float32", "--ways", "ideal")
    assert rows[0]["note"] == "MemoryError: too large"
    assert float(rows[1]["median_s"]) > 0
    assert rows[1]["speed"] == rows[1]["error"] == ""


def test_what_cannot_begin_is_a_row_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "build", lambda setting: torch.zeros(2).view(3))
    rows = bench(tmp_path / "b.csv", "--sizes", "64", "--dtypes", "float32", "--ways", *FEW)
    assert all("is invalid for input of size 2" in row["note"] for row in rows)


def test_the_old_release_is_skipped_where_memory_does_not_suffice(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 5_000)
    rows = bench(
        tmp_path / "b.csv", "--sizes", "64", "--dtypes", "float32", "--ways", "tomesd-0.1.3", "exact"
    )
    assert [row["note"][:7] for row in rows] == ["", "skipped", ""]
    large = models.Setting("unet", "sd15", "float32", 3840, 2176, 0.5, 2, "cpu")
    assert 30 < ways.old_needs(large) / 2**30 < 32
    assert ways.old_needs(models.Setting("unet", "sdxl", "float32", 3840, 2176, 0.5, 2, "cpu")) < 2**31


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sizes", "500"], "500 must be multiples of 64 pixels"),
        (["--sizes", "512x500"], "512x500 must be multiples of 64 pixels"),
        (["--sizes", "0"], "0 must be multiples"),
        (["--sizes", "big"], "'big' is neither a side like 512 nor a size like 3840x2176"),
        (["--ways", "magic"], "invalid choice: 'magic'"),
        (["--ways", "stage"], "no --level block of stage: only of plain, ideal"),
        (["--rounds", "1"], "--rounds: 1 must be at least 2"),
        (["--ratios", "1"], "1 must be above 0 and below 1"),
        (["--batch", "0"], "0 must be at least 1"),
        (["--dtypes", "int8"], "invalid choice: 'int8'"),
        (["--csv", "no/where/b.csv"], "--csv: there is no folder no/where"),
        (["--device", "abacus"], "--device: RuntimeError: Expected one of cpu, cuda"),
    ],
)
def test_mistakes_are_named(arguments, says, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def test_commands_are_listed_and_unknown_ones_refused(capsys):
    assert main([]) == 0
    assert {"bench", "plot", "quality"} <= set(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        main(["fly"])
    assert "invalid choice: 'fly'" in capsys.readouterr().err
    assert main(["bench", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(ways.WAYS)


def test_importing_tomesd_stays_light():
    code = (
        "import sys, tomesd\n"
        "assert 'tomesd.bench' not in sys.modules\n"
        "import tomesd.__main__\n"
        "print({'diffusers', 'matplotlib'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


@pytest.mark.parametrize("below", ["share_median", "peak_mib"])
def test_plot(below, tmp_path):
    names = [
        "level",
        "model",
        "dtype",
        "size",
        "ratio",
        "batch",
        "compiled",
        "way",
        *speed.FIGURES,
        "note",
        "device",
    ]
    rows = []
    for size in ("64x64", "128x192"):
        for dtype in ("float32", "bfloat16"):
            for way in (*FEW, "tomesd-0.1.3"):
                row = dict.fromkeys(names, "1") | {
                    "way": way,
                    "dtype": dtype,
                    "size": size,
                    "device": "abacus",
                }
                failed = way == "tomesd-0.1.3" and size == "128x192"
                rows.append(row | dict.fromkeys(speed.FIGURES, "") if failed else row)
    table, picture = tmp_path / "b.csv", tmp_path / "b.png"
    speed.write(rows, table)
    assert main(["plot", str(table), "--out", str(picture), "--below", below]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plot_names_mistakes(tmp_path, capsys):
    empty, other = tmp_path / "empty.csv", tmp_path / "other.csv"
    speed.write([dict.fromkeys(("size", "way", "level", "model", "dtype", *speed.FIGURES), "")], other)
    empty.touch()
    for path, says in [
        (tmp_path / "none.csv", "No such file"),
        (empty, "no column"),
        (other, "no column batch"),
    ]:
        with pytest.raises(SystemExit):
            main(["plot", str(path)])
        assert says in capsys.readouterr().err


def test_views_share_weights_and_nothing_else():
    network = models.build(UNET)
    own = models.view(network)
    assert [p.data_ptr() for p in own.parameters()] == [p.data_ptr() for p in network.parameters()]
    assert not {*map(id, own.modules())} & {*map(id, network.modules())}
    ways.WAYS["windowed"].unet(own, UNET)
    assert not hasattr(network, "_tomesd")


def test_full_models_have_the_right_size_and_finest_attention():
    models_ = {"sd15": 859_520_964, "sdxl": 2_567_463_684}
    D = models.import_diffusers()
    for name, parameters in models_.items():
        model = models.MODELS[name]
        with torch.device("meta"):
            unet = D.UNet2DConditionModel(**model.config)
        assert sum(p.numel() for p in unet.parameters()) == parameters
        sites = models.finest(unet, models.Setting("unet", name, "float32", 1024, 512, 0.5, 2, "cpu"))
        assert {(s.h, s.w) for s in sites} == {(64 // model.downsample, 128 // model.downsample)}
        assert {(s.attention.heads, s.attention.to_q.in_features) for s in sites} == {
            (model.heads, model.channels)
        }


def test_networks_are_the_same_each_time_and_finite():
    first, second = (models.build(UNET) for _ in range(2))
    (args, kwargs), (again, _) = models.inputs(UNET), models.inputs(UNET)
    assert torch.equal(args[0], again[0])
    with torch.no_grad():
        output = first(*args, **kwargs)[0]
        assert torch.equal(output, second(*args, **kwargs)[0])
    assert torch.isfinite(output).all()
    assert 0.01 < output.std() < 10
    for name, module in first.named_modules():
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name


def attention_and_tokens() -> tuple[models.Block, torch.Tensor, int, int]:
    block = models.build(BLOCK)
    (x,), _ = models.inputs(BLOCK)
    h, w = BLOCK.finest
    assert (h, w) == (16, 24)
    return block, x, h, w


@torch.no_grad()
def test_todo_takes_keys_from_every_second_token():
    block, x, h, w = attention_and_tokens()
    plain = block(x)[0]
    fewer = torch.stack([x[:, i * w + j] for i in range(0, h, 2) for j in range(0, w, 2)], dim=1)
    wanted = block.attn1(x, encoder_hidden_states=fewer)
    handles = ways.apply_todo(block, BLOCK)
    torch.testing.assert_close(block(x)[0], wanted)
    for handle in handles:
        handle.remove()
    assert not block.attn1._forward_pre_hooks
    assert torch.equal(block(x)[0], plain)


@torch.no_grad()
def test_hypertile_attends_within_tiles():
    block, x, h, w = attention_and_tokens()
    plain = block(x)[0]
    wanted = torch.empty_like(x)
    for top in range(0, h, 8):
        for left in range(0, w, 8):
            place = [i * w + j for i in range(top, top + 8) for j in range(left, left + 8)]
            wanted[:, place] = block.attn1(x[:, place])
    handles = ways.apply_hypertile(block, BLOCK, side=8)
    torch.testing.assert_close(block(x)[0], wanted)
    for handle in handles:
        handle.remove()
    assert not block.attn1._forward_pre_hooks
    assert not block.attn1._forward_hooks
    assert torch.equal(block(x)[0], plain)


def test_tiles():
    sides = {64: 32, 96: 32, 272: 34, 480: 32, 48: 24, 32: 32, 8: 8}
    assert {side: ways.tile(side, 32) for side in sides} == sides
    with pytest.raises(ValueError, match="16 x 24 tokens is a single tile"):
        ways.apply_hypertile(models.build(BLOCK), BLOCK)


@torch.no_grad()
def test_both_act_at_the_finest_level_of_a_unet_alone():
    network = models.build(UNET)
    args, kwargs = models.inputs(UNET)
    plain = network(*args, **kwargs)[0]
    finest = {site.attention for site in models.finest(network, UNET)}
    assert len(finest) == 6  # three transformers of two blocks
    for apply in (ways.apply_todo, lambda *about: ways.apply_hypertile(*about, side=8)):
        handles = apply(network, UNET)
        hooked = {module for module in network.modules() if module._forward_pre_hooks}
        assert hooked == finest
        assert not torch.equal(network(*args, **kwargs)[0], plain)
        for handle in handles:
            handle.remove()
        assert torch.equal(network(*args, **kwargs)[0], plain)


@pytest.mark.parametrize("r", [0, 3, 10, 13])
def test_sliced_gives_every_token_a_value(r):
    x = torch.randn(2, 17, 4)
    cut = ways.Sliced(17, r)
    merged = cut.merge(x)
    assert torch.equal(merged, x[:, : 17 - r])
    assert torch.equal(cut.unmerge(merged), x[:, torch.arange(17) % (17 - r)])


def test_a_plan_merges_as_much_as_the_ideal():
    (x,), _ = models.inputs(BLOCK)
    grid = Grid(*BLOCK.finest)
    for matching in ("exact", "windowed"):
        assert (
            ways.plan(BLOCK, x, matching=matching).groups
            == ways.Sliced(x.shape[1], grid.r(0.5)).groups
            == 192
        )


def test_ops_are_counted():
    x = torch.zeros(2, 3)
    assert speed.count(lambda: (x + 1).relu()) == 2
    assert speed.count(lambda: None) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_that_of_the_call_alone():
    held = torch.zeros(1 << 22)  # 16 MiB that stand before
    assert memory.peak(lambda: None, "cpu") in (None, pytest.approx(0, abs=2))
    assert memory.peak(lambda: held + 1, "cpu") in (None, pytest.approx(16, abs=2))


def test_compiled_calls_do_as_eager_ones_and_share_nothing(monkeypatch):
    make = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda call, fullgraph: make(call, fullgraph=fullgraph, backend="eager")
    )
    network = models.build(BLOCK)
    args, kwargs = models.inputs(BLOCK)
    recompile()
    # With a limit of one, a second network that fell back on the first one's code would be an error.
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1):
        for way in ("plain", "ideal", "windowed", "todo"):
            own = models.view(network)
            ways.WAYS[way].block(own, BLOCK)
            call = speed.alone(own)
            for _ in range(2):
                torch.testing.assert_close(call(*args, **kwargs)[0], own(*args, **kwargs)[0])


def test_errors_of_diffusers_say_what_to_do(monkeypatch):
    def fail(error):
        def load(name):
            raise error

        monkeypatch.setattr(models.importlib, "import_module", load)
        with pytest.raises(SystemExit) as stop:
            models.import_diffusers()
        return str(stop.value)

    assert "pip install 'tomesd[bench]'" in fail(ModuleNotFoundError("no", name="diffusers"))
    error = RuntimeError("Failed to import diffusers.loaders.peft")
    error.__cause__ = ModuleNotFoundError("Could not import module")
    error.__cause__.__context__ = RuntimeError("operator torchvision::nms does not exist")
    assert "install the torchvision that belongs to torch" in fail(error)
    monkeypatch.setattr(models.importlib, "import_module", lambda name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        models.import_diffusers()


def test_peers_that_cannot_be_had_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    pip = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(peers.subprocess, "run", lambda *args, **kwargs: pip)
    with pytest.raises(peers.Unavailable, match=r"tomesd==0\.1\.3 \(no network\?\): ERROR: No matching"):
        peers.fetch("tomesd")
    with pytest.raises(SystemExit, match="no network"):
        peers.main()


def test_quick_leaves_what_was_given(monkeypatch):
    seen: list[argparse.Namespace] = []

    def look(network, setting, names, args, bar):
        seen.append(setting)
        rounds.append(args.rounds)
        return [{"way": name, **dict.fromkeys(speed.FIGURES), "note": ""} for name in names]

    rounds: list[int] = []
    monkeypatch.setattr(speed, "measure", look)
    main(["bench", "--model", "tiny", "--quick", "--sizes", "128"])
    assert {(s.width, s.dtype) for s in seen} == {(128, "float32"), (128, "bfloat16")}
    assert set(rounds) == {3}
