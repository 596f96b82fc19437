"""Which families of vision transformers are known, and their networks in a model."""

from __future__ import annotations

from torch import nn

from . import vits
from .family import Network, find, known
from .refused import why_refused, why_unfit
from .vision import VisionFamily


def register(family: VisionFamily) -> VisionFamily:
    """Makes a family of vision transformers known to `apply_patch`, before those that are known already.

        tome.register(
            tome.VisionFamily(
                "Acme ViT",
                ("AcmeViT",),  # classes of the network, by name; subclasses count
                {
                    "AcmeLayer": tome.Block(  # x = x + attention(norm(x)); x = x + feed(norm_2(x))
                        "norm",
                        tome.Part("attention", tokens="x", bias="bias"),
                        middle="norm_2",  # is given the tokens after attention: here they merge
                        end="feed",  # the last module that sees what the second half adds
                        tokens="x",
                    )
                },
                path="layers",  # the list of its blocks
                prefix=lambda network: 1,  # how many tokens before the patches never merge
            )
        )

    A bias of keys is given as `[B, 1, 1, N]`; leave it out, with `prop_attn=False`, where attention takes
    none. A row checks its fields when it is made. What it says of modules is checked when a model is patched:
    an error then names what is missing.

    Returns:
        The same family.

    Raises:
        TypeError: it is no VisionFamily.
        ValueError: another family has its name.
    """
    if not isinstance(family, VisionFamily):
        raise TypeError(f"expected a VisionFamily, got {type(family).__name__}")
    if any(row.name == family.name for row in vits.FAMILIES):
        raise ValueError(f"there is a family {family.name!r} already")
    vits.FAMILIES.insert(0, family)
    return family


def find_networks(model: object, package: str | None = None) -> list[Network[VisionFamily]]:
    """Every vision transformer of a known family in a module.

    Args:
        package: take only families of this function of `tomesd.vit.patch`.

    Raises:
        TypeError: the model is no module.
        ValueError: it holds no vision transformer of a known family, or one that cannot be merged.
    """
    module = checked(model)
    every = find(module, vits.FAMILIES)
    found = [network for network in every if package in (None, network.family.package)]
    for name, part in module.named_modules():
        reason = why_refused(part)
        if reason is not None:
            others = ", ".join(network.name for network in found)
            raise ValueError(
                f"the tokens of {name or 'this'} {type(part).__name__} cannot be merged: {reason}"
                + (f". Patch the others alone: {others}" if others else "")
            )
    if not found:
        of = f" of {package}" if package else ""
        rows = [row for row in vits.FAMILIES if package in (None, row.package)]
        raise ValueError(
            f"{type(module).__name__} holds no vision transformer{of} that tomesd knows{why_unfit(module)}. "
            f"Known are {known(rows)}; for Stable Diffusion there is tomesd.apply_patch"
        )
    for network in found:
        if not network.sites:
            raise ValueError(f"{network} has no blocks in {network.family.path}")
    return found


def checked(model: object) -> nn.Module:
    """The model, if it is a module; else a TypeError."""
    if isinstance(model, nn.Module):
        return model
    kind = f"the class {model.__name__}: make one first" if isinstance(model, type) else type(model).__name__
    has_one = isinstance(getattr(model, "model", None), nn.Module)  # a pipeline of transformers, say
    instead = "pass its .model" if has_one else "for pipelines there is tomesd.apply_patch"
    raise TypeError(f"expected a torch module, got {kind} ({instead})")
