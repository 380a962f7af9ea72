"""Extra loss terms of methods: added once per optimiser step, whatever the accumulation and however many processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100  # the label that counts for nothing


def share(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
    """This forward pass's share of an optimiser step, where the loss is divided by the items of the whole step.

    A trainer that accumulates hands `num_items_in_batch` to the model, so that the losses of all micro-batches (and processes) add up
    to one mean. A term that is added to each must be divided alike: by the share of the items that this batch has.

    Returns:
        Items here / items in the step; None where the loss is a mean of its own and the trainer divides it.
    """
    total = inputs.get("num_items_in_batch")
    labels = inputs.get("shift_labels", inputs.get("labels"))
    if total is None or not isinstance(labels, Tensor):
        return None
    if "shift_labels" not in inputs and shifts(model):
        labels = labels[..., 1:]
    return (labels != IGNORED).sum() / torch.as_tensor(total, device=labels.device)


def shifts(model: nn.Module) -> bool:
    """Whether the model's loss leaves out the first label of each row, as causal language models do."""
    kind = getattr(model, "loss_type", None)
    if kind is None or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    return LOSS_MAPPING.get(kind) is ForCausalLMLoss


def add(loss: Tensor, terms: list[Tensor], part: Tensor | None) -> Tensor:
    """loss + share · Σ terms"""
    extra = torch.stack([term.to(loss.device, torch.float32) for term in terms]).sum()
    return loss + (extra if part is None else part.to(extra.device) * extra).to(loss.dtype)


__all__ = ["add", "share"]
