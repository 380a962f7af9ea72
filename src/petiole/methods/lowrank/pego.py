"""PEGO: a group of low-rank modules, kept orthogonal to the weight and to each other.  Hu et al. 2024, arXiv 2407.15085.

    W x + b  <-  W x + b + Σ_i B_i A_i x        A_i (r, in), B_i (out, r), i = 1 … N, no scaling

    loss  <-  loss + λ_p Σ ‖W D_iᵀ‖₁ + λ_d Σ_{i<j} ‖D_i D_jᵀ‖₁        D_i = B_i A_i; absolute entries, summed over all sites

The first term preserves what W knows, the second makes the modules differ. Both products run along the input; along the output they are
Wᵀ D_i and D_iᵀ D_j. With P = W A_iᵀ, or B_i (A_i A_jᵀ), every one of them is P Qᵀ for thin P and Q: its entries are formed in tiles, and
only their signs are needed for the gradients sign(P Qᵀ) Q and sign(P Qᵀ)ᵀ P.

Sits     on the named linears (q and v in the paper).
Trains   A_i and B_i: N r (in + out) numbers per site.
Starts   at B_i = 0: the bare backbone, bit for bit; both terms are 0 there, and so are their gradients.
Merges   exactly: ΔW = Σ B_i A_i.

Relations: without the terms it is LoRA of rank N r. For data from several domains, mixed in each batch, and a test on another one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from petiole.anatomy import Anatomy, Site
from petiole.errors import AttachError
from petiole.factored import Parts
from petiole.method import Base, Layers, Method, Moment, Place, layers_field
from petiole.methods.lowrank.factors import Product, kaiming_uniform
from petiole.methods.lowrank.origin import linears, weight_of

Thin = tuple[Tensor, Tensor]  # P (k, n, r) and Q (k, m, r), for k products P Qᵀ


class PEGO(Method):
    """Several LoRA modules at each site, orthogonal to the weight and to each other."""

    slug: ClassVar[str] = "pego"
    title: ClassVar[str] = (
        "Learn to Preserve and Diversify: Parameter-Efficient Group with Orthogonal Regularization for Domain Generalization"
    )
    paper: ClassVar[str] = "2407.15085"
    saves: ClassVar[str] = "optimiser state and checkpoint; free at inference once merged"
    merges: ClassVar[bool] = True
    identity_at_start: ClassVar[bool] = True
    size: ClassVar[str] = "rank"

    rank: int = Field(4, ge=1, description="Inner width r of each module.")
    num_loras: int = Field(4, ge=1, description="Modules N in each group.")
    preserve_weight: float = Field(1e-3, ge=0, description="λ_p, of the overlap with the weight.")
    diversify_weight: float = Field(1e-3, ge=0, description="λ_d, of the overlap between modules.")
    penalty: Literal["l1", "squared"] = Field("l1", description="Of the entries of the products: absolute, or squared.")
    along: Literal["input", "output"] = Field(
        "input", description="Side of the weight along which the products are taken."
    )
    roles: tuple[str, ...] = Field(("q", "v"), min_length=1, description="Linears to adapt, by role.")
    layers: Layers = layers_field()

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        for site in linears(self.slug, anatomy, self.roles, self.layers):
            yield Place(site, Group(site, self.rank, self.num_loras))

    def loss(self, moment: Moment) -> Tensor | None:
        """λ_p Σ ‖W D_iᵀ‖ + λ_d Σ ‖D_i D_jᵀ‖"""
        if not self.preserve_weight and not self.diversify_weight:
            return None
        preserve, diversify = self.overlaps([d for d in moment.deltas.values() if isinstance(d, Group)])
        return self.preserve_weight * preserve + self.diversify_weight * diversify

    def overlaps(self, groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
        """The two sums, without their weights, in float32. Products of equal size are taken together.

        Raises:
            AttachError: a group is merged, so that the weight at its site is not the one it came from any more.
        """
        merged = {id(s.delta) for a in groups[0].host.adaptations.values() if a.merged for s in a.slots}
        if any(id(group) in merged for group in groups):
            raise AttachError("pego: its loss terms need the weights as they were; unmerge before training goes on")
        kinds: tuple[dict[Any, list[Thin]], dict[Any, list[Thin]]] = ({}, {})
        with torch.autocast(groups[0].A.device.type, enabled=False):
            for group in groups:
                for kind, (P, Q) in zip(kinds, group.overlaps(self.along), strict=True):
                    kind.setdefault((*P.shape[1:], P.device), []).append((P, Q))
            norm = AbsoluteSum.apply if self.penalty == "l1" else squared_sum
            zero = groups[0].A.new_zeros(())
            sums = [
                sum((norm(*map(torch.cat, zip(*pairs, strict=True))).to(zero.device) for pairs in kind.values()), zero)
                for kind in kinds
            ]
        return sums[0], sums[1]


class Group(Product):
    """ΔW = Σ_i B_i A_i

    Args:
        site: gives the sizes. rank: of each module. count: N.
    """

    def __init__(self, site: Site, rank: int, count: int) -> None:
        super().__init__()
        self.site = site
        self.A = nn.Parameter(torch.empty(count, rank, site.in_features))  # (N, r, in)
        self.B = nn.Parameter(torch.empty(count, site.out_features, rank))  # (N, out, r)

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        kaiming_uniform(self.A, generator, fan_in=self.A.shape[2])
        self.B.zero_()

    def parts(self) -> Parts:
        """One product of rank N r: the A_i stacked, the B_i side by side."""
        return self.A.flatten(0, 1), self.B.transpose(0, 1).flatten(1), 1.0, None

    def overlaps(self, along: str) -> tuple[Thin, Thin]:
        """P and Q of the products W D_iᵀ (N of them) and D_i D_jᵀ (one for each pair); along the output everything is transposed."""
        W = weight_of("pego", Base(self.site, self.host.module(self.site.path)))
        X, Y = self.A.to(W.dtype), self.B.to(W.dtype)  # D = Y X
        if along == "output":
            X, Y, W = Y.mT, X.mT, W.T
        i, j = torch.triu_indices(len(X), len(X), 1, device=X.device)
        return (W @ X.mT, Y), (Y[i] @ (X[i] @ X[j].mT), Y[j])


def squared_sum(P: Tensor, Q: Tensor) -> Tensor:
    """P (k, n, r), Q (k, m, r) -> Σ of the squared entries of P Qᵀ = Σ tr(PᵀP QᵀQ)"""
    return ((P.mT @ P) * (Q.mT @ Q)).sum()


class AbsoluteSum(torch.autograd.Function):
    """P (k, n, r), Q (k, m, r) -> Σ of the absolute entries of P Qᵀ. Nothing of size n x m is kept; |0| has gradient 0."""

    @staticmethod
    def forward(ctx: Any, P: Tensor, Q: Tensor) -> Tensor:
        room = 1 << (20 if P.device.type == "cpu" else 24)  # entries of a tile
        (count, n, _), m = P.shape, Q.shape[1]
        together, tile = max(1, room // max(1, n * m)), max(1, room // max(1, m))
        total, gP, gQ = P.new_zeros(()), torch.zeros_like(P), torch.zeros_like(Q)
        for k in range(0, count, together):
            some = slice(k, k + together)
            for row in range(0, n, tile):
                rows = slice(row, row + tile)
                entries = P[some, rows] @ Q[some].mT
                total += entries.abs().sum()
                sign = entries.sign_()
                gP[some, rows] = sign @ Q[some]
                gQ[some] += sign.mT @ P[some, rows]
        ctx.save_for_backward(gP, gQ)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gP, gQ = ctx.saved_tensors
        return gradient * gP, gradient * gQ
