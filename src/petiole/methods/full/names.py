"""Which of a backbone's own parameters: all, biases, norms. Task heads are left out; they train as copies of their own."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from petiole.anatomy import Anatomy


def outside_heads(anatomy: Anatomy, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Named parameters of the backbone without its task heads and without what petiole added."""
    heads = tuple(f"{site.path}." for site in anatomy.heads())
    for name, parameter in model.named_parameters():
        if not name.startswith(heads) and not any(part.startswith("petiole") for part in name.split(".")):
            yield name, parameter


def biases(anatomy: Anatomy, model: nn.Module) -> Iterator[str]:
    """Every bias vector: of linears, convolutions and norms."""
    for name, parameter in outside_heads(anatomy, model):
        if name.rpartition(".")[2].endswith("bias") and parameter.ndim == 1:
            yield name


def norms(anatomy: Anatomy, model: nn.Module) -> Iterator[str]:
    """Weight and bias of every normalisation layer: a module that holds vectors only and is called a norm."""
    heads = tuple(f"{site.path}." for site in anatomy.heads())
    for path, module in model.named_modules():
        if f"{path}.".startswith(heads):
            continue
        own = list(module.named_parameters(recurse=False))
        called = f"{type(module).__name__} {path.rpartition('.')[2]}".lower()
        norm = own and all(p.ndim == 1 for _, p in own) and not hasattr(module, "in_features")
        if norm and ("norm" in called or "ln" in path.rpartition(".")[2]) and "petiole" not in path:
            yield from (f"{path}.{name}" if path else name for name, _ in own)
