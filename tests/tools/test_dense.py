"""`python scripts/bench dense`, on a tiny network with random weights."""

import dense
import dinov2
import torch
from timm.models.vision_transformer import VisionTransformer


def test_a_table_of_two_ways(monkeypatch, capsys):
    torch.manual_seed(0)
    sizes = dict(img_size=56, patch_size=14, embed_dim=24, depth=3, num_heads=2)
    monkeypatch.setattr(dinov2, "timm_model", lambda side: VisionTransformer(**sizes).eval())
    monkeypatch.setattr(dinov2, "photographs", lambda names, side: [torch.randn(1, 3, side, side)])
    assert dense.main(["--side", "56", "--r", "0", "3", "4:-1"]) == 0
    _, none, some, early = (line.split() for line in capsys.readouterr().out.splitlines())
    assert none == ["0", "17", "of", "17", "0.0000", "0.0000", "1.0000", "1.0000"]
    assert some[:4] == ["3", "8", "of", "17"]
    assert early[:2] == ["4:-1", "5"]
    assert float(some[5]) < float(some[4])
    assert dense.main(["--side", "57"]) == 2
