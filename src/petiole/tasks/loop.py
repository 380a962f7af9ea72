"""A model over a split, batch by batch, leaving no trace: not in the model's modes, not in the global generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from petiole.tasks.encoding import Rows

Collator = Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]


def batches(rows: Rows, collator: Collator, batch_size: int, model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Batches in order, on the model's device; pixels and samples in the type of its weights."""
    weights = next(model.parameters())
    floating = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    # A generator of its own: a DataLoader draws a number when it starts, also where nothing is shuffled.
    loader = DataLoader(rows, batch_size, collate_fn=collator, generator=torch.Generator())
    for batch in loader:
        yield {
            key: value.to(weights.device, floating if value.is_floating_point() else value.dtype)
            for key, value in batch.items()
        }


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside; every module's own mode as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def joined(tensors: Sequence[Tensor], fill: float) -> Tensor:
    """Batches (n_i, t_i, ...) -> (Σ n_i, max t, ...)."""
    if len({tensor.shape[1:] for tensor in tensors}) > 1:
        longest = max(tensor.shape[1] for tensor in tensors)
        tensors = [
            torch.cat([t, t.new_full((len(t), longest - t.shape[1], *t.shape[2:]), fill)], dim=1) for t in tensors
        ]
    return torch.cat(list(tensors))
