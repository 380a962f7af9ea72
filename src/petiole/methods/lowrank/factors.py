"""Factored weight deltas: ΔW = scale · B A, computed in the rank dimension. What the low-rank family shares."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from petiole.anatomy import Site
from petiole.factored import Parts, between
from petiole.method import Base, WeightDelta, convolve

Zero = Literal["A", "B"]


class Factors(WeightDelta):
    """ΔW = scale · B A on a linear, an embedding or a convolution.

    A convolution's A is a kernel of the same size to `rank` channels, its B a 1x1 one back.

    Args:
        site: gives the sizes. A convolution in groups has no such factors: that is for the method to refuse.
        rank: inner width r.
        scale: factor on B A.
        dropout: on the input x, in training.
        train_bias: also learn Δb (out,), zero at start.
        zero: which of the two starts at 0; A in an embedding.
    """

    def __init__(
        self,
        site: Site,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        train_bias: bool = False,
        zero: Zero = "B",
    ) -> None:
        super().__init__()
        self.kind, self.scale, self.rank, self.zero = site.kind, scale, rank, zero
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.A = nn.Parameter(torch.empty(rank, site.in_features, *site.kernel))  # (r, in, *kernel)
        self.B = nn.Parameter(torch.empty(site.out_features, rank))  # (out, r)
        self.delta_bias = nn.Parameter(torch.empty(site.out_features)) if train_bias else None

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        """A Kaiming-uniform with a = √5, that is U(±1/√fan_in), B = 0, or the reverse: ΔW = 0. An embedding gets A = 0 and normal B."""
        random, zero = (self.A, self.B) if self.zero == "B" else (self.B, self.A)
        kaiming_uniform(random, generator)
        zero.zero_()
        if self.kind == "embedding":
            self.A.zero_()
            self.B.normal_(generator=generator)
        if self.delta_bias is not None:
            self.delta_bias.zero_()

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """x (..., in) -> Δy (..., out)"""
        if self.dropout is not None and x.is_floating_point():
            x = self.dropout(x)
        inner = self.reduce(x, base)  # (..., r)
        if self.kind == "conv":
            change = convolve_1x1(inner * self.scale, self.B)
        else:
            change = nn.functional.linear(inner * self.scale, self.B.to(inner.dtype))
        if self.delta_bias is None:
            return change
        bias = self.delta_bias.to(change.dtype)
        return change + (bias.view(-1, *[1] * (self.A.ndim - 2)) if self.kind == "conv" else bias)

    def reduce(self, x: Tensor, base: Base) -> Tensor:
        """x -> A x, whatever kind of site."""
        if self.kind == "embedding":
            return nn.functional.embedding(x, self.A.transpose(0, 1))
        if self.kind == "conv":
            return convolve(base.module, x, self.A.to(x.dtype))
        return nn.functional.linear(x, self.A.to(x.dtype))

    def weight(self, base: Tensor) -> Tensor:
        """ΔW (out, in, *kernel) = scale · B A"""
        return (self.scale * (self.B @ self.A.flatten(1))).view(self.B.shape[0], *self.A.shape[1:])

    def bias(self, base: Tensor | None) -> Tensor | None:
        return self.delta_bias

    def factored(self) -> tuple[Tensor, Tensor, float, Tensor | None] | None:
        """A, B, scale and Δb; None for embeddings and convolutions, and where dropout acts."""
        if self.kind not in ("linear", "parameter") or (self.dropout is not None and self.training):
            return None
        return self.A, self.B, self.scale, self.delta_bias


class Product(WeightDelta):
    """ΔW = scale · B C A on a linear, with factors that a method computes: from coefficients, from frozen bases, from several of them.

    Args:
        dropout: on the input x, in training.
    """

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout) if dropout else None

    def parts(self) -> Parts:
        """A (r, in), B (out, r), scale, Δb (out,) or None, and C (r, r) or (r,) if there is one."""
        raise NotImplementedError

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """x (..., in) -> Δy (..., out)"""
        return self.applied(x if self.dropout is None else self.dropout(x))

    def applied(self, x: Tensor) -> Tensor:
        """x (..., in), after dropout -> ΔW x + Δb (..., out)"""
        A, B, scale, bias, *core = self.parts()
        low = nn.functional.linear(x, A.to(x.dtype)) * scale
        low = between(low, core[0].to(low.dtype)) if core else low
        return nn.functional.linear(low, B.to(low.dtype), None if bias is None else bias.to(low.dtype))

    def weight(self, base: Tensor) -> Tensor:
        """ΔW (out, in)"""
        return multiplied(self.parts(), base.dtype)

    def bias(self, base: Tensor | None) -> Tensor | None:
        return self.parts()[3]

    def factored(self) -> Parts | None:
        """The parts; None where dropout acts."""
        return None if self.dropout is not None and self.training else self.parts()


def multiplied(parts: Parts, dtype: torch.dtype) -> Tensor:
    """scale · B C A (out, in), in `dtype` or that of B, whichever is the wider."""
    A, B, scale, _, *core = parts
    kind = torch.promote_types(dtype, B.dtype)
    B = scale * B.to(kind)
    return (between(B, core[0].to(kind), transposed=True) if core else B) @ A.to(kind)


def convolve_1x1(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, r, *size), weight (out, r) -> (B, out, *size)"""
    return torch.movedim(nn.functional.linear(torch.movedim(x, 1, -1), weight.to(x.dtype)), -1, 1)


def kaiming_uniform(tensor: Tensor, generator: torch.Generator, fan_in: int | None = None) -> None:
    """U(±1/√fan_in), which is Kaiming-uniform with a = √5. fan_in defaults to all dimensions but the first."""
    bound = 1 / math.sqrt(fan_in if fan_in is not None else tensor[0].numel())
    tensor.uniform_(-bound, bound, generator=generator)
