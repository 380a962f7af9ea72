"""The events of a training run, fired for every attached method: by the Trainer, by a callback, or by hand.

events = pt.Events(model, optimizer, total_steps=len(loader) * epochs)
events.begin(batches)
for batch in loader:
    events.before_step()
    loss = model(**batch).loss          # extra loss terms are in it
    loss.backward()
    events.before_optimizer_step(loss)
    optimizer.step()
    events.after_optimizer_step()
    optimizer.zero_grad()
events.epoch_end()
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from petiole.adaptation import Adaptation
from petiole.attach import need_host
from petiole.errors import TrainingError
from petiole.proof import Proof


class Events:
    """Fires method events for one model. `begin` first, then in each step `before_step`, `before_optimizer_step`, `after_optimizer_step`.

    Args:
        model: with at least one adaptation attached.
        optimizer: the one that steps; may be set later (`events.optimizer = …`).
        total_steps: optimiser steps of the whole run, 0 if unknown.
        accumulation: micro-batches whose losses are added up without being divided; extra loss terms are divided by it.
        prove: whether the first step must show that every site was called and every delta moved.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        total_steps: int = 0,
        accumulation: int = 1,
        prove: bool = True,
    ) -> None:
        self.host = need_host(model)
        self.optimizer, self.total_steps, self.prove = optimizer, total_steps, prove
        self.step, self.epoch = 0, 0.0
        self.proofs: list[Proof] | None = None
        for adaptation in self.adaptations:
            adaptation.accumulation = accumulation

    @property
    def adaptations(self) -> list[Adaptation]:
        """Those that act."""
        return [a for a in self.host.adaptations.values() if a.name in self.host.active]

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"]) if self.optimizer is not None else 0.0

    def fire(self, event: str, *arguments: Any) -> None:
        """Call one event of every method that overrides it."""
        for adaptation in self.adaptations:
            for number, method in enumerate(adaptation.methods):
                if method.overrides(event):
                    moment = adaptation.moment(
                        number,
                        step=self.step,
                        epoch=self.epoch,
                        progress=self.step / self.total_steps if self.total_steps else 0.0,
                        total_steps=self.total_steps,
                        optimizer=self.optimizer,
                        learning_rate=self.learning_rate,
                        accumulation=adaptation.accumulation,
                    )
                    getattr(method, event)(moment, *arguments)

    def needs_calibration(self) -> bool:
        return any(method.overrides("calibrate") for a in self.adaptations for method in a.methods)

    def begin(self, batches: Iterable[Mapping[str, Any]] | None = None) -> None:
        """Before the first step. `batches` are for methods that calibrate on data.

        Raises:
            TrainingError: a method needs batches and got none.
        """
        if self.needs_calibration() and self.step == 0:
            if batches is None:
                raise TrainingError("a method calibrates on data before training: events.begin(batches)")
            self.fire("calibrate", batches)

    def before_step(self) -> None:
        """Before the forward pass of an optimiser step."""
        self.fire("before_step")
        if self.prove and self.proofs is None:
            self.proofs = [Proof(adaptation) for adaptation in self.adaptations]

    def before_optimizer_step(self, loss: Tensor | None = None) -> None:
        """Gradients are complete.

        Raises:
            TrainingError: the loss is not finite; or, in the first steps, a site was not called or has no gradient.
        """
        if loss is not None and not bool(torch.isfinite(loss.detach()).all()):
            raise TrainingError(
                f"step {self.step + 1}: the loss is {float(loss)}; lower the learning rate, or look at this batch"
            )
        self.fire("before_optimizer_step")
        for proof in self.proofs or ():
            proof.called()
            proof.gradients()

    def after_optimizer_step(self) -> None:
        """Parameters have moved.

        Raises:
            TrainingError: a weight is not finite; or a delta did not move in the first step that had a learning rate.
        """
        self.step += 1
        self.fire("after_optimizer_step")
        if self.proofs and self.learning_rate > 0:
            for proof in self.proofs:
                proof.stands()
            self.proofs = []
        for adaptation in self.adaptations:
            for slot in adaptation.slots:
                for name, parameter in slot.delta.named_parameters():
                    if not math.isfinite(float(parameter.detach().sum())):
                        raise TrainingError(
                            f"step {self.step}: {slot.site.key} ({name}) is not finite any more; lower the learning rate"
                        )

    def epoch_end(self) -> None:
        """After each epoch."""
        self.fire("epoch_end")
