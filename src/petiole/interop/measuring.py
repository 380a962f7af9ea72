"""How much the outputs change if the exported factors stand in place of the changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from petiole.adaptation import Adaptation
from petiole.interop.changes import Change
from petiole.junction import of_input, of_output
from petiole.merge import first_output
from petiole.method import Base


def measured(adaptation: Adaptation, changes: list[Change], batch: Mapping[str, Any]) -> tuple[float, float]:
    """The largest change of the first output on a batch if the exported factors stood in place of the changes, and the largest output."""
    from petiole.attach import route

    with route(adaptation.model, adaptation.name):
        before = first_output(adaptation, batch)
        with replaced(adaptation, changes):
            after = first_output(adaptation, batch)
    assert before is not None and after is not None
    return float((after - before).abs().max()), float(before.abs().max())


@contextmanager
def replaced(adaptation: Adaptation, changes: list[Change]) -> Iterator[None]:
    """Add to each module's output what its exported factors say more than its change."""
    handles = []
    for change in changes:
        module = adaptation.host.module(change.path)
        seen: list[Tensor] = []

        def read(module: nn.Module, args: Any, kwargs: Any, seen: list[Tensor] = seen) -> None:
            seen.append(args[0] if args else of_input(args, kwargs)[0])

        def write(module: nn.Module, args: Any, output: Any, change: Change = change, seen: list[Tensor] = seen) -> Any:
            y, put = of_output(output)
            more = Base(change.site, module).apply(
                seen.pop(), written_weight(change, module) - change.exact().to(y.device)
            )
            return put(y + more.to(y.dtype))

        handles += [
            module.register_forward_pre_hook(read, with_kwargs=True, prepend=True),
            module.register_forward_hook(write),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def written_weight(change: Change, module: nn.Module) -> Tensor:
    """ΔW (out, in, *kernel) as the written tensors give it."""
    product = (change.scale * (change.B @ change.A.flatten(1))).view(change.B.shape[0], *change.A.shape[1:])
    if change.magnitude is None:
        return product
    base = Base(change.site, module).weight
    whole = base + product
    return change.magnitude[:, None] / whole.norm(dim=1, keepdim=True) * whole - base
