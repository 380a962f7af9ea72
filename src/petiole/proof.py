"""The proof that nothing trains in vain: every site was called, every delta got a gradient, and moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from petiole.anatomy import Site
from petiole.dissection import in_experts
from petiole.errors import TrainingError
from petiole.junction import Slot, of_output

if TYPE_CHECKING:
    from petiole.adaptation import Adaptation


def check(adaptation: Adaptation, batch: Mapping[str, Any], loss: Callable[[Any], Tensor] | None = None) -> None:
    """See `Adaptation.check`: a forward and a backward pass in training mode, of which no trace is left."""
    model = adaptation.model
    if adaptation.name not in adaptation.host.active:
        raise TrainingError(f"{adaptation.name!r} does not act now: pt.activate(model, {adaptation.name!r}) first")
    with untouched(adaptation):
        proof = Proof(adaptation)
        for parameter in model.parameters():
            parameter.grad = None
        model.train()
        with torch.enable_grad():
            output = model(**batch)
            value = loss(output) if loss is not None else default_loss(output)
            if not bool(torch.isfinite(value).all()):
                raise TrainingError(f"the loss of this batch is {float(value)}")
            if not value.requires_grad:
                proof.called()
                raise TrainingError(
                    "the loss does not depend on anything that trains: check labels, and that no forward runs under no_grad"
                )
            value.backward()
        proof.called()
        proof.gradients(finite=True)
        proof.mark()
        proof.moved(stepped)


def default_loss(output: Any) -> Tensor:
    found = getattr(output, "loss", None)
    return (
        found if isinstance(found, Tensor) else of_output(getattr(output, "logits", output))[0].float().square().mean()
    )


@contextmanager
def untouched(adaptation: Adaptation) -> Iterator[None]:
    """Whatever happens inside, parameters' gradients, buffers, modes and the random state are afterwards as before."""
    model, host = adaptation.model, adaptation.host
    gradients = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    modes = [(m, m.training) for m in model.modules()]
    fired = [(slot, slot.fired) for slot in adaptation.slots]
    owes = host.owes_terms
    with torch.random.fork_rng():
        try:
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            for module, training in modes:
                module.training = training
            for slot, before in fired:
                slot.fired = before
            host.owes_terms = owes


Value = Callable[[nn.Parameter, int], Tensor]


@dataclass
class Unit:
    """What must not train in vain as a whole: a delta, a module that the attachment shares, a parameter of the backbone.

    Attributes:
        slot: of a delta, None otherwise.
        idles: the method says that it may go without a gradient in a step.
    """

    label: str
    parameters: list[nn.Parameter]
    idles: bool
    slot: Slot | None = None


class Proof:
    """Watches one adaptation through its first training step.

    Raises:
        TrainingError: nothing trains.
    """

    def __init__(self, adaptation: Adaptation) -> None:
        methods = adaptation.methods
        idle = [bool(method.idles) for method in methods]
        self.units = [
            Unit(s.site.key, trainable(s.delta.parameters()), (s.number >= 0 and idle[s.number]) or chosen(s.site), s)
            for s in adaptation.slots
        ]
        for number, module in adaptation.shared.items():
            self.units.append(Unit(f"{methods[number].slug} (shared)", trainable(module.parameters()), idle[number]))
        for name, parameter in adaptation.named_parameters():
            if name.startswith("own:"):
                self.units.append(Unit(name[4:], trainable([parameter]), any(idle)))
        if not any(unit.parameters for unit in self.units):
            raise TrainingError(f"{adaptation.name!r} has no trainable parameter: nothing would train")
        self.marks: dict[int, tuple[nn.Parameter, int, Tensor]] = {}
        for slot in adaptation.slots:
            slot.fired = False

    def called(self) -> None:
        """Raises TrainingError: a site was never called. A gradient is evidence too: compiled code leaves no other."""
        silent = [
            unit.label
            for unit in self.units
            if unit.slot is not None and not (unit.slot.fired or unit.slot.merged or unit.idles)
            if not any(p.grad is not None for p in unit.parameters)
        ]
        if silent:
            raise TrainingError(
                f"not called in this forward pass: {some(silent)}; what was attached there would train in vain"
            )

    def gradients(self, finite: bool = False) -> None:
        """Raises TrainingError: a unit has no gradient, or (if asked) one that is not finite."""
        without = []
        for unit in self.units:
            if unit.parameters and not unit.idles and not any(graded(p) for p in unit.parameters):
                without.append(unit.label)
            if finite and not all(bool(torch.isfinite(p.grad).all()) for p in unit.parameters if p.grad is not None):
                raise TrainingError(f"the gradient of {unit.label} is not finite")
        if without:
            raise TrainingError(
                f"without a gradient: {some(without)}; the loss does not depend on it, or a graph was cut on the way\n"
                "leave these sites out: layers=…, or roles of one stack alone, such as roles=['decoder:q']"
            )

    def mark(self) -> None:
        """Remember, of each parameter with a gradient, the entry with the largest one: any optimiser moves that first."""
        for unit in self.units:
            for parameter in unit.parameters:
                if parameter.requires_grad and graded(parameter):
                    grad = parameter.grad.to_dense()  # type: ignore[union-attr]
                    index = int(grad.abs().argmax())
                    self.marks[id(parameter)] = (parameter, index, entry(parameter, index).clone())

    def moved(self, now: Value | None = None) -> None:
        """Raises TrainingError: a unit with a gradient has not moved."""
        still = self.still(now)
        if still:
            dtypes = sorted({str(p.dtype).removeprefix("torch.") for unit in still for p in unit.parameters})
            raise TrainingError(
                f"did not move: {some([unit.label for unit in still])}; "
                f"the optimiser does not hold its parameters, or the step vanishes in {', '.join(dtypes)}"
            )

    def still(self, now: Value | None = None) -> list[Unit]:
        """Units of which no marked entry has changed. `now` gives the entry of a parameter, as it is if None."""
        now, found = now or entry, []
        for unit in self.units:
            marks = [self.marks[id(p)] for p in unit.parameters if id(p) in self.marks]
            if marks and not unit.idles and all(torch.equal(now(p, index), value) for p, index, value in marks):
                found.append(unit)
        return found


def chosen(site: Site) -> bool:
    """Whether tokens choose this site, so that a batch may well pass it by: one expert of several."""
    return site.expert >= 0 or in_experts(site.path)


def trainable(parameters: Any) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]


def graded(parameter: nn.Parameter) -> bool:
    """Whether it has a gradient that is not zero everywhere."""
    return parameter.grad is not None and bool((parameter.grad.to_dense() != 0).any())


def entry(parameter: nn.Parameter, index: int) -> Tensor:
    return parameter.detach().flatten()[index]


def stepped(parameter: nn.Parameter, index: int) -> Tensor:
    """The entry after a step along the gradient of a hundredth of the parameter's largest entry."""
    size = parameter.detach().abs().max().clamp_min(1e-3)
    sign = parameter.grad.to_dense().flatten()[index].sign()  # type: ignore[union-attr]
    return entry(parameter, index) - (1e-2 * size * sign).to(parameter.dtype)


def some(names: Sequence[str]) -> str:
    """The first four of a list, in words."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
