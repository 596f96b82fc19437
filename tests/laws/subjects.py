"""What the laws are about: a tiny real model of every family, and how to call, patch and break it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import tiny_vit
import torch
from torch import Tensor, nn

import tomesd
import tomesd.vit as tome
from tomesd.hosts.unets import find_networks


@dataclass(frozen=True)
class Subject:
    """A family of models.

    Args:
        name: of the family.
        build: makes a model.
        call: its output for `b` samples, `call(model, b)`; more arguments give other inputs.
        options: ways to patch it, by name.
        patch: `patch(model, options)` patches it; `strength=0` so that nothing merges.
        remove: takes the patch off.
        inside: a module that runs in the middle of a forward.
        checkpoint: `checkpoint(model, on)` switches activation checkpointing, or skips the test.
        plain: whether the unpatched model compiles to one graph and runs in bfloat16.
        travels: whether what one forward has planned travels with it, so that several may run before a
            backward.
    """

    name: str
    build: Callable[[], nn.Module]
    call: Callable[..., Tensor]
    options: dict[str, Any]
    patch: Callable[..., Any]
    remove: Callable[[nn.Module], Any]
    inside: Callable[[nn.Module], nn.Module]
    checkpoint: Callable[[nn.Module, bool], None]
    plain: bool = True
    travels: bool = True


def weights(model: nn.Module) -> list[nn.Parameter]:
    """Weights whose gradients are compared."""
    queries = [p for name, p in model.named_parameters() if "to_q" in name or "qkv" in name]
    return queries or [p for p in model.parameters() if p.dim() > 1 and p.requires_grad]


METHODS = {
    "merge": tomesd.Merge(0.5),
    "merge all parts": tomesd.Merge(0.5, parts=("attn", "cross", "mlp")),
    "exact": tomesd.Merge(0.5, matching="exact"),
    "proportional": tomesd.Merge(0.5, parts=("attn", "cross"), prop_attn=True),
    "as tomesd 0.1.3": tomesd.Merge(0.5, prop_attn=False, unmerge="copy"),
    "sample": tomesd.SampleKeys(0.5),
    "merge keys": tomesd.MergeKeys(0.5),
    "stage": tomesd.MergeStage(0.5),
    "stage, not weighed": tomesd.MergeStage(0.5, prop_attn=False),
}
# The first of each type, for laws that take long: what one does in them the others of its type do too.
QUICK = {type(method): name for name, method in reversed(METHODS.items())}.values()
LAYERS: dict[str, dict[str, Any]] = {
    "layers": {},
    "as ToMe": {"metric": "keys", "mode": "mean"},
    "without sizes": {"prop_attn": False},
}
SCHEDULE = [7, 0, 9, 40]


def patch_unet(model: nn.Module, method: tomesd.Method, strength: float = 1, **options: Any) -> None:
    weaker = type(method).from_dict({**method.to_dict(), "ratio": strength * method.ratio})
    tomesd.apply_patch(model, weaker, **options)


def patch_vit(model: nn.Module, options: dict[str, Any], strength: float = 1) -> None:
    tome.apply_patch(model, **options)
    model.r = [int(strength * r) for r in SCHEDULE]


def checkpoint_unet(model: nn.Module, on: bool) -> None:
    if getattr(model, "_supports_gradient_checkpointing", False):
        (model.enable_gradient_checkpointing if on else model.disable_gradient_checkpointing)()
        return
    flags = [(m, n) for m in model.modules() for n in ("checkpoint", "use_checkpoint") if hasattr(m, n)]
    if not flags:
        pytest.skip("the network itself cannot checkpoint")
    for module, name in flags:
        setattr(module, name, on)


def fits(case: tiny.Case, method: tomesd.Method) -> bool:
    """Whether a network can have a method."""
    weighs = getattr(method, "prop_attn", False) or isinstance(method, tomesd.MergeKeys)
    other_keys = isinstance(method, tomesd.SampleKeys | tomesd.MergeKeys)
    return (case.bias or not weighs) and (case.keys or not other_keys)


def layers_of(case: tiny_vit.Case) -> dict[str, dict[str, Any]]:
    """The ways to patch a vision transformer."""
    as_tome = {"mode": "mean", "metric": "keys" if case.keys else "tokens"}
    return {**LAYERS, "as ToMe": as_tome} if case.sizes else {"layers": {}, "as ToMe": as_tome}


def checkpoint_vit(model: nn.Module, on: bool) -> None:
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(on)
    elif hasattr(model, "gradient_checkpointing_enable"):
        (model.gradient_checkpointing_enable if on else model.gradient_checkpointing_disable)()
    else:
        pytest.skip("the network itself cannot checkpoint")


def subjects() -> Iterator[Subject]:
    for name, case in tiny.CASES.items():
        yield Subject(
            name,
            case.build,
            case,
            {option: method for option, method in METHODS.items() if fits(case, method)},
            patch_unet,
            tomesd.remove_patch,
            lambda model: find_networks(model)[0].sites[0].part("attn"),
            checkpoint_unet,
            plain=case.plain,
            travels=case.travels,
        )
    for name, vit in tiny_vit.CASES.items():
        yield Subject(
            name,
            vit.build,
            vit,
            layers_of(vit),
            patch_vit,
            tome.remove_patch,
            lambda model, vit=vit: next(vit.blocks(model)[2].children()),
            checkpoint_vit,
        )


@torch.no_grad()
def runs(subject: Subject) -> bool:
    """Whether the plain model can be made and called with the packages that are installed."""
    try:
        subject.call(subject.build())
    except Exception as error:
        print(f"left out: {subject.name}, whose plain model fails: {str(error).splitlines()[0]}")
        return False
    return True


SUBJECTS = {subject.name: subject for subject in subjects()}
if "TOMESD_FLOOR" in os.environ:  # scripts/floor.sh: old packages lack classes, or are called in other ways
    SUBJECTS = {name: subject for name, subject in SUBJECTS.items() if runs(subject)}


def traces(model: nn.Module) -> list[Any]:
    """Everything on a model that tomesd could have left there: not hooks that transformers has."""
    found: list[Any] = []
    for module in model.modules():
        found += [name for name in vars(module) if "tome" in name or name == "r"]
        found += [
            hook
            for name, hooks in vars(module).items()
            if name.endswith("_hooks")
            for hook in hooks.values()
            if not str(getattr(hook, "__module__", "")).startswith("transformers")
        ]
    return found


def gradients(subject: Subject, model: nn.Module, *calls: dict[str, Any]) -> list[Tensor | None]:
    """Gradients of the summed outputs of some calls."""
    torch.manual_seed(0)  # of stochastic depth
    loss = torch.stack([subject.call(model, **call).square().mean() for call in calls or ({},)]).sum()
    return list(torch.autograd.grad(loss, weights(model), allow_unused=True))
