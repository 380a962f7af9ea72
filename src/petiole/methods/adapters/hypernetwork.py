"""Hypernetworks: small networks that write the weights of adapters, from codes of who asks (a task, a layer, a site).

    z = LN( W₂ ReLU( W₁ c ) )                       c (..., code), W₁ (hid, code), W₂ (pj, hid), z (..., pj), LN with ε = 1e-6
    matrix (o, i)     dense       W z + b           pj · o i + o i numbers (Hyperformer, as in arXiv 2112.06825)
                      factored    P Q of W z + b    (pj + 1)(o + i) k: its first o k numbers are P (o, k), the others Q (k, i)
                                                    (Polyhistor, arXiv 2210.03265)
    vector (o,)                   W z + b           (pj + 1) o

Every linear starts at N(0, 0.01²), its bias at 0: adapters that are generated start small, and are not exactly zero.
All codes of a forward pass go through in one call; `Host.once` keeps what comes of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

DEVIATION = 0.01
NORMS = ("norm_before", "norm_after")  # of an adapter, which may be written too


class Factors(NamedTuple):
    """A matrix (..., o, i) as P (..., o, k) times Q (..., k, i)."""

    P: Tensor
    Q: Tensor


Matrix = Tensor | Factors


def dense(matrix: Matrix) -> Tensor:
    """The matrix itself, (..., o, i)."""
    return matrix if isinstance(matrix, Tensor) else matrix.P @ matrix.Q


class AdapterWeights(NamedTuple):
    """What adapters of width d and bottleneck r are made of, one for each code.

    Attributes:
        down: (..., r, d). down_bias: (..., r). up: (..., d, r). up_bias: (..., d).
    """

    down: Matrix
    down_bias: Tensor
    up: Matrix
    up_bias: Tensor


class Hypernetwork(nn.Module):
    """What all of them have in common: how they start."""

    def initialise(self, generator: torch.Generator) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, DEVIATION, generator=generator)
                module.bias.zero_()


class Conditioning(Hypernetwork):
    """Codes c (..., code) -> z (..., pj)

    Args:
        code: width of c. hidden: of the layer between. projected: pj.
    """

    def __init__(self, code: int, hidden: int, projected: int) -> None:
        super().__init__()
        self.enter = nn.Linear(code, hidden)
        self.leave = nn.Linear(hidden, projected)
        self.norm = nn.LayerNorm(projected, eps=1e-6)

    def forward(self, codes: Tensor) -> Tensor:
        return self.norm(self.leave(torch.relu(self.enter(codes))))


class MatrixGenerator(nn.Linear):
    """z (..., pj) -> a matrix (..., o, i)

    Args:
        projected: pj. out_size, in_size: o and i.
        rank: k, of a matrix in two factors; None for a dense one.
    """

    def __init__(self, projected: int, out_size: int, in_size: int, rank: int | None = None) -> None:
        super().__init__(projected, out_size * in_size if rank is None else (out_size + in_size) * rank)
        self.out_size, self.in_size, self.rank = out_size, in_size, rank

    def forward(self, z: Tensor) -> Matrix:  # type: ignore[override]
        numbers = super().forward(z)
        if self.rank is None:
            return numbers.unflatten(-1, (self.out_size, self.in_size))
        P, Q = numbers.split((self.out_size * self.rank, self.rank * self.in_size), -1)
        return Factors(P.unflatten(-1, (self.out_size, self.rank)), Q.unflatten(-1, (self.rank, self.in_size)))


class AdapterGenerator(Hypernetwork):
    """z (..., pj) -> `AdapterWeights`

    Args:
        projected: pj. size: width d. bottleneck: r.
        rank: k, of matrices in two factors; None for dense ones.
    """

    def __init__(self, projected: int, size: int, bottleneck: int, rank: int | None = None) -> None:
        super().__init__()
        self.down = MatrixGenerator(projected, bottleneck, size, rank)
        self.down_bias = nn.Linear(projected, bottleneck)
        self.up = MatrixGenerator(projected, size, bottleneck, rank)
        self.up_bias = nn.Linear(projected, size)

    def forward(self, z: Tensor) -> AdapterWeights:
        return AdapterWeights(self.down(z), self.down_bias(z), self.up(z), self.up_bias(z))


class NormGenerator(Hypernetwork):
    """z (..., pj) -> gain and shift of a LayerNorm, two (..., d)"""

    def __init__(self, projected: int, size: int) -> None:
        super().__init__()
        self.gain, self.shift = nn.Linear(projected, size), nn.Linear(projected, size)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.gain(z), self.shift(z)
