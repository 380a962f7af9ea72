"""Run a search for what a task can do without, and read what it found."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from petiole.adaptation import Adaptation
from petiole.attach import attach
from petiole.errors import AttachError, ConfigError
from petiole.methods.execution import bandit
from petiole.methods.execution.das import DAS, stand_ins
from petiole.training.events import Events
from petiole.training.groups import parameter_groups
from petiole.training.held_out import HeldOut, loss_on

SEARCH = "search"  # the adaptation's name meanwhile


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        preferences: q of each candidate by name; the larger, the less is lost without it.
        skip: the names of the m largest, for `pt.DAS(skip=…)`.
    """

    preferences: dict[str, float]
    skip: tuple[str, ...]


def chosen(tuned: Adaptation) -> Found:
    """The preferences of an attached search as they are now, and what would be skipped.

    Raises:
        AttachError: no search is attached there.
    """
    for number, method in enumerate(tuned.methods):
        if isinstance(method, DAS) and method.skip is None:
            names, state = [delta.name for delta in stand_ins(tuned.moment(number))], tuned.state[number]
            top = bandit.chosen(state["preferences"], int(state["num_skip"]))
            return Found(dict(zip(names, state["preferences"].tolist(), strict=True)), tuple(names[i] for i in top))
    raise AttachError(f"{tuned.name!r} searches nothing: it is no pt.DAS without skip")


def search(
    model: nn.Module,
    method: DAS,
    train: Collection[Any],
    validation: Iterable[Any],
    *,
    loss: Callable[[nn.Module, Any], Tensor] = loss_on,
    learning_rate: float = 5e-4,
    weight_decay: float = 0.01,
    seed: int = 0,
) -> Found:
    """Find what to skip. The model is trained meanwhile and is afterwards as it was, bit for bit.

    `pt.Trainer` with an `eval_dataset` does the same over several processes, and can be resumed; then read `chosen(tuned)`.

    Args:
        model: without this method.
        method: without `skip`; its `search` says how long.
        train, validation: batches, gone through again and again. loss: of the model on one; by itself `model(**batch).loss`.
        learning_rate, weight_decay: of AdamW.
        seed: of new parameters and draws.

    Raises:
        ConfigError: nothing is searched with this method. AttachError: it can't sit on this model.
    """
    if method.skip is not None:
        raise ConfigError(f"search: skip = {method.skip} says already what is skipped; leave it None")
    training = model.training
    tuned = attach(model, method, seed=seed, name=SEARCH)
    try:
        groups = parameter_groups(model, learning_rate=learning_rate, weight_decay=weight_decay)
        optimizer = torch.optim.AdamW(groups)
        events = Events(model, optimizer, total_steps=len(train) * method.search.epochs)
        events.begin(train, held_out=HeldOut(validation, loss))
        for _ in range(method.search.epochs):
            model.train()
            for batch in train:
                events.before_step()
                value = loss(model, batch)
                value.backward()
                events.before_optimizer_step(value)
                optimizer.step()
                events.after_optimizer_step()
                optimizer.zero_grad()
            events.epoch_end()
        return chosen(tuned)
    finally:
        tuned.detach()
        model.train(training)
