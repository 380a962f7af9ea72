"""Gates of hidden states by granularity: a factor for each token and feature, each token, each feature, or each row.  arXiv 2308.09804.

x (B, N, d) is the residual stream in front of a sub-layer, h' (B, N, d) what its adapter made of its output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from petiole.methods.adapters.bottleneck import ACTIVATIONS
from petiole.methods.lowrank.factors import kaiming_uniform

gelu = ACTIVATIONS["gelu_tanh"]


def starts_as_linear(module: Any, generator: torch.Generator, zero: bool = False) -> None:
    """Weight and bias as torch starts a linear's, or at zero."""
    for parameter in (module.weight, module.bias):
        if zero:
            parameter.zero_()
        else:
            kaiming_uniform(parameter, generator, fan_in=module.in_features)


class Gating(nn.Module):
    """x (B, N, d), h' (B, N, d), which tokens are no padding (B, N) or None -> G, which broadcasts to (B, N, d)"""

    def initialise(self, generator: torch.Generator, zero_up: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                starts_as_linear(module, generator)


class Large(Gating):
    """G = σ( G_up φ( G_down x + a_down ) + a_up ) (B, N, d)"""

    def __init__(self, size: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(size, rank)
        self.up = nn.Linear(rank, size)

    def initialise(self, generator: torch.Generator, zero_up: bool) -> None:
        starts_as_linear(self.down, generator)
        starts_as_linear(self.up, generator, zero_up)

    def forward(self, x: Tensor, changed: Tensor, unpadded: Tensor | None) -> Tensor:
        return torch.sigmoid(self.up(gelu(self.down(x))))


class FullRank(Gating):
    """G = σ( W x + b ) (B, N, d)"""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x: Tensor, changed: Tensor, unpadded: Tensor | None) -> Tensor:
        return torch.sigmoid(self.linear(x))


class MiddleX(Gating):
    """G = σ( w · (x + h') + b ) (B, N, 1)"""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, 1)

    def forward(self, x: Tensor, changed: Tensor, unpadded: Tensor | None) -> Tensor:
        return torch.sigmoid(self.linear(x + changed))


class MiddleY(Gating):
    """G = 1 + γ (d), γ from N(0, 0.02²)"""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(size))  # γ

    def initialise(self, generator: torch.Generator, zero_up: bool) -> None:
        self.gain.normal_(0, 0.02, generator=generator)

    def forward(self, x: Tensor, changed: Tensor, unpadded: Tensor | None) -> Tensor:
        return 1 + self.gain


class Small(Gating):
    """G = mean over the tokens, without padding, of σ( w · [x; h'] + b ) (B, 1, 1)"""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * size, 1)

    def forward(self, x: Tensor, changed: Tensor, unpadded: Tensor | None) -> Tensor:
        w_x, w_h = self.linear.weight.chunk(2, 1)
        each = torch.sigmoid(nn.functional.linear(x, w_x, self.linear.bias) + nn.functional.linear(changed, w_h))
        if unpadded is None:
            return each.mean(1, keepdim=True)
        weights = unpadded[..., None].to(each.dtype)
        return (each * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp_min(1)


class Norm(Gating):
    """h' (..., d) -> what stands in the place of G ⊙ h': a LayerNorm of h', or h' over its length."""

    def __init__(self, size: int, length: bool) -> None:
        super().__init__()
        self.norm = None if length else nn.LayerNorm(size)

    def forward(self, changed: Tensor) -> Tensor:
        return nn.functional.normalize(changed, dim=-1) if self.norm is None else self.norm(changed)
