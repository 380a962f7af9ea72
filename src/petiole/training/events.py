"""The events of a training run, fired for every attached method: by `pt.Trainer`, by a callback, or by hand as here.

>>> import torch, petiole as pt
>>> from transformers import ViTConfig, ViTForImageClassification
>>> from petiole.training import Events, parameter_groups
>>> size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
>>> model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=2, **size))
>>> tuned = pt.attach(model, pt.LoRA(rank=1))
>>> batch = {"pixel_values": torch.randn(4, 3, 8, 8), "labels": torch.tensor([0, 1, 0, 1])}
>>> loader, epochs = [batch, batch], 3

>>> optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=1e-2, weight_decay=0.01))
>>> scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 6)
>>> events = Events(model, optimizer, scheduler, total_steps=len(loader) * epochs)
>>> events.begin(loader)  # methods that calibrate look at these batches
>>> for epoch in range(epochs):
...     for batch in loader:
...         events.before_step()
...         loss = model(**batch).loss  # extra loss terms of methods are in it
...         loss.backward()
...         events.before_optimizer_step(loss)
...         optimizer.step()
...         events.after_optimizer_step()
...         scheduler.step()
...         optimizer.zero_grad()
...     events.epoch_end()
>>> events.step
6
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from petiole.adaptation import Adaptation
from petiole.attach import forget_compiled, need_host
from petiole.errors import FileError, TrainingError
from petiole.method import RATE_FACTOR, Moment
from petiole.proof import Proof, some
from petiole.training import groups, processes
from petiole.training.held_out import HeldOut

PATIENCE = 100  # steps in which a learning rate below its peak may be too small to move anything


class Events:
    """Fires method events for one model.

    `begin` first; in each optimiser step `before_step`, `before_optimizer_step`, `after_optimizer_step`; after each epoch `epoch_end`.

    Args:
        model: with at least one adaptation attached.
        optimizer: the one that steps.
        scheduler: of its learning rates, if there is one; it must follow when a method adds parameters.
        total_steps: optimiser steps of the whole run, 0 if unknown.
        prove: whether the first step must show that every site was called and every delta moved.

    Raises:
        TrainingError: nothing trains, or something trains that no file would hold, or that the optimiser does not hold.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Any = None,
        *,
        total_steps: int = 0,
        prove: bool = True,
    ) -> None:
        self.host = need_host(model)
        self.optimizer, self.scheduler, self.total_steps, self.prove = optimizer, scheduler, total_steps, prove
        self.step, self.epoch, self.epochs = 0, 0.0, 0
        self.proofs: list[Proof] | None = None
        self.loss: Tensor | None = None  # the sum of those seen in this step
        self.held_out: HeldOut | None = None  # data that a method may look at without training on it
        self.waited = 0  # steps in which movement could have shown
        self.late: list[nn.Parameter] = []  # added in an event, so that DistributedDataParallel doesn't know them
        self.averaged_late = True
        check_trainable(model)
        self.check_held()

    @property
    def adaptations(self) -> list[Adaptation]:
        """Those that act."""
        return groups.acting(self.host.model)

    @property
    def learning_rate(self) -> float:
        """Of the run: a group with a factor of its own learns at a multiple of it."""
        group = self.optimizer.param_groups[0] if self.optimizer is not None else {"lr": 0.0}
        return float(group["lr"]) / group.get(RATE_FACTOR, 1.0)

    @property
    def has_terms(self) -> bool:
        """Whether some method adds to the loss."""
        return any(adaptation.has_loss_terms for adaptation in self.adaptations)

    # ---- the events

    def moment(self, adaptation: Adaptation, number: int) -> Moment:
        """What one method is given now."""
        return adaptation.moment(
            number,
            step=self.step,
            epoch=self.epoch,
            progress=self.step / self.total_steps if self.total_steps else 0.0,
            total_steps=self.total_steps,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            training=self,
        )

    def fire(self, event: str, *arguments: Any) -> None:
        """Call one event of every method that overrides it."""
        owed, fired = self.host.owes_terms, False
        for adaptation in self.adaptations:
            for number, method in enumerate(adaptation.methods):
                if method.overrides(event):
                    fired = True
                    getattr(method, event)(self.moment(adaptation, number), *arguments)
        if fired:
            self.host.owes_terms = owed  # a method's own forward passes owe nothing
            self.check_held()

    def needs_calibration(self) -> bool:
        return any(method.overrides("calibrate") for a in self.adaptations for method in a.methods)

    def begin(
        self, batches: Iterable[Mapping[str, Any]] | None = None, held_out: HeldOut | Iterable[Any] | None = None
    ) -> None:
        """Before the first step. The global random generator ends where it was.

        Args:
            batches: for methods that calibrate on data.
            held_out: for methods that compare on data that does not train; a loader of keyword arguments, or with a loss of its own.

        Raises:
            TrainingError: a method needs batches and got none.
        """
        self.host.training = weakref.ref(self)  # a copy of the model copies no optimiser
        self.host.owes_terms = False
        self.held_out = held_out if held_out is None or isinstance(held_out, HeldOut) else HeldOut(held_out)
        if self.optimizer is not None and (names := groups.unmet(self.host.model, self.optimizer)):
            warnings.warn(
                f"the optimiser decays, or learns at another rate than asked for: {some(names)}; "
                "make its groups with petiole.training.parameter_groups(model, …)",
                stacklevel=2,
            )
        if self.needs_calibration() and self.step == 0:
            if batches is None:
                raise TrainingError("a method calibrates on data before training: events.begin(batches)")
            with torch.random.fork_rng(devices=devices(self.host.model)):
                self.fire("calibrate", batches)

    def before_step(self) -> None:
        """Before the forward pass of an optimiser step."""
        self.fire("before_step")
        self.host.owes_terms, self.averaged_late, self.loss = self.has_terms, not self.late, None
        if self.prove and self.proofs is None:
            self.proofs = [Proof(adaptation) for adaptation in self.adaptations if adaptation.trainable]

    def saw_loss(self, loss: Tensor) -> None:
        """The model returned a loss; a trainer may hide it, and what is not finite in it, from its log."""
        self.loss = loss.detach() if self.loss is None else self.loss + loss.detach()

    def extra_loss(self) -> Tensor | None:
        """The methods' loss terms for the forward pass just done, where the model gave no loss to which they could be added."""
        self.host.owes_terms = False
        terms = [term for adaptation in self.adaptations for term in adaptation.loss_terms()]
        return torch.stack(terms).sum() if terms else None

    def synchronise(self) -> None:
        """With several processes: average the gradients of parameters added on the way. After backward, before clipping."""
        processes.average_gradients(self.late)
        self.averaged_late = True

    def before_optimizer_step(self, loss: Tensor | None = None) -> None:
        """Gradients are complete.

        Args:
            loss: of this step, to see whether it is finite; those that the model itself returns are looked at in any case.

        Raises:
            TrainingError: the loss is not finite, or lacks the methods' terms; or, in the first step, a site was not called or has no
                gradient.
        """
        loss = self.loss if loss is None else loss
        if loss is not None and not bool(torch.isfinite(loss.detach()).all()):
            raise TrainingError(
                f"step {self.step + 1}: the loss is {float(loss)}; lower the learning rate, or look at this batch"
            )
        if self.host.owes_terms:
            slugs = [m.slug for a in self.adaptations for m in a.methods if m.overrides("loss")]
            raise TrainingError(
                f"step {self.step + 1}: the loss lacks the extra terms of {some(slugs)}: the model returned none, or ran compiled\n"
                "add events.extra_loss() to the one you compute (pt.Trainer does it in compute_loss)"
            )
        if not self.averaged_late and processes.count() > 1:
            raise TrainingError(
                "a method added parameters, whose gradients this trainer does not average over processes\n"
                "call events.synchronise() between backward and clipping, or use pt.Trainer"
            )
        for proof in self.proofs or ():
            if not proof.marks:
                proof.called()
                proof.gradients()
        self.fire("before_optimizer_step")
        for proof in self.proofs or ():
            if not proof.marks:
                proof.mark()

    def after_optimizer_step(self, skipped: bool = False) -> None:
        """Parameters have moved.

        Args:
            skipped: the optimiser left this step out, since gradients overflowed in half precision; nothing happens then.

        Raises:
            TrainingError: a weight is not finite; or a delta did not move.
        """
        self.step += 1
        if skipped:
            for proof in self.proofs or ():
                proof.marks.clear()
            return
        self.look_for_movement()
        self.fire("after_optimizer_step")
        self.check_weights()

    def epoch_end(self) -> None:
        """After each epoch."""
        self.epochs += 1
        self.fire("epoch_end")

    # ---- what must hold

    def look_for_movement(self) -> None:
        """Ask the proofs for movement, once there is a learning rate. In a warm-up, steps may be too small at first."""
        if not self.proofs or self.optimizer is None or self.learning_rate == 0:
            return
        group = self.optimizer.param_groups[0]
        self.waited += 1
        if float(group["lr"]) < float(group.get("initial_lr", 0.0)) and self.waited < PATIENCE:
            self.proofs = [proof for proof in self.proofs if proof.still()]
            return
        for proof in self.proofs:
            proof.moved()
        self.proofs = []

    def check_held(self) -> None:
        """Raises TrainingError: the optimiser does not hold a parameter that should train."""
        if self.optimizer is None:
            return
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        missing = [n for n, p in groups.named(self.host.model).items() if p.requires_grad and id(p) not in held]
        if missing:
            raise TrainingError(
                f"in no group of the optimiser: {some(missing)}\n"
                "make it after pt.attach; a method that adds parameters in an event calls moment.add_parameters"
            )

    def check_weights(self) -> None:
        """Raises TrainingError: a weight is not finite. One look at all of them, and a second only to name it."""
        if self.optimizer is not None:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        else:
            parameters = [p for adaptation in self.adaptations for p in adaptation.parameters()]
        parameters = [p.detach() for p in parameters if p.numel()]
        if parameters and not bool(torch.isfinite(torch.nn.utils.get_total_norm(parameters, float("inf")))):
            bad = [n for n, p in groups.named(self.host.model).items() if not bool(torch.isfinite(p).all())]
            raise TrainingError(
                f"step {self.step}: not finite any more: {some(bad) or 'a parameter of the optimiser'}\n"
                "lower the learning rate or clip gradients, and go back to the last checkpoint"
            )

    # ---- parameters that come and go, asked for through a moment

    def add_parameters(self, parameters: list[nn.Parameter], warmup_steps: int | None = None) -> None:
        """See `Moment.add_parameters`."""
        names = {id(p): name for name, p in groups.named(self.host.model).items()}
        held = {id(p) for group in (self.optimizer.param_groups if self.optimizer else ()) for p in group["params"]}
        for i, parameter in enumerate(parameters):
            if id(parameter) not in names:
                raise TrainingError(
                    f"add_parameters: number {i}, of shape {tuple(parameter.shape)}, stands in no delta of this model"
                )
            if id(parameter) in held or any(parameter is other for other in parameters[:i]):
                raise TrainingError(f"add_parameters: {names[id(parameter)]} trains already")
        if not parameters:
            return
        processes.share_new([names[id(p)] for p in parameters], parameters)
        for parameter in parameters:
            parameter.requires_grad_(True)
        if self.optimizer is not None:
            clock = None
            if warmup_steps is not None:
                born = getattr(next(groups.schedules(self.scheduler), None), "last_epoch", self.step)
                clock = groups.Clock(born, warmup_steps, self.total_steps)
            groups.add(self.optimizer, self.scheduler, parameters, groups.kinds(self.host.model), clock)
        if processes.count() > 1:
            self.late += parameters
        forget_compiled()

    def drop_parameters(self, parameters: list[nn.Parameter]) -> None:
        """See `Moment.drop_parameters`."""
        if self.optimizer is not None:
            groups.drop(self.optimizer, parameters)
        gone = {id(parameter) for parameter in parameters}
        self.late = [parameter for parameter in self.late if id(parameter) not in gone]
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        forget_compiled()

    def averaged(self, tensor: Tensor) -> Tensor:
        """See `Moment.averaged`."""
        return processes.averaged(tensor)

    # ---- to a checkpoint and back

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, as JSON: steps, epochs, and the parameters in each group of the optimiser."""
        state: dict[str, Any] = {"step": self.step, "epochs": self.epochs}
        if self.optimizer is not None:
            state["groups"] = groups.record(self.host.model, self.optimizer, self.scheduler)
        return state

    def load_state_dict(self, state: Mapping[str, Any], source: Any = "the state") -> None:
        """Go on from there. Load the adaptation's file first, then this, then the states of optimiser and schedule.

        Raises:
            FileError: it is damaged, or of another adaptation.
        """
        check_state(state, source)
        self.step, self.epochs = state["step"], state["epochs"]
        if self.optimizer is not None and "groups" in state:
            groups.rebuild(self.host.model, self.optimizer, state["groups"], source)
            groups.set_clocks(self.scheduler, state["groups"])


def check_trainable(model: nn.Module) -> None:
    """Raises TrainingError: nothing trains, or something outside of every adaptation does, and would be in no file."""
    host = need_host(model)
    if not any(True for adaptation in groups.acting(model) for _ in adaptation.parameters()):
        names = ", ".join(host.adaptations) or "none"
        raise TrainingError(
            f"nothing trains: zero trainable parameters (attached: {names}; acting: {', '.join(host.active) or 'none'})"
        )
    ours = {id(p) for adaptation in host.adaptations.values() for _, p in adaptation.named_parameters()}
    astray = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in ours]
    if astray:
        raise TrainingError(
            f"trains, but belongs to no adaptation and would be in no file: {some(astray)}\n"
            "freeze it, or name it by a method (train_head=True for the head)"
        )


def check_state(state: Any, source: Any) -> None:
    """Raises FileError: it is not what `Events.state_dict` gives."""
    fits = isinstance(state, Mapping) and all(type(state.get(key)) is int for key in ("step", "epochs"))
    for entry in (state.get("groups", []) if fits else []) or []:
        names = entry.get("names") if isinstance(entry, Mapping) else None
        fits = fits and isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not fits:
        raise FileError(f"{source}: damaged, or not what petiole wrote")


def devices(model: nn.Module) -> list[int]:
    """Indices of the CUDA devices on which a model lies."""
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


@contextmanager
def only_acting(model: nn.Module) -> Iterator[None]:
    """Parameters of adaptations that don't act need no gradient inside: DistributedDataParallel would wait for it."""
    host = need_host(model)
    shared = {id(p) for adaptation in groups.acting(model) for _, p in adaptation.named_parameters()}
    idle = [
        parameter
        for adaptation in host.adaptations.values()
        if adaptation.name not in host.active
        for parameter in adaptation.parameters()
        if id(parameter) not in shared
    ]
    for parameter in idle:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in idle:
            parameter.requires_grad_(True)


__all__ = ["Events"]
