"""An adaptation as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from petiole.adaptation import Adaptation


def summary(adaptation: Adaptation) -> str:
    """What sits where, how many parameters train, what is stored."""
    from petiole.attach import HEAD

    host = adaptation.host
    total = sum(
        p.numel()
        for n, p in host.model.named_parameters()
        if not any(part.startswith("petiole") for part in n.split("."))
    )
    lines = [repr(adaptation)]
    for number, method in enumerate(adaptation.methods):
        fields = ", ".join(
            f"{k}={v}" for k, v in method.model_dump().items() if v != type(method).model_fields[k].get_default()
        )
        lines.append(f"  {method.slug}({fields})")
        groups: dict[tuple[str, str, str], list[tuple[int, int]]] = {}
        for slot in adaptation.slots:
            if slot.number == number:
                size = sum(p.numel() for p in slot.delta.parameters())
                role = (
                    f"{slot.site.within}.{slot.site.role}"
                    if slot.site.within not in ("", slot.site.role)
                    else slot.site.role
                )
                groups.setdefault((slot.site.stack, role, slot.site.side), []).append((slot.site.depth, size))
        for (stack, role, side), found in groups.items():
            depths = sorted({depth for depth, _ in found})
            where = (
                f"{depths[0]}-{depths[-1]}"
                if len(depths) > 1 and depths == list(range(depths[0], depths[-1] + 1))
                else ", ".join(map(str, depths))
            )
            lines.append(
                f"    {stack or 'model'}.{role} ({side}), depth {where}: {len(found)} x {found[0][1]:,} parameters"
            )
        if number in adaptation.shared and (size := sum(p.numel() for p in adaptation.shared[number].parameters())):
            lines.append(f"    shared by all: {size:,} parameters")
    if adaptation.own:
        lines.append(
            f"  trained in place: {len(adaptation.own)} tensors, {sum(t.numel() for t in adaptation.own.values()):,} numbers"
        )
    heads = [slot for slot in adaptation.slots if slot.number == HEAD]
    for slot in heads:
        lines.append(f"  task head {slot.site.path}: {sum(p.numel() for p in slot.delta.parameters()):,} parameters")
    stored = adaptation.named_tensors()
    size = sum(t.numel() * t.element_size() for t in stored.values())
    share = 100 * adaptation.trainable / max(total, 1)
    lines.append(
        f"  trains {adaptation.trainable:,} of {total:,} parameters ({share:.2f} %); the file will hold {size / 1e6:.2f} MB; seed {adaptation.seed}"
    )
    return "\n".join(lines)
