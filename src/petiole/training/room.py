"""How much room a run's checkpoints take, so that a disk which is too small is found before the first step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from petiole.adaptation import Adaptation

OTHER = 4 << 20  # bytes of a checkpoint's small files: states of random generators and of the trainer, a tokenizer


def checkpoint_bytes(adaptations: Iterable[Adaptation]) -> int:
    """Of one checkpoint: the change, and for each number that trains two moments in float32."""
    parameters = [parameter for adaptation in adaptations for parameter in adaptation.parameters()]
    return OTHER + sum(p.numel() * (p.element_size() + 8 * p.requires_grad) for p in parameters)


def total_steps(args: Any, rows: int | None) -> int | None:
    """Optimiser steps of a run; None if nobody can know.

    Args:
        args: a `TrainingArguments`.
        rows: of the training set; None for a stream.
    """
    if args.max_steps > 0:
        return int(args.max_steps)
    if rows is None:
        return None
    batches = math.ceil(rows / (args.train_batch_size * args.world_size))
    return math.ceil(args.num_train_epochs * max(1, batches // args.gradient_accumulation_steps))


def checkpoints(args: Any, steps: int | None, start: int = 0, there: int = 0) -> int:
    """How many more checkpoints lie there at one time, at most.

    Args:
        args: a `TrainingArguments`. steps: of the whole run. start: the step that it goes on from. there: checkpoints that are there.
    """
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy == "epoch" and args.max_steps <= 0:
        made = math.ceil(args.num_train_epochs)
    elif strategy == "steps" and steps is not None:
        every = args.save_steps if args.save_steps >= 1 else math.ceil(args.save_steps * steps)
        made = math.ceil((steps - start) / max(1, every))  # the last step is saved too
    else:
        made = 2  # nobody can know: the best and the last
    if args.save_total_limit is not None:  # an old one goes when the new one is whole
        made = min(made, max(1, args.save_total_limit + 1 - there))
    return max(made, 0)


__all__ = ["checkpoint_bytes", "checkpoints", "total_steps"]
