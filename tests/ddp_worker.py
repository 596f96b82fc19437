"""What each process of the test of data-parallel training does; new processes import this module alone."""


def train(rank: int, folder: str, schedule: list[int]) -> None:
    from tomesd.commands import mend_torchvision

    mend_torchvision()
    import tiny_vit
    import torch
    import torch.distributed as dist

    import tomesd.vit as tome

    torch.set_num_threads(1)
    # By a file: a port that is free now may be another test's in a moment.
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = tome.apply_patch(tiny_vit.CASES["timm ViT"].build().train())
    model.r = schedule
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    wrapped(tiny_vit.images()[rank : rank + 1]).square().mean().backward()
    if rank == 0:
        torch.save([weight.grad for weight in model.parameters()], f"{folder}/grads.pt")
    dist.destroy_process_group()
