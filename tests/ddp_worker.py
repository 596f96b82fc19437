"""What each process of the test of data-parallel training does; new processes import this module alone.

So it takes no more than it needs: importing what tests/tiny_vit.py has takes a loaded machine a minute.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import Any

TIMEOUT = timedelta(seconds=60)


def build(schedule: list[int]) -> Any:
    from tomesd.commands import mend_torchvision

    mend_torchvision()
    import timm
    import torch

    import tomesd.vit as tome

    torch.manual_seed(0)
    options = dict(img_size=32, patch_size=4, embed_dim=24, depth=4, num_heads=3, num_classes=10)
    model = tome.apply_patch(timm.models.VisionTransformer(**options))
    model.r = schedule
    return model, torch.randn(2, 3, 32, 32)


def train(rank: int, folder: str, schedule: list[int]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if sys.platform == "linux":
        # By default gloo looks the machine's name up, and waits for addresses that do not answer.
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    model, images = build(schedule)
    # By a file: a port that is free now may be another test's in a moment.
    where = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2, timeout=TIMEOUT)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    wrapped(images[rank : rank + 1]).square().mean().backward()
    if rank == 0:
        torch.save([weight.grad for weight in model.parameters()], f"{folder}/grads.pt")
    dist.barrier()  # who leaves first takes the store along
    dist.destroy_process_group()
