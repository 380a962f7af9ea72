"""Method events for anyone's Trainer: `Trainer(…, callbacks=[PetioleCallback()])`."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from petiole.attach import host_of
from petiole.errors import TrainingError
from petiole.training.events import Events


def inner(model: nn.Module) -> nn.Module:
    """The user's model inside what accelerate, DDP or torch.compile put around it."""
    while host_of(model) is None:
        for name in ("module", "_orig_mod"):
            if isinstance(getattr(model, name, None), nn.Module):
                model = getattr(model, name)
                break
        else:
            return model
    return model


class PetioleCallback(TrainerCallback):
    """Fires the events of all attached methods.

    Args:
        prove: whether the first step must show that every site was called and every delta moved.
        batches: for methods that calibrate on data; `pt.Trainer` takes them from its own loader.
    """

    def __init__(self, prove: bool = True, batches: Any = None) -> None:
        self.prove, self.batches = prove, batches
        self.events: Events | None = None
        self.accumulates = False  # whether the trainer adds up losses that are scaled already (set by pt.Trainer)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        accumulation = args.gradient_accumulation_steps if self.accumulates else 1
        self.events = Events(
            inner(model), optimizer, total_steps=state.max_steps, accumulation=accumulation, prove=self.prove
        )
        self.events.step, self.events.epoch = state.global_step, float(state.epoch or 0)
        self.events.begin(self.batches)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.now(state).before_step()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.now(state).before_optimizer_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.now(state).after_optimizer_step()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.now(state).epoch_end()

    def now(self, state: TrainerState) -> Events:
        if self.events is None:
            raise TrainingError("the callback saw no beginning of training")
        self.events.epoch = float(state.epoch or 0)
        return self.events


__all__ = ["PetioleCallback"]
