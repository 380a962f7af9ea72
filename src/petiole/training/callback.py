"""Method events for anyone's Trainer: `Trainer(…, callbacks=[PetioleCallback()])`."""

from __future__ import annotations

import math
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
    """Fires the events of all attached methods, and stops at the first loss or weight that is not finite.

    Methods that add parameters can be resumed, and trained by several processes, by `pt.Trainer` only.

    Args:
        prove: whether the first step must show that every site was called and every delta moved.
        batches: for methods that calibrate on data; `pt.Trainer` takes them from its own loader.
        held_out: for methods that compare on held-out data, see `Events.begin`; `pt.Trainer` takes its `eval_dataset`.
    """

    def __init__(self, prove: bool = True, batches: Any = None, held_out: Any = None) -> None:
        self.prove, self.batches, self.held_out = prove, batches, held_out
        self.events: Events | None = None
        self.epochs: int | None = (
            None  # whose end had been told when the checkpoint was saved from which training goes on
        )

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        self.events = Events(inner(model), optimizer, lr_scheduler, total_steps=state.max_steps, prove=self.prove)
        self.events.step, self.events.epoch = state.global_step, float(state.epoch or 0)
        done = math.ceil(self.events.epoch) if state.global_step >= state.max_steps else math.floor(self.events.epoch)
        self.events.epochs = self.epochs if self.epochs is not None else done
        self.events.begin(self.batches, self.held_out)
        while self.events.epochs < done:  # the checkpoint was saved in the last step of an epoch, before its end
            self.events.epoch_end()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.now(state).before_step()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.now(state).before_optimizer_step()

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        self.now(state).after_optimizer_step(skipped=bool(getattr(optimizer, "step_was_skipped", False)))

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
