"""Fold an adaptation into the backbone's weights and take it out again, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from petiole.errors import AttachError
from petiole.junction import HiddenSlot, Slot, of_output
from petiole.method import Method, composed, plain, raw, view, view_bias, wide

if TYPE_CHECKING:
    from petiole.adaptation import Adaptation

_WEIGHTS = ("linear", "conv", "embedding", "parameter")


def merge(
    adaptation: Adaptation, *, onto: str = "weights", check: Mapping[str, Any] | None = None, partly: bool = False
) -> float | None:
    """See `Adaptation.merge`. All new values are computed before the first is written."""
    from petiole.attach import HEAD, forget_compiled

    host = adaptation.host
    if adaptation.merged:
        raise AttachError(f"{adaptation.name!r} is merged already; unmerge it first")
    left = staying(adaptation)
    if not partly:
        refuse_left(adaptation, left)
    going = [slot for slot in adaptation.slots if slot not in left]
    if left and not going:
        raise AttachError(f"{adaptation.name!r} has nothing that can be merged: {next(iter(left.values()))}")
    before = first_output(adaptation, check)
    new: dict[tuple[str, str], Tensor] = {}
    for slot in going:
        if slot.number == HEAD:
            module = host.module(slot.site.path)
            new |= {
                (join(slot.site.path, owner), attribute): value.detach()
                for name, value in slot.delta.module.named_parameters()
                for owner, _, attribute in [name.rpartition(".")]
            }
            continue
        if (
            slot.site.kind not in _WEIGHTS
            or not callable(getattr(slot.delta, "weight", None))
            or slot.place.read is not None
        ):
            raise AttachError(f"{slot.site.key}: {type(slot.delta).__name__} can't be merged")
    for slot in in_order(going):
        fold(adaptation, slot, new, onto)
    for other in host.adaptations.values():
        shared = {join(*key) for key in new} & set(other.own)
        if shared and other is not adaptation:
            raise AttachError(f"{min(shared)} is trained in place by {other.name!r}; detach that adaptation first")
    with torch.no_grad():
        for (path, name), value in new.items():
            module = host.module(path)
            own = raw(module, name)
            adaptation._kept[path, name] = own.detach().clone() if ordinary(own) else own
            if ordinary(own):
                own.copy_(value.to(own.dtype))
            else:
                setattr(module, name, nn.Parameter(value.to(plain(own).dtype), requires_grad=False))
    for slot in going:
        slot.merged = True
    adaptation.merged = True
    host.merges.append((adaptation, set(new)))
    forget_compiled()
    after = first_output(adaptation, check)
    return None if before is None or after is None else float((after - before).abs().max())


def staying(adaptation: Adaptation) -> dict[Slot, str]:
    """The slots that can't be folded into weights, and why."""
    found: dict[Slot, str] = {}
    for number, method in enumerate(adaptation.methods):
        mine = {slot.key.partition(".")[2]: slot for slot in adaptation.slots if slot.number == number}
        why = method.stays({key: slot.delta for key, slot in mine.items()})
        found |= {mine[key]: reason for key, reason in why.items()}
    return found


def refuse_left(adaptation: Adaptation, left: Mapping[Slot, str]) -> None:
    """Say what can't be merged: a method as a whole, or some of its layers."""
    whole = [method.slug for method in adaptation.methods if not method.merges and type(method).stays is Method.stays]
    if whole:
        raise AttachError(
            f"{', '.join(whole)} can't be merged: what it computes is not a change of a weight; keep it attached instead"
        )
    if left:
        held = [slot for slot in left if any(True for _ in slot.delta.parameters())] or list(left)
        names = list(dict.fromkeys(slot.site.key for slot in held))
        some = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise AttachError(
            f"{adaptation.methods[next(iter(left)).number].slug} can't be merged as a whole: {next(iter(left.values()))} "
            f"at {some}\nmerge(partly=True) folds the rest, and keeps these attached"
        )


def in_order(changes: Sequence[Slot]) -> list[Slot]:
    """The slots that change weights, so ordered that each finds the weight that it saw in the forward pass.

    What acts at a linear's input acts before the weight and everything added to it, the last of them first: W M₂ M₁ x.
    """
    from petiole.attach import HEAD

    slots = [slot for slot in changes if slot.number != HEAD]
    before = [slot for slot in slots if isinstance(slot, HiddenSlot) and slot.site.side == "input"]
    return [slot for slot in slots if slot not in before] + before[::-1]


def fold(adaptation: Adaptation, slot: Slot, new: dict[tuple[str, str], Tensor], onto: str) -> None:
    """Add one delta to the new values of its site's tensors, in float32."""
    site, host = slot.site, adaptation.host
    module = host.module(site.path)
    for name, change_of in ((site.parameter, slot.delta.weight), (site.bias, getattr(slot.delta, "bias", None))):
        if change_of is None:
            continue
        weight = name == site.parameter
        own = raw(module, name) if name and getattr(module, name, None) is not None else None
        if own is None:
            with torch.no_grad():
                change = change_of(None)
            if change is not None:
                raise AttachError(f"{site.key}: there is no bias into which Δb could be merged")
            continue
        whole = new.get((site.path, name))
        if whole is None:
            refuse(adaptation, site.path, name, own, onto)
            whole = wide(plain(own).detach())
        part = view(site, whole) if weight else view_bias(site, whole)
        with torch.no_grad():
            change = change_of(part)
        if change is not None:
            new[site.path, name] = composed(whole, [(site, change.detach(), weight)])


def refuse(adaptation: Adaptation, path: str, name: str, own: Tensor, onto: str) -> None:
    """Say why a tensor must not be overwritten: quantised, or tied to another place that the change isn't meant for."""
    module = adaptation.host.module(path)
    if module._parameters.get(name) is None and module._buffers.get(name) is None:
        raise AttachError(
            f"{path}.{name} is computed from other tensors (a parametrisation); remove that before merging"
        )
    if hasattr(own, "full_tensor"):
        raise AttachError(
            f"{path}.{name} is sharded over processes; load the adaptation into a whole model and merge there"
        )
    if not ordinary(own) and onto != "dequantised":
        raise AttachError(f"{path}.{name} is quantised; merge(onto='dequantised') replaces it by a full-size weight")
    model = adaptation.model
    places = [other for other, p in model.named_parameters(remove_duplicate=False) if p is own]
    if len(places) > 1:
        raise AttachError(
            f"{path}.{name} is tied to {', '.join(p for p in places if p != f'{path}.{name}')}: merging would change both; untie them first"
        )


def ordinary(own: Tensor) -> bool:
    """Whether a tensor is what it seems: quantised ones may well say that they are of a floating-point type."""
    return own.is_floating_point() and type(own) in (Tensor, nn.Parameter)


def unmerge(adaptation: Adaptation) -> None:
    """See `Adaptation.unmerge`."""
    from petiole.attach import forget_compiled

    if not adaptation.merged:
        raise AttachError(f"{adaptation.name!r} is not merged")
    host = adaptation.host
    at = next((i for i, (merged, _) in enumerate(host.merges) if merged is adaptation), None)
    if at is None:
        raise AttachError(f"{adaptation.name!r} is part of the weights for as long as a `with` lasts; leave that")
    for later, tensors in host.merges[at + 1 :]:
        if tensors & set(adaptation._kept):
            how = "unmerge that first" if later.merged and later.name in host.adaptations else "and kept for good"
            raise AttachError(f"{later.name!r} was merged into the same weights after {adaptation.name!r}: {how}")
    with torch.no_grad():
        for (path, name), value in adaptation._kept.items():
            module = adaptation.host.module(path)
            own = raw(module, name)
            if value.is_floating_point() and type(value) is Tensor:
                own.copy_(value)
            else:
                setattr(module, name, value)
    adaptation._kept.clear()
    del host.merges[at]
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
