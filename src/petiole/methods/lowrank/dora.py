"""DoRA: weight-decomposed low-rank adaptation.  Liu et al. 2024, arXiv 2402.09353, equation 5.

    W x + b  <-  m ⊙ (W + s B A) x / ‖W + s B A‖ + b        m (out,), norm of each row (all inputs of one output)

Sits     on the named linears.
Trains   A (r, in), B (out, r) and the magnitude m: r (in + out) + out numbers per site. The norm carries no gradient (section 4.3).
Starts   at B = 0, m = ‖W‖: the bare backbone, bit for bit.
Merges   exactly: ΔW = (m / ‖W + s B A‖) ⊙ (W + s B A) - W.

Relations: LoRA with the length of each row freed from its direction; steps cost more, since the norm is needed in each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from petiole.anatomy import Anatomy, Site
from petiole.errors import AttachError
from petiole.method import Base, Layers, Method, Place, layers_field
from petiole.methods.lowrank.factors import Factors


class DoRA(Method):
    """LoRA on the direction of each weight row, and a learned length."""

    slug: ClassVar[str] = "dora"
    title: ClassVar[str] = "DoRA: Weight-Decomposed Low-Rank Adaptation"
    paper: ClassVar[str] = "2402.09353"
    saves: ClassVar[str] = "optimiser state and checkpoint; free at inference once merged"
    merges: ClassVar[bool] = True
    identity_at_start: ClassVar[bool] = True
    size: ClassVar[str] = "rank"

    rank: int = Field(8, ge=1, description="Inner width r of the two factors.")
    alpha: float = Field(16.0, gt=0, description="Numerator of the scaling alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="On the input of A, in training.")
    roles: tuple[str, ...] = Field(("q", "v"), min_length=1, description="Linears to adapt, by role.")
    layers: Layers = layers_field()

    @property
    def scaling(self) -> float:
        """s, the factor on B A."""
        return self.alpha / self.rank

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        for site in anatomy.sites(self.roles, self.layers):
            if site.kind not in ("linear", "parameter") or site.kernel:
                kind = "convolution" if site.kernel else site.kind
                raise AttachError(f"dora: {site.key} is a {kind}; it is defined for linears (lora takes the others)")
            yield Place(site, Decomposed(site, self.rank, self.scaling, self.dropout))


class Decomposed(Factors):
    """ΔW = (m / ‖V‖) ⊙ V - W with V = W + s B A. The norm of V is built from W Aᵀ and A Aᵀ, never from V itself.

    Args:
        site, rank, scale, dropout: as for `Factors`.
    """

    def __init__(self, site: Site, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(site, rank, scale, dropout)
        self.magnitude = nn.Parameter(torch.empty(site.out_features))  # m (out,)

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        super().initialise(generator, base)
        self.magnitude.copy_(self.norm(base.weight))

    def norm(self, base: Tensor) -> Tensor:
        """W (out, in) -> ‖W + s B A‖ (out,) = √(‖W‖² + 2 s ⟨W Aᵀ, B⟩ + s² ⟨B (A Aᵀ), B⟩), row by row, without gradient."""
        W, A, B = base.detach().float(), self.A.detach().float(), self.scale * self.B.detach().float()
        return (W.square().sum(1) + ((2 * (W @ A.T) + B @ (A @ A.T)) * B).sum(1)).clamp_min(1e-24).sqrt()

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """x (..., in) -> Δy = (g - 1) ⊙ (y - b) + g ⊙ s B A x, with g = m / ‖V‖"""
        assert base.output is not None
        ratio = (self.magnitude / self.norm(base.weight)).to(base.output.dtype)
        straight = base.output if base.bias is None else base.output - base.bias.to(base.output.dtype)
        return (ratio - 1) * straight + ratio * super().forward(x, base).to(base.output.dtype)

    def factored(self) -> None:
        """The change is more than its factors."""
        return None

    def weight(self, base: Tensor) -> Tensor:
        """W (out, in) -> ΔW (out, in)"""
        ratio = (self.magnitude / self.norm(base))[:, None]
        return ratio * (base + super().weight(base)) - base
