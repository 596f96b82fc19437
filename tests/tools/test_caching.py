"""Scripts that try tomesd beside caches and in training."""

import csv

import caching
import pytest
import tiny
import torch
import training

import tomesd


@pytest.fixture
def tiny_model(monkeypatch):
    for script in (caching, training):
        monkeypatch.setattr(script, "load_pipeline", lambda *_: tiny.sd(unet=tiny.small_unet()))


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_caching_and_merging_save_more_together(tiny_model, monkeypatch, tmp_path, capsys):
    tiny.peer("DeepCache")
    both = {"plain": None, "Merge(0.5)": tomesd.Merge(0.5)}
    monkeypatch.setattr(caching, "METHODS", both)
    monkeypatch.setattr(caching, "CACHES", {"none": None, "deepcache 2": 2, "guidance to 0.5": 0.5})
    call = ["--prompts", "a cat", "--steps", "2", "--rounds", "1", "--csv", str(tmp_path / "rows.csv")]
    assert caching.main(call) == 0
    rows = {(row["cache"], row["method"]): row for row in read(tmp_path / "rows.csv")}
    assert len(rows) == 6
    fewer = {key: float(row["fewer"]) for key, row in rows.items()}
    errors = {key: float(row["error"]) for key, row in rows.items()}
    plain = "none", "plain"
    assert (fewer.pop(plain), errors.pop(plain)) == (1, 0)
    assert min(fewer.values()) > 1
    assert min(errors.values()) > 0
    for cache in ("deepcache 2", "guidance to 0.5"):
        assert fewer[cache, "Merge(0.5)"] > max(fewer[cache, "plain"], fewer["none", "Merge(0.5)"])
    assert "guidance to 0.5" in capsys.readouterr().out


def test_flops_are_those_of_attention_and_of_matrices():
    unet = tiny.small_unet()
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    x = torch.randn(1, 100, 16)
    with torch.no_grad():
        assert caching.flops_of(attn, lambda: attn(x)) == 2 * 100 * 16 * (4 * 16 + 2 * 100)
    assert "forward" not in vars(attn)


def test_training_learns_the_same_with_merging(tiny_model, tmp_path, capsys):
    call = ["--steps", "2", "--batch", "1", "--methods", "plain", "SampleKeys(0.5)", "--max-downsample", "1"]
    assert training.main([*call, "--csv", str(tmp_path / "losses.csv")]) == 0
    rows = read(tmp_path / "losses.csv")
    assert len(rows) == 2 * 2 * 2
    losses = {(row["what"], row["method"], row["step"]): float(row["loss"]) for row in rows}
    for (what, method, step), loss in losses.items():
        plain = losses[what, "plain", step]
        assert abs(loss - plain) < 0.1 * plain
        assert (loss == plain) == (method == "plain")
    assert "unpatched" in capsys.readouterr().out
