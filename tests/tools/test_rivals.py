"""The rivals of scripts/bench, and where they come from."""

import subprocess
import zipfile
from pathlib import Path

import peers
import pytest
import rivals
import torch

from tomesd.commands import memory, models
from tomesd.commands.runs import patched

BLOCK = models.Setting("block", "tiny", "float32", 192, 128, 0.5, 2, "cpu")
UNET = models.Setting("unet", "tiny", "float32", 192, 128, 0.5, 2, "cpu")


def test_full_models_have_the_right_size_and_finest_attention():
    models_ = {"sd15": 859_520_964, "sdxl": 2_567_463_684}
    import diffusers as D

    for name, parameters in models_.items():
        model = models.MODELS[name]
        with torch.device("meta"):
            unet = D.UNet2DConditionModel(**model.config)
        assert sum(p.numel() for p in unet.parameters()) == parameters
        sites = rivals.finest(unet, models.Setting("unet", name, "float32", 1024, 512, 0.5, 2, "cpu"))
        assert {(s.h, s.w) for s in sites} == {(64 // model.downsample, 128 // model.downsample)}
        assert {(s.module.heads, s.module.to_q.in_features) for s in sites} == {(model.heads, model.channels)}


def test_the_old_release_is_skipped_where_memory_does_not_suffice(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 5_000)
    block = models.build(BLOCK)
    notes = {way: patched(way, rivals.ALL, block, BLOCK).note for way in ("exact", "tomesd-0.1.3")}
    assert notes["exact"] == ""
    assert notes["tomesd-0.1.3"].startswith("skipped: needs about")
    large = models.Setting("unet", "sd15", "float32", 3840, 2176, 0.5, 2, "cpu")
    assert 30 < rivals.needs_of_old(large) / 2**30 < 32
    assert rivals.needs_of_old(models.Setting("unet", "sdxl", "float32", 3840, 2176, 0.5, 2, "cpu")) < 2**31


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
    handles = rivals.apply_todo(block, BLOCK)
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
    handles = rivals.apply_hypertile(block, BLOCK, side=8)
    torch.testing.assert_close(block(x)[0], wanted)
    for handle in handles:
        handle.remove()
    assert not block.attn1._forward_pre_hooks
    assert not block.attn1._forward_hooks
    assert torch.equal(block(x)[0], plain)


def test_tiles():
    sides = {64: 32, 96: 32, 272: 34, 480: 32, 48: 24, 32: 32, 8: 8}
    assert {side: rivals.tile(side, 32) for side in sides} == sides
    with pytest.raises(ValueError, match="16 x 24 tokens is a single tile"):
        rivals.apply_hypertile(models.build(BLOCK), BLOCK)


@torch.no_grad()
def test_both_act_at_the_finest_level_of_a_unet_alone():
    network = models.build(UNET)
    args, kwargs = models.inputs(UNET)
    plain = network(*args, **kwargs)[0]
    finest = {attention.module for attention in rivals.finest(network, UNET)}
    assert len(finest) == 6  # three transformers of two blocks
    for apply in (rivals.apply_todo, lambda *about: rivals.apply_hypertile(*about, side=8)):
        handles = apply(network, UNET)
        hooked = {module for module in network.modules() if module._forward_pre_hooks}
        assert hooked == finest
        assert not torch.equal(network(*args, **kwargs)[0], plain)
        for handle in handles:
            handle.remove()
        assert torch.equal(network(*args, **kwargs)[0], plain)


def test_peers_that_cannot_be_had_say_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    pip = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(peers.subprocess, "run", lambda *args, **kwargs: pip)
    with pytest.raises(peers.Unavailable, match=r"tomesd==0\.1\.3 \(no network\?\): ERROR: No matching"):
        peers.fetch("tomesd")
    assert peers.main([]) == 2
    assert "no network" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_peers_appear_whole_and_by_their_hash_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    commands = []

    def download(command, **kwargs):
        commands.append(command)
        into = Path(command[command.index("--dest") + 1])
        assert into.parent == tmp_path  # beside its place, so that a rename does
        assert "--hash=sha256:abc" in Path(command[-1]).read_text()
        with zipfile.ZipFile(into / "other-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("other/__init__.py", "")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(peers.subprocess, "run", download)
    peer = peers.Peer("other==1", "abc", 90)
    for _ in range(2):
        folder = peers.fetch("other", peer)
    assert "--require-hashes" in commands[0]
    assert len(commands) == 1
    assert [path.relative_to(folder).parts for path in folder.rglob("*.py")] == [("other", "__init__.py")]
    assert list(tmp_path.iterdir()) == [folder]
    assert "downloading other==1 from PyPI (90 MB)" in capsys.readouterr().err
