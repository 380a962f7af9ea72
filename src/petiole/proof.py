"""The proof that nothing trains in vain: every site was called, every delta got a gradient, and moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from petiole.errors import TrainingError
from petiole.junction import of_output

if TYPE_CHECKING:
    from petiole.adaptation import Adaptation


def check(adaptation: Adaptation, batch: Mapping[str, Any], loss: Callable[[Any], Tensor] | None = None) -> None:
    """See `Adaptation.check`: a forward and a backward pass in training mode, of which no trace is left."""
    model = adaptation.model
    proof = Proof(adaptation)
    with untouched(model):
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
        proof.gradients()
        proof.stands([stepped(p) for p in proof.parameters])


def stepped(parameter: nn.Parameter) -> Tensor:
    """The parameter after a step along its gradient whose largest entry is a hundredth of the parameter's largest."""
    if parameter.grad is None or not bool((parameter.grad != 0).any()):
        return parameter.detach()
    size = parameter.detach().abs().max().clamp_min(1e-3) / parameter.grad.abs().max()
    return parameter.detach() - (1e-2 * size * parameter.grad).to(parameter.dtype)


def default_loss(output: Any) -> Tensor:
    found = getattr(output, "loss", None)
    return (
        found if isinstance(found, Tensor) else of_output(getattr(output, "logits", output))[0].float().square().mean()
    )


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside, parameters' gradients, buffers, modes and the random state are afterwards as before."""
    gradients = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    modes = [(m, m.training) for m in model.modules()]
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


class Proof:
    """Watches one adaptation through its first training step."""

    def __init__(self, adaptation: Adaptation) -> None:
        self.adaptation = adaptation
        self.parameters = list(adaptation.parameters())
        self.start = [p.detach().clone() for p in self.parameters]
        index = {id(p): i for i, p in enumerate(self.parameters)}
        backbone = dict(adaptation.model.named_parameters())
        units = [(slot.site.key, slot.delta.parameters(), slot.number) for slot in adaptation.slots]
        units += [
            (f"{adaptation.methods[n].slug} (shared)", module.parameters(), n)
            for n, module in adaptation.shared.items()
        ]
        self.units = [(key, [index[id(p)] for p in params if id(p) in index], number) for key, params, number in units]
        self.units += [
            (name, [index[id(backbone[name])]], 0)
            for name in adaptation.own
            if name in backbone and id(backbone[name]) in index
        ]
        self.graded: set[int] = set()
        for slot in adaptation.slots:
            slot.fired = False

    def idles(self, number: int) -> bool:
        return number >= 0 and bool(self.adaptation.methods[number].idles)

    def called(self) -> None:
        """Raises TrainingError: a site was never called."""
        silent = [
            slot.site.key
            for slot in self.adaptation.slots
            if not slot.fired and not slot.merged and not self.idles(slot.number)
        ]
        if silent:
            raise TrainingError(
                f"not called in this forward pass: {named(silent)}; what was attached there would train in vain"
            )

    def gradients(self) -> None:
        """Note which parameters have a gradient now. Raises TrainingError: a delta has none."""
        for i, parameter in enumerate(self.parameters):
            if parameter.grad is not None and bool((parameter.grad != 0).any()):
                self.graded.add(i)
                if not bool(torch.isfinite(parameter.grad).all()):
                    raise TrainingError(f"the gradient of {self.key(i)} is not finite")
        without = [
            key
            for key, parts, number in self.units
            if parts and not self.graded.intersection(parts) and not self.idles(number)
        ]
        if without:
            raise TrainingError(
                f"without a gradient: {named(without)}; the loss does not depend on it, or a graph was cut on the way"
            )

    def key(self, i: int) -> str:
        return next(key for key, parts, _ in self.units if i in parts)

    def stands(self, now: list[Tensor] | None = None) -> None:
        """Raises TrainingError: a delta with a gradient has not moved."""
        now = [p.detach() for p in self.parameters] if now is None else now
        moved = {i for i, (a, b) in enumerate(zip(self.start, now, strict=True)) if not torch.equal(a, b)}
        still = [
            key for key, parts, _ in self.units if self.graded.intersection(parts) and not moved.intersection(parts)
        ]
        if still:
            raise TrainingError(
                f"did not move: {named(still)}; the optimiser does not hold its parameters, or the step vanishes in {self.start[0].dtype}"
            )


def named(keys: list[str]) -> str:
    shown = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
    return shown
