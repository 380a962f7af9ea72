"""Held-out data for methods that look at it in training: `events.held_out`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from petiole.errors import TrainingError
from petiole.proof import default_loss

Loss = Callable[[nn.Module, Any], Tensor]


def loss_on(model: nn.Module, batch: Any) -> Tensor:
    """The loss of a model on a batch of keyword arguments: its own if it gives one."""
    return default_loss(model(**batch))


class HeldOut:
    """Batches one after the other, from the beginning again at the end. The loader's workers start once in a round through the data.

    Args:
        batches: can be gone through again and again.
        loss: of the model on one of them.
    """

    def __init__(self, batches: Iterable[Any], loss: Loss = loss_on) -> None:
        self.batches, self.loss = batches, loss
        self.rest: Iterator[Any] = iter(())

    def next(self) -> Any:
        """The next batch. The global random generator, from which a loader draws its order, ends where it was.

        Raises:
            TrainingError: there is none.
        """
        nothing = object()
        with torch.random.fork_rng(devices=[]):
            batch = next(self.rest, nothing)
            if batch is nothing:
                self.rest = iter(self.batches)
                batch = next(self.rest, nothing)
        if batch is nothing:
            raise TrainingError("held_out holds no batch, or could be gone through only once; give a loader or a list")
        return batch


__all__ = ["HeldOut", "loss_on"]
