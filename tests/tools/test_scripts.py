"""Scripts that count and time what large pictures and vision transformers take."""

import csv
import os
import subprocess
from pathlib import Path

import attention
import count
import matchers
import pytest
import roofline
import step_4k
import tiny
import tiny_vit
import torch
import transformers
import validate
import vit
from diffusers.models.attention_processor import Attention
from PIL import Image

import tomesd.vit as tome
from tomesd.commands import memory, models
from tomesd.commands.models import smooth
from tomesd.maths.grid import alternate
from tomesd.maths.matching import match_exact


def test_what_a_step_costs_is_counted():
    setting = models.Setting("unet", "tiny", "bfloat16", 192, 128, 0.75, 2, "meta")
    network = models.build(setting)
    plain, merged = (count.count(network, name, setting) for name in ("plain", "4k"))
    n = 24 * 16
    # Three transformers of two blocks at the finest level with 16 channels, one in the middle with 32.
    own = 2 * 4 * (6 * n**2 * 16 + 2 * (n // 4) ** 2 * 32)
    text = 2 * 4 * 77 * (6 * n * 16 + 2 * (n // 4) * 32)
    assert plain.attention == own + text
    assert merged.attention == 2 * (own // 16) + text  # a sixteenth of the keys, and as many probes
    assert merged.conv == plain.conv
    assert 0 < count.count(network, "4k-stage", setting).matrices < merged.matrices
    # At least the two halves of what the first feed-forward makes, and its input.
    assert plain.memory > 2 * 2 * n * (8 + 1) * 16
    spared = count.count(network, "plain", setting, spare=True)
    assert (spared.matrices, spared.attention) == (plain.matrices, plain.attention)
    assert spared.memory < plain.memory


def test_what_is_alive_is_counted_once_and_forgotten():
    with count.Alive() as alive:
        a = torch.empty(100, device="meta")
        a.view(10, 10).add_(1)
        b = a + 1
        del a, b
        torch.empty(50, device="meta")
    assert (alive.peak, alive.now) == (800, 0)


def test_a_step_of_the_shipped_model_in_each_way(capsys):
    tiny.peer("tomesd", alias="tomesd_0_1_3")
    step_4k.main(["--latents", "32x16", "--rounds", "2"])
    first, *ways, plan = capsys.readouterr().out.strip().split("\n")
    assert first.startswith("32x16 latents, 512 tokens at the finest level, 2 images")
    assert [line.split(":")[0] for line in ways] == list(step_4k.WAYS)
    errors = [float(line.split("error ")[1]) for line in ways]
    assert errors[0] == 0
    assert all(0 < error < 1 for error in errors[1:])
    assert plan.startswith("one plan: ")


def test_the_old_release_is_left_out_where_its_similarities_do_not_fit(monkeypatch, capsys):
    monkeypatch.setattr(memory, "available", lambda device: 100)
    step_4k.main(["--latents", "16x16", "--ways", "tomesd 0.1.3", "4k"])
    _, old, ours, _ = capsys.readouterr().out.strip().split("\n")
    assert old.startswith("tomesd 0.1.3: skipped: needs about")
    assert ours.startswith("4k: ")


@pytest.mark.parametrize("prefix", [0, 1])
def test_each_method_errs_as_it_should_on_an_attention(prefix):
    torch.manual_seed(0)
    attn = Attention(16, heads=2, dim_head=8, bias=True).eval()
    block = smooth(2, 16, 16, 16).flatten(2).mT
    block = torch.cat([torch.randn(2, prefix, 16), block], 1)
    x = torch.nn.functional.layer_norm(block, (16,))
    out = attn.to_out[0]
    layers = attention.Layers(
        attn.to_q.weight, attn.to_q.bias, attn.to_k.weight, attn.to_v.weight, out.weight, 2, 8**-0.5
    )
    biases = attn.to_k.bias, attn.to_v.bias, out.bias
    case = attention.Case("tiny", block, x, layers, biases, 16, 16, 5, prefix)
    with torch.no_grad():
        torch.testing.assert_close(case.attend(x), attn(x))
        errors = attention.errors_of([case], {**attention.WAYS, **attention.FITS}, [0.5])
    assert all(0 < error < 1 for (error,) in errors.values())
    error = {name: error for (_, _, name), (error,) in errors.items()}
    assert error["Merge"] < error['Merge, unmerge="copy"']
    assert error["SampleKeys"] < error["SampleKeys, probes=0"]
    assert error["MergeKeys"] < error["MergeKeys, probes=0"]


def test_a_vision_transformer_is_timed_in_each_way(tmp_path, capsys):
    table, plot = tmp_path / "v.csv", tmp_path / "v.png"
    call = ["--models", "vit_tiny_patch16_224@64", "--batches", "1", "--dtypes", "float32", "--rounds", "2"]
    assert vit.main([*call, "--device", "cpu", "--csv", str(table), "--plot", str(plot)]) == 0
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["way"] for row in rows] == ["plain", "ours, default", "ours, prop_attn=False", "ideal"]
    assert [row["note"] for row in rows] == [""] * 4
    assert all(float(row["speedup"]) > 0 for row in rows)
    assert float(rows[0]["error"]) == 0 < float(rows[1]["error"]) < 1
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "vit_tiny_patch16_224, size 64, dtype float32" in capsys.readouterr().out


@pytest.mark.parametrize("way", matchers.WAYS)
def test_tokens_are_matched_in_each_way(way):
    metric, sizes = torch.randn(2, 17, 8), torch.randint(1, 9, (2, 17))
    attention = torch.rand(2, 16)
    token_map = matchers.matched(way, metric, sizes, 1, 5, depth=0.5, attention=attention)
    assert token_map.groups == 12
    assert (token_map.keep[:, 0] == 0).all()
    assert (token_map.sizes[:, 0] == 1).all()
    leaves = torch.ones(2, 17, dtype=torch.bool).scatter(1, token_map.keep, False)
    joined = torch.zeros(2, 17, dtype=torch.bool).scatter(1, token_map.keep, token_map.sizes > 1)
    ours = match_exact(metric, alternate(17, 1), 5).index
    if way == "alternating":
        assert torch.equal(token_map.index, ours)
    if way in ("ward", "ranked"):  # tokens of one size merge as ours do
        alike = matchers.matched(way, metric, torch.ones_like(sizes), 1, 5, depth=0.5)
        assert torch.equal(alike.index, ours)
    for i in range(2):
        if way == "sizes":  # no token leaves that is larger than one that others join
            assert sizes[i, leaves[i]].max() <= sizes[i, joined[i]].min()
        if way == "attention":
            assert attention[i, leaves[i, 1:]].max() < attention[i, ~leaves[i, 1:]].min()


@pytest.mark.parametrize("way", ["alternating", "attention"])
def test_a_real_model_merges_in_other_ways(way):
    """Those of ours are the same to rounding; what the class token attends to least has no weight left."""
    model = tome.apply_patch(tiny_vit.CASES["timm ViT"].build(), trace_source=True)
    model.r = [5, 5, 0, 0]
    x = torch.randn(2, 3, tiny_vit.SIDE, tiny_vit.SIDE)
    with torch.no_grad():
        ours = model.forward_features(x)
        with matchers.merging(model, way):
            other = model.forward_features(x)
        again = model.forward_features(x)
    assert torch.equal(ours, again)
    assert tome.source(model).groups == 55
    if way == "alternating":
        torch.testing.assert_close(other, ours)
    else:
        assert not torch.allclose(other, ours, atol=1e-3)


def test_parts_of_the_gpu_benchmark_go_on_where_one_fails(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@" >> calls\ncase "$*" in *sdxl*) echo broken >&2; exit 3;; esac\n')
    python.chmod(0o755)
    script = Path(__file__).parents[2] / "scripts" / "bench_gpu.sh"

    def run(*parts):
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        call = ["bash", script, "figures", *parts]
        return subprocess.run(
            call, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True
        )

    done = run()
    assert done.returncode == 1
    parts = [line.removeprefix("== ") for line in done.stdout.splitlines() if line.startswith("== ")]
    assert parts == ["unet", "4k", "sdxl", "compiled", "tune", "vit", "ops", "block"]
    assert [line for line in done.stderr.splitlines() if line] == [
        "sdxl failed: broken",
        "compiled failed: broken",
    ]
    assert len((tmp_path / "calls").read_text().splitlines()) == 10
    assert run("ops", "tune").returncode == 0
    refused = run("nonsense", "ops")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "there is no part nonsense, only unet 4k sdxl" in refused.stderr


@pytest.mark.parametrize(
    ("name", "says"),
    [("nope", "timm has no model nope"), ("vit_tiny_patch16@x", "is neither a name nor name@size")],
)
def test_models_that_timm_lacks_are_named(name, says, capsys):
    assert vit.main(["--models", name]) == 2
    assert says in capsys.readouterr().err


def test_a_step_is_modelled_by_data_sheets(capsys):
    small, large = roofline.Card(1e12, 1e12, 1e12), roofline.Card(1e15, 1e15, 1e15)
    call = roofline.Call(2e9, 1_000_000, half=True)
    assert (call.seconds(small), call.seconds(large)) == (2e-3, roofline.LAUNCH)
    assert roofline.Call(0, 1_000_000_000, half=True).seconds(small) == 1e-3
    setting = models.Setting("unet", "tiny", "float16", 192, 128, 0.75, 2, "meta")
    work = roofline.operations_of(models.build(setting), "plain", setting).calls
    network, (args, kwargs) = models.build(setting), models.inputs(setting)
    attention, flops = count.Attention(), count.FlopCounterMode(display=False)
    with torch.no_grad(), attention, flops:
        network(*args, **kwargs)
    assert sum(call.flops for call in work["attention"]) == attention.flops
    done = sum(call.flops for calls in work.values() for call in calls)
    assert done == attention.flops + flops.get_total_flops()
    assert roofline.main(["--models", "tiny", "--sizes", "128", "--ways", "windowed"]) == 0
    printed = capsys.readouterr().out
    assert "a model, not measured" in printed
    assert [line.split()[0] for line in printed.splitlines()[2:4]] == ["plain", "windowed"]


def test_a_classifier_is_judged_on_a_folder_of_pictures(tmp_path, capsys):
    config = transformers.ViTConfig(**tiny_vit.CONFIG, num_labels=3, initializer_range=1.0)
    model = transformers.ViTForImageClassification(config).eval()
    processor = transformers.ViTImageProcessor(size={"height": tiny_vit.SIDE, "width": tiny_vit.SIDE})
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    pictures = [Image.fromarray((torch.rand(40, 50, 3) * 255).byte().numpy()) for _ in range(6)]
    inputs = processor(pictures, return_tensors="pt")
    with torch.no_grad():
        guesses = model(**inputs).logits.argmax(1)
        merged = tome.set_r(tome.apply_patch(model), 9)(**inputs).logits.argmax(1)
    for i, picture in enumerate(pictures):
        (tmp_path / "data" / f"n{i // 2}").mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "data" / f"n{i // 2}" / f"{i}.png")
    call = ["--data", str(tmp_path / "data"), "--model", str(tmp_path / "model"), "--workers", "0"]
    assert validate.main([*call, "--r", "0", "9", "--ways", "ours", "ToMe"]) == 0
    first, *lines = [line.strip() for line in capsys.readouterr().out.splitlines() if "top-1" in line]
    classes = torch.arange(6) // 2
    assert first.startswith(f"plain  top-1 {100 * (guesses == classes).float().mean():.2f}  top-5 100.00")
    assert lines[0].startswith(f"ours, r = 9  top-1 {100 * (merged == classes).float().mean():.2f}")
    assert lines[1].startswith("ToMe, r = 9  top-1 ")


@pytest.mark.parametrize(
    ("script", "call", "says"),
    [
        (vit, "--csv no/where.csv", "argument --csv: there is no folder no"),
        (vit, "--plot x.odd", "argument --plot: the name of x.odd has to end in one of "),
        (vit, "--batches 0", "argument --batches: '0' is not a whole number of at least 1"),
        (vit, "--threads 9999999", "argument --threads: 9999999 is above 1024"),
        (attention, "--ratios 3", "argument --ratios: 3 must be above 0 and below 1"),
        (validate, "--data /nowhere", "argument --data: "),
        (validate, "--data . --r 3:x", "argument --r: '3:x' is no setting; 8, "),
    ],
)
def test_mistakes_at_a_script_are_a_line(script, call, says, capsys):
    assert script.main(call.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
