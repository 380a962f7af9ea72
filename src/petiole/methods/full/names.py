"""Which of a backbone's own parameters: all, biases, norms. Task heads are left out; they train as copies of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from petiole.anatomy import Anatomy, Site


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


def of_site(site: Site, model: nn.Module) -> Iterator[str]:
    """Every parameter of the module at a site."""
    yield from (f"{site.path}.{name}" for name, _ in model.get_submodule(site.path).named_parameters())


def final_norms(anatomy: Anatomy, model: nn.Module, stacks: Iterable[str]) -> Iterator[str]:
    """Of the norms behind the last blocks of these stacks."""
    for name in sorted(stacks):
        if (norm := anatomy.final_norm(anatomy.stack(name))) is not None:
            yield from of_site(norm, model)


def norm_before(anatomy: Anatomy, sublayer: Site) -> Site | None:
    """The norm of a block whose output a sub-layer reads; None where there is none, as at the beginning of a post-norm stack."""
    blocks = anatomy.stack(sublayer.stack).blocks
    block, own = blocks[sublayer.depth], sublayer.at("output")
    parts = [site.at("output") for site in block.sublayers]
    norms = [site for site in block.sites if site.role == "norm" and not site.within]
    i = parts.index(own)
    if anatomy.closing_norm(own) is not None:
        before = anatomy.closing_norm(blocks[own.depth - 1].sublayers[-1]) if own.depth else None
        return norms[i - 1] if i else before
    return norms[i] if len(norms) == len(parts) else None
