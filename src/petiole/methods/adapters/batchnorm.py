"""Batch normalisation inside of a delta: statistics that are right with padding, checkpointing and several processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from petiole.context import recomputing
from petiole.errors import TrainingError
from petiole.training import processes


class BatchNorm(nn.BatchNorm1d):
    """x (..., b) -> γ (x - μ) / √(σ² + ε) + β, of features that come last.

    In training μ and σ² are those of the batch: of its real tokens alone, over all processes, in float32 at least. The running ones move
    once for each forward pass, not again where checkpointing repeats it, and stay in float32 in a model that is cast to less.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """x (..., b), real (...): which rows are no padding, all if None -> (..., b)

        Raises:
            TrainingError: there is one row alone in training, whose variance is undefined.
        """
        kind = torch.promote_types(x.dtype, torch.float32)
        rows, γ, β = x.flatten(0, -2).to(kind), self.weight.to(kind), self.bias.to(kind)
        if not self.training:
            μ, σ2 = self.running_mean.to(kind), self.running_var.to(kind)
            return nn.functional.batch_norm(rows, μ, σ2, γ, β, eps=self.eps).view_as(x).to(x.dtype)
        if len(rows) * processes.count() < 2:
            raise TrainingError(
                "batch normalisation of one token of one sample: its variance is undefined; take a larger batch"
            )
        weight = rows.new_ones(len(rows), 1) if real is None else real.reshape(-1, 1).to(kind)
        total = summed(torch.cat([(rows * weight).sum(0), weight.sum(0)]))
        n = total[-1].clamp_min(1)
        μ = total[:-1] / n
        centred = rows - μ
        squares = summed((centred.square() * weight).sum(0))
        if torch.compiler.is_compiling() or not recomputing():
            with torch.no_grad():
                self.num_batches_tracked += 1
                for running, value in ((self.running_mean, μ), (self.running_var, squares / (n - 1).clamp_min(1))):
                    running.lerp_(value.to(running.dtype), self.momentum or 0.1)
        return (centred * (squares / n + self.eps).rsqrt() * γ + β).view_as(x).to(x.dtype)

    def folded(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """A depthwise convolution's weight (b, 1, k) and bias (b,) -> those of the convolution and this norm, by running statistics."""
        gain = self.weight * (self.running_var + self.eps).rsqrt()
        return weight * gain[:, None, None], (bias - self.running_mean) * gain + self.bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BatchNorm:
        before: dict[str, Any] = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in self._buffers.items():
            if value is not None and value.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = before[name].to(value.device)
        return self


def summed(tensor: Tensor) -> Tensor:
    """The sum over all processes, through which gradients go."""
    if processes.count() == 1:
        return tensor
    from torch.distributed.nn.functional import all_reduce

    total: Tensor = all_reduce(tensor)
    return total
