"""Compacter: adapters whose matrices are sums of Kronecker products.  Karimi Mahabadi et al. 2021, arXiv 2106.04647; as in arXiv 2112.06825.

    h  <-  h + φ( h H_down + b_down ) H_up + b_up        H = Σ_i A_i ⊗ B_i, i < n;  A (n, n, n), B (n, in / n, out / n)

B_i may be a product S_i T_i of rank k, S (n, in / n, k), T (n, k, out / n). Every matrix has a rule A of its own; or all tasks share that of
one half of an adapter; or all sites share one. H itself is formed only for files of ordinary adapters (`materialise`).

Sits     after each attention (self and cross) and each ffn, before dropout, residual and norm.
Trains   n³ + in · out / n + out numbers per matrix, of each task or shared as `sharing` says; all norms of the backbone.
Starts   near the backbone: A is small, N(0, phm_init²), and B Glorot-uniform with gain √2. It learns slowly at first.
Merges   no: φ stands in between. `vl_adapter.materialise(tuned, task)` makes ordinary adapters of it.

Relations: an adapter (`vl-adapter`) has n = 1. The original shares one A among all sites and has B of rank 1: `share_phm_rule="sites"`,
`phm_rank=1`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from petiole.anatomy import Anatomy, Site
from petiole.errors import AttachError
from petiole.method import Config, Delta
from petiole.methods.adapters import kronecker
from petiole.methods.adapters.multitask import Half, SharedAdapters, TaskBottleneck


class PHMFields(Config):
    """The fields of parametrised hypercomplex multiplication."""

    phm_dim: int = Field(2, ge=1, description="n: terms of the sum, and size of A; it divides width and bottleneck.")
    phm_rank: int | None = Field(None, ge=1, description="k: rank of each B_i; B is whole if None.")
    share_phm_rule: Literal["none", "tasks", "sites"] = Field(
        "none", description="Who has the same A: none; all tasks, at one half of an adapter; all sites, both halves."
    )
    factor_phm_rule: bool = Field(False, description="Each A_i is a product of rank 1.")
    phm_init: float = Field(0.01, gt=0, description="Standard deviation of A (of its factors) at start.")


class Compacter(PHMFields, SharedAdapters):
    """Adapters of few parameters: small matrices, put together by Kronecker products."""

    slug: ClassVar[str] = "compacter"
    title: ClassVar[str] = "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers"
    paper: ClassVar[str] = "2106.04647"

    def halves(self, site: Site, bottleneck: int) -> tuple[Half, Half]:
        n, d = self.phm_dim, site.out_features
        if d % n or bottleneck % n:
            raise AttachError(
                f"{self.name}: phm_dim = {n} divides not both the width {d} and the bottleneck {bottleneck} of {site.key}\n"
                f"choose a divisor of {math.gcd(d, bottleneck)}, or another reduction_factor"
            )
        return self.half(), self.half()

    def half(self) -> Half:
        made: list[PHMLinear] = []

        def make(size_in: int, size_out: int) -> PHMLinear:
            made.append(PHMLinear(size_in, size_out, self, made[0] if made else None))
            return made[-1]

        return make

    def shared(self, anatomy: Anatomy) -> nn.Module | None:
        return Rule(self) if self.share_phm_rule == "sites" else None

    def bind(self, deltas: Mapping[str, Delta], shared: nn.Module | None) -> None:
        for delta in deltas.values():
            for half in delta.modules() if isinstance(delta, TaskBottleneck) else ():
                if isinstance(half, PHMLinear) and isinstance(shared, Rule):
                    half.common = (shared,)


class Rule(nn.Module):
    """() -> A (n, n, n)"""

    def __init__(self, fields: PHMFields) -> None:
        super().__init__()
        n, self.deviation = fields.phm_dim, fields.phm_init
        shapes = ((n, n, 1), (n, 1, n)) if fields.factor_phm_rule else ((n, n, n),)
        self.A = nn.ParameterList(torch.empty(shape) for shape in shapes)

    def initialise(self, generator: torch.Generator) -> None:
        for parameter in self.A:
            parameter.normal_(0, self.deviation, generator=generator)

    def forward(self) -> Tensor:
        return self.A[0] if len(self.A) == 1 else self.A[0] @ self.A[1]


class PHMLinear(nn.Module):
    """x (..., in) -> x Σ_i A_i ⊗ B_i + b (..., out)

    Args:
        fields: n, k, and who shares A.
        first: that of the first task in the same half of the same adapter; None if this is it.
    """

    def __init__(self, size_in: int, size_out: int, fields: PHMFields, first: PHMLinear | None = None) -> None:
        super().__init__()
        n, k = fields.phm_dim, fields.phm_rank
        a, b = size_in // n, size_out // n
        self.B = nn.ParameterList(
            torch.empty(shape) for shape in (((n, a, b),) if k is None else ((n, a, k), (n, k, b)))
        )
        self.bias = nn.Parameter(torch.empty(size_out))
        another = fields.share_phm_rule == "sites" or (fields.share_phm_rule == "tasks" and first is not None)
        self.rule = None if another else Rule(fields)
        # In a tuple, so that it is not registered once more.
        self.common: tuple[Rule, ...] = (
            (first.rule,) if another and first is not None and first.rule is not None else ()
        )

    def initialise(self, generator: torch.Generator) -> None:
        for parameter in self.B:
            bound = math.sqrt(2) * math.sqrt(6 / (parameter.shape[1] + parameter.shape[2]))
            parameter.uniform_(-bound, bound, generator=generator)
        self.bias.zero_()
        if self.rule is not None:
            self.rule.initialise(generator)

    def matrices(self) -> tuple[Tensor, kronecker.Matrices]:
        """A (n, n, n), and B (n, in / n, out / n) or its factors."""
        rule = self.rule if self.rule is not None else self.common[0]
        return rule(), self.B[0] if len(self.B) == 1 else (self.B[0], self.B[1])

    def forward(self, x: Tensor) -> Tensor:
        return kronecker.product(x, *self.matrices()) + self.bias

    @property
    def weight(self) -> Tensor:
        """Hᵀ (out, in)"""
        return kronecker.dense(*self.matrices()).T.to(self.bias.dtype)
