"""Fold an adaptation into the backbone's weights and take it out again, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from petiole.errors import AttachError
from petiole.junction import Slot, composed, of_output
from petiole.method import cut, raw, view

if TYPE_CHECKING:
    from petiole.adaptation import Adaptation

_WEIGHTS = ("linear", "conv", "embedding", "parameter")


def merge(adaptation: Adaptation, *, onto: str = "weights", check: Mapping[str, Any] | None = None) -> float | None:
    """See `Adaptation.merge`. All new values are computed before the first is written."""
    from petiole.attach import HEAD, forget_compiled

    host = adaptation.host
    if adaptation.merged:
        raise AttachError(f"{adaptation.name!r} is merged already; unmerge it first")
    stuck = [method.slug for method in adaptation.methods if not method.merges]
    if stuck:
        raise AttachError(
            f"{', '.join(stuck)} can't be merged: what it computes is not a change of a weight; keep it attached instead"
        )
    before = first_output(adaptation, check)
    new: dict[tuple[str, str], Tensor] = {}
    for slot in adaptation.slots:
        if slot.number == HEAD:
            module = host.module(slot.site.path)
            new |= {
                (join(slot.site.path, owner), attribute): value.detach()
                for name, value in slot.delta.module.named_parameters()
                for owner, _, attribute in [name.rpartition(".")]
            }
            continue
        if slot.site.kind not in _WEIGHTS or not hasattr(slot.delta, "weight"):
            raise AttachError(f"{slot.site.key}: {type(slot.delta).__name__} can't be merged")
        fold(adaptation, slot, new, onto)
    with torch.no_grad():
        for (path, name), value in new.items():
            module = host.module(path)
            own = raw(module, name)
            adaptation._kept[path, name] = own.detach().clone() if own.is_floating_point() else own
            if own.is_floating_point():
                own.copy_(value.to(own.dtype))
            else:
                setattr(module, name, nn.Parameter(value, requires_grad=False))
    for slot in adaptation.slots:
        slot.merged = True
    adaptation.merged = True
    forget_compiled()
    after = first_output(adaptation, check)
    return None if before is None or after is None else float((after - before).abs().max())


def fold(adaptation: Adaptation, slot: Slot, new: dict[tuple[str, str], Tensor], onto: str) -> None:
    """Add one delta to the new values of its site's tensors, in float32."""
    site, host = slot.site, adaptation.host
    module = host.module(site.path)
    for name, change_of in ((site.parameter, slot.delta.weight), (site.bias, getattr(slot.delta, "bias", None))):
        if change_of is None or not name:
            continue
        weight = name == site.parameter
        own = raw(module, name) if getattr(module, name, None) is not None else None
        if own is None:
            if change_of(None) is not None:
                raise AttachError(f"{site.key}: there is no bias into which Δb could be merged")
            continue
        whole = new.get((site.path, name))
        if whole is None:
            refuse(adaptation, site.path, name, own, onto)
            whole = (own if own.is_floating_point() else own.dequantize()).detach().float()
        part = view(site, whole) if weight else cut(whole[site.expert] if site.expert >= 0 else whole, site.rows)
        with torch.no_grad():
            change = change_of(part)
        if change is not None:
            new[site.path, name] = composed(whole, [(site, change.detach().float(), weight)])


def refuse(adaptation: Adaptation, path: str, name: str, own: Tensor, onto: str) -> None:
    """Say why a tensor must not be overwritten: quantised, or tied to another place that the change isn't meant for."""
    plain = own.is_floating_point() and type(own) in (Tensor, nn.Parameter)
    if not plain and onto != "dequantised":
        raise AttachError(f"{path}.{name} is quantised; merge(onto='dequantised') replaces it by a full-size weight")
    model = adaptation.model
    places = [other for other, p in model.named_parameters(remove_duplicate=False) if p is own]
    if len(places) > 1:
        raise AttachError(
            f"{path}.{name} is tied to {', '.join(p for p in places if p != f'{path}.{name}')}: merging would change both; untie them first"
        )


def unmerge(adaptation: Adaptation) -> None:
    """See `Adaptation.unmerge`."""
    from petiole.attach import forget_compiled

    if not adaptation.merged:
        raise AttachError(f"{adaptation.name!r} is not merged")
    with torch.no_grad():
        for (path, name), value in adaptation._kept.items():
            module = adaptation.host.module(path)
            own = raw(module, name)
            if value.is_floating_point() and type(value) is Tensor:
                own.copy_(value)
            else:
                setattr(module, name, value)
    adaptation._kept.clear()
    for slot in adaptation.slots:
        slot.merged = False
    adaptation.merged = False
    forget_compiled()


def first_output(adaptation: Adaptation, batch: Mapping[str, Any] | None) -> Tensor | None:
    """The first output of the model on a batch, without the loss; None without a batch."""
    if batch is None:
        return None
    model, training = adaptation.model, adaptation.model.training
    model.eval()
    try:
        with torch.no_grad():
            output = model(**batch)
    finally:
        model.train(training)
    return of_output(getattr(output, "logits", output))[0].detach().float().clone()


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
