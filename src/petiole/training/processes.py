"""Several processes that train copies of one model: means over them, and the checks that they do the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn

from petiole.errors import TrainingError


def count() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def averaged(tensor: Tensor) -> Tensor:
    """The mean over all processes, the same on each."""
    if count() == 1:
        return tensor
    mean = tensor.detach() / count()  # divided first, as DistributedDataParallel does
    distributed.all_reduce(mean)
    return mean


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Average the gradients of parameters that DistributedDataParallel does not know, in one exchange.

    One without a gradient here counts as zero, if another process has one; without any, it stays without.
    """
    if count() == 1 or not parameters:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in parameters])
    given = torch.tensor([p.grad is not None for p in parameters], dtype=flat.dtype, device=flat.device)
    means = averaged(torch.cat([flat, given]))
    at = 0
    for parameter, have in zip(parameters, means[len(flat) :].tolist(), strict=True):
        if have:
            parameter.grad = means[at : at + parameter.numel()].view_as(parameter).to(parameter.dtype)
        at += parameter.numel()


@torch.no_grad()
def share_new(names: Sequence[str], parameters: Sequence[nn.Parameter]) -> None:
    """See to it that all processes add the same parameters with the same values: those of the first process.

    Raises:
        TrainingError: they differ in names or shapes; on every process, so that none waits for another.
    """
    if count() == 1:
        return
    text = "\n".join(f"{n} {tuple(p.shape)}" for n, p in zip(names, parameters, strict=True))
    mark = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")  # exact in float64
    device = parameters[0].device
    ends = torch.tensor([mark, -mark], dtype=torch.float64, device=device)
    distributed.all_reduce(ends, op=distributed.ReduceOp.MAX)
    if ends[0] != -ends[1]:
        raise TrainingError(
            "the processes add different parameters; decide from values that are equal on all of them: moment.averaged(…)"
        )
    for parameter in parameters:
        distributed.broadcast(parameter.data, src=0)


__all__ = ["average_gradients", "averaged", "count", "share_new"]
