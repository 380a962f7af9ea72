"""Where a number stopped being finite: the input, the weight or the site, and the rows of the batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from petiole.attach import need_host
from petiole.errors import PetioleError
from petiole.junction import of_output
from petiole.proof import some
from petiole.terms import IGNORED


def empty(inputs: Mapping[str, Any], items: Any, like: Tensor) -> Tensor:
    """Whether no label of this step counts, as a tensor beside `like`, so that one look at the device answers two questions."""
    labels = inputs.get("labels")
    if isinstance(items, Tensor):
        none = items == 0
    elif isinstance(labels, Tensor) and not labels.is_floating_point():
        none = (labels == IGNORED).all()
    else:
        none = torch.zeros((), dtype=torch.bool)
    return none.reshape(-1).all().to(like.device)


@torch.no_grad()
def where(model: nn.Module, inputs: Mapping[str, Any]) -> str:
    """What is not finite first in a forward pass over this batch, in words; empty if nothing is.

    Runs the model once more, so dropout may differ; the search goes from inputs over weights to what modules return.
    """
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not finite(value):
            return f"the input {name!r} is not finite in {rows(value)}"
    bad = [name for name, p in model.named_parameters() if p.is_floating_point() and not finite(p)]
    if bad:
        return f"weights are not finite: {some(bad)}"
    found: list[str] = []
    names = {site.exit: site.key for site in sites_of(model)}
    slots = [slot for adaptation in need_host(model).adaptations.values() for slot in adaptation.slots]
    deltas = {id(slot.delta): f"{slot.adaptation}'s delta at {slot.site.key}" for slot in slots}
    handles = []
    for path, module in model.named_modules():
        if id(module) not in deltas and any(part.startswith("petiole") for part in path.split(".")):
            continue

        def look(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
            try:
                h = of_output(output)[0]
            except PetioleError:
                return
            if not found and h.is_floating_point() and not finite(h):
                name = deltas.get(id(module)) or names.get(path, path) or "the model"
                found.append(f"not finite first after {name} ({type(module).__name__}), in {rows(h)}")

        handles.append(module.register_forward_hook(look))
    try:
        model(**inputs)
    except Exception:  # the pass may fail where the first one didn't; what was found until then still helps
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""


def sites_of(model: nn.Module) -> list[Any]:
    """Every site of the anatomy, the widest first, so that at one module the narrowest gives the name."""
    anatomy = need_host(model).anatomy
    blocks = [block for stack in anatomy.stacks for block in stack.blocks]
    return [*anatomy.outside, *(site for block in blocks for site in block.sites if not site.rows)]


def finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def rows(tensor: Tensor) -> str:
    """The rows of a batch that hold something not finite, in words."""
    if tensor.ndim == 0:
        return "the only value"
    bad = (~torch.isfinite(tensor)).flatten(1).any(1) if tensor.ndim > 1 else ~torch.isfinite(tensor)
    numbers = bad.nonzero().flatten().tolist()
    if len(numbers) == len(bad):
        return "every row"
    return f"row{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:8]))}{', …' if len(numbers) > 8 else ''}"


__all__ = ["empty", "where"]
