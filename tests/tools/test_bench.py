"""`tomesd bench` and `plot`, and the rivals of scripts/bench, on networks of a few channels."""

import csv
import itertools
import math
import sys

import pytest
import rivals
import torch
from tiny import peer

import tomesd
from tomesd.__main__ import main
from tomesd.commands import bench, common, memory, models, plot, runs
from tomesd.commands.ways import WAYS, Sliced, Way, at
from tomesd.hosts.hooks import show_hooks_to_compile

FEW = ["plain", "ideal", "windowed"]
BLOCK = models.Setting("block", "tiny", "float32", 192, 128, 0.5, 2, "cpu")
UNET = models.Setting("unet", "tiny", "float32", 192, 128, 0.5, 2, "cpu")


def bench_tiny(path, *arguments: str, ways=WAYS) -> list[dict[str, str]]:
    """The rows of a run on the tiny model."""
    call = ["--model", "tiny", "--rounds", "2", "--device", "cpu", "--csv", str(path), *arguments]
    code = bench.main(call, ways=ways)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert code == (0 if any(not row["note"] for row in rows) else 1)
    return rows


@pytest.mark.parametrize("level", ["block", "unet"])
def test_every_way_is_measured(level, tmp_path, capsys):
    peer("tomesd", alias="tomesd_0_1_3")
    # A side of 640 pixels is 80 tokens: two tiles of HyperTile.
    size = "640x128" if level == "block" else "640x64"
    call = ["--level", level, "--sizes", size, "--dtypes", "float32"]
    rows = bench_tiny(tmp_path / "b.csv", *call, ways=rivals.ALL)
    assert [row["way"] for row in rows] == at(level, rivals.ALL)
    assert len(rows) == {"block": 12, "unet": 22}[level]
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
    assert all(f"\n{way} " in output for way in at(level, rivals.ALL))
    assert output.splitlines()[-1].startswith("device ")


def test_a_row_for_each_setting(tmp_path):
    rows = bench_tiny(
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
    rows = runs.report(seconds, {name: rivals.ALL[name].ideal for name in seconds})
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
    ideals = dict.fromkeys(FEW, "ideal")
    rows = runs.report({"plain": [1.0, 1.0], "ideal": [0.97, 0.94], "windowed": [0.5, 0.5]}, ideals)
    assert rows["windowed"]["share_median"] is None
    assert rows["windowed"]["share_min"] == pytest.approx(0.5 / 0.06)
    rows = runs.report({"ideal": [1.0, 1.0], "windowed": [2.0, 2.0]}, ideals)
    assert rows["windowed"]["share_median"] is None
    assert rows["windowed"]["speed"] is None


@pytest.mark.parametrize("late", [False, True])
def test_a_way_that_fails_does_not_lose_the_others(late, tmp_path, capsys):
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

    ways = {**WAYS, "ideal": Way("fails", "k", fail, block=True, ideal="ideal")}
    rows = bench_tiny(tmp_path / "b.csv", "--sizes", "64", "--dtypes", "float32", "--ways", *FEW, ways=ways)
    assert [row["way"] for row in rows] == FEW
    note = "RuntimeError: out of luck" if late else "NotImplementedError: not today"
    assert [row["note"] for row in rows] == ["", note, ""]
    assert rows[1]["median_s"] == rows[1]["error"] == rows[2]["share_median"] == ""
    assert float(rows[2]["speed"]) > 0
    assert note in capsys.readouterr().out


def test_a_failing_plain_leaves_times(tmp_path):
    def fail(network, setting):
        raise MemoryError("too large")

    ways = {**WAYS, "plain": Way("fails", "k", fail, block=True)}
    rows = bench_tiny(
        tmp_path / "b.csv", "--sizes", "64", "--dtypes", "float32", "--ways", "ideal", ways=ways
    )
    assert rows[0]["note"] == "MemoryError: too large"
    assert float(rows[1]["median_s"]) > 0
    assert rows[1]["speed"] == rows[1]["error"] == ""


def test_what_cannot_begin_is_a_row_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "build", lambda setting: torch.zeros(2).view(3))
    rows = bench_tiny(tmp_path / "b.csv", "--sizes", "64", "--dtypes", "float32", "--ways", *FEW)
    assert all("is invalid for input of size 2" in row["note"] for row in rows)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sizes", "500"], "--sizes 500x500: 500 is not a multiple of 64; take 448 or 512"),
        (["--sizes", "512x500"], "--sizes 512x500: 500 is not a multiple of 64"),
        (["--sizes", "0"], "'0' is neither a side like 512 nor a size like 3840x2176"),
        (["--sizes", "big"], "'big' is neither a side like 512 nor a size like 3840x2176"),
        (["--ways", "magic"], "invalid choice: 'magic'"),
        (["--ways", "stage"], "no --level block of stage: only of plain, ideal"),
        (["--rounds", "1"], "--rounds: 1 must be at least 2"),
        (["--ratios", "1"], "1 must be above 0 and below 1"),
        (["--batch", "0"], "'0' is not a whole number of at least 1"),
        (["--dtypes", "int8"], "invalid choice: 'int8'"),
        (["--csv", "no/where/b.csv"], "--csv: there is no folder no/where"),
        (["--device", "abacus"], "--device abacus: there is no such device"),
    ],
)
def test_mistakes_are_explained_in_one_line(arguments, says, capsys):
    assert main(["bench", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tomesd bench: error: ")
    assert says in line


def test_ways_are_listed(capsys):
    assert main(["bench", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(WAYS)


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
        *bench.FIGURES,
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
                rows.append(row | dict.fromkeys(bench.FIGURES, "") if failed else row)
    table, picture = tmp_path / "b.csv", tmp_path / "b.png"
    common.write_csv(rows, table)
    assert main(["plot", str(table), "--out", str(picture), "--below", below]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_no_two_ways_look_alike_in_a_plot():
    from matplotlib.colors import to_rgb

    colours = {
        name: torch.tensor(to_rgb(way.colour)) for name, way in rivals.ALL.items() if "ideal" not in name
    }
    for a, b in itertools.combinations(colours, 2):
        assert torch.dist(colours[a], colours[b]) > 0.2, f"{a} and {b}"


def test_plot_names_mistakes(tmp_path, capsys):
    empty, other = tmp_path / "empty.csv", tmp_path / "other.csv"
    common.write_csv([dict.fromkeys(("size", "way", "level", "model", "dtype", *bench.FIGURES), "")], other)
    empty.touch()
    row = dict.fromkeys((*plot.PANEL, "size", "way", *bench.FIGURES), "1")
    odd, words = tmp_path / "odd.csv", tmp_path / "words.csv"
    common.write_csv([row, row | {"size": "sixty"}], odd)
    common.write_csv([row | {"speed": "fast"}], words)
    for path, says in [
        (tmp_path / "none.csv", "No such file"),
        (empty, "no column"),
        (other, "no column batch"),
        (odd, "odd.csv, line 3: not of `bench --csv`: 'sixty' is neither a side"),
        (words, "words.csv, line 2: not of `bench --csv`: could not convert string to float: 'fast'"),
    ]:
        assert main(["plot", str(path)]) == 2
        assert says in capsys.readouterr().err


def test_views_share_weights_and_nothing_else():
    network = models.build(UNET)
    own = common.view(network)
    assert [p.data_ptr() for p in own.parameters()] == [p.data_ptr() for p in network.parameters()]
    assert not {*map(id, own.modules())} & {*map(id, network.modules())}
    WAYS["windowed"].patch(own, UNET)
    assert {row.left_alone for row in tomesd.explain(network).rows} == {"not patched"}


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


@pytest.mark.parametrize("r", [0, 3, 10, 13])
def test_sliced_gives_every_token_a_value(r):
    x = torch.randn(2, 17, 4)
    cut = Sliced(17, r)
    merged = cut.merge(x)
    assert torch.equal(merged, x[:, : 17 - r])
    assert torch.equal(cut.unmerge(merged), x[:, torch.arange(17) % (17 - r)])


def test_a_plan_merges_as_much_as_the_ideal():
    (x,), _ = models.inputs(BLOCK)
    for way in ("ideal", "exact", "windowed"):
        block = models.build(BLOCK)
        WAYS[way].patch(block, BLOCK)
        seen = []
        block.attn1.to_q.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0].shape[1]))
        block(x)
        assert seen == [192]


def test_ops_are_counted():
    x = torch.zeros(2, 3)
    assert bench.count(lambda: (x + 1).relu()) == 2
    assert bench.count(lambda: None) == 0


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
    show_hooks_to_compile("bench")
    # With a limit of one, a second network that fell back on the first one's code would be an error.
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1):
        for way in ("plain", "ideal", "windowed", "todo"):
            own = common.view(network)
            rivals.ALL[way].patch(own, BLOCK)
            call = runs.alone(own)
            for _ in range(2):
                torch.testing.assert_close(call(*args, **kwargs)[0], own(*args, **kwargs)[0])


def test_quick_leaves_what_was_given():
    args = bench.make_parser("", WAYS).parse_args(["--quick", "--sizes", "128"])
    bench.check(args, WAYS)
    assert (args.sizes, args.dtypes, args.rounds) == ([(128, 128)], ["float32", "bfloat16"], 3)
