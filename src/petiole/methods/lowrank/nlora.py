"""SLoRA, NLoRA, IntTune: a small core between LoRA's factors, and a start cut out of the weight.  Guo et al. 2025, arXiv 2502.14482.

    W x + b  <-  W x + b + s · B N A x        A (r, in), N (r, r), B (out, r), s = alpha / r

SLoRA    A and N random, B = 0: the bare backbone at the start.
NLoRA    A = W[I, :], B = W[:, J] for r rows I and columns J (the first r); Nyström: W ≈ B W[I, J]⁺ A, exact in those rows and columns.
         core "submatrix", as released: N = W[I, J], added to W as it is, so the start is near the backbone, not at it;
         core "pinv", ours: N = W[I, J]⁺ / s, taken out of W first. Written as a change of W itself, of rank 2 r:
             ΔW = s (B N A - B₀ N₀ A₀) = s ((B - B₀) N A + B₀ (N A - N₀ A₀)),    zero at the start, bit for bit.
IntTune  NLoRA with A and B frozen.

Sits     on the named linears; every fused projection by its own rows.
Trains   A, N and B: r (in + out) + r² numbers per site; IntTune N alone: r².
Merges   exactly.

Relations: with N = I it is LoRA. SVFit trains inside a subspace of W, too, but needs a decomposition of all of it; here slices suffice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from petiole.anatomy import Anatomy, Site
from petiole.errors import AttachError
from petiole.factored import Parts
from petiole.method import Base, Layers, Method, Place, layers_field
from petiole.methods.lowrank.factors import Product, kaiming_uniform
from petiole.methods.lowrank.origin import check_finite, check_rank, digest, linears, weight_of

Indices = tuple[int, ...] | None


class Structured(Method):
    """What the three have in common."""

    title: ClassVar[str] = "NLoRA: Nyström-Initiated Low-Rank Adaptation for Large Language Models"
    paper: ClassVar[str] = "2502.14482"
    learning_rates: ClassVar[tuple[float, float]] = (1e-4, 3e-2)
    saves: ClassVar[str] = "optimiser state and checkpoint; free at inference once merged"
    merges: ClassVar[bool] = True
    size: ClassVar[str] = "rank"
    trained: ClassVar[tuple[str, ...]] = ("A", "N", "B")

    rank: int = Field(128, ge=1, description="Inner width r, at most the smaller side of each weight.")
    alpha: float = Field(128.0, gt=0, description="Numerator of the scaling alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="On the input of A, in training.")
    roles: tuple[str, ...] | None = Field(
        None, min_length=1, description="Linears to adapt; those of q, k, v, o, gate, up, down that there are if None."
    )
    layers: Layers = layers_field()

    @property
    def scaling(self) -> float:
        """s, the factor on B N A."""
        return self.alpha / self.rank

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        for site in linears(self.slug, anatomy, self.roles, self.layers, fused=False):
            check_rank(self.slug, site, self.rank)
            yield Place(site, self.delta(site))

    def delta(self, site: Site) -> Cored:
        return Cored(site, self)


class Nystrom(Structured):
    """What starts from slices of the weight."""

    core: Literal["submatrix", "pinv"] = Field(
        "submatrix",
        description="N at the start: the block where rows and columns meet, or its pseudo-inverse, which starts at W.",
    )
    tolerance: float = Field(
        1e-6,
        gt=0,
        lt=1,
        description="Of the pseudo-inverse: smaller singular values count as zero, relative to the largest.",
    )
    rows: Indices = Field(None, description="The r rows of W that make A; the first r if None.")
    columns: Indices = Field(None, description="The r columns of W that make B; the first r if None.")
    save_basis: bool = Field(False, description="Store what could be cut out of W again, so that the file needs no W.")

    @model_validator(mode="after")
    def _indices(self) -> Self:
        for name, index in (("rows", self.rows), ("columns", self.columns)):
            if index is not None and (len(set(index)) != self.rank or len(index) != self.rank or min(index) < 0):
                raise ValueError(f"{name} = {index[:6]}…: give rank = {self.rank} different numbers from 0 on")
        return self

    def delta(self, site: Site) -> Cored:
        for name, index, size in (("rows", self.rows, site.out_features), ("columns", self.columns, site.in_features)):
            if index is not None and max(index) >= size:
                raise AttachError(f"{self.slug}: {name} names {max(index)}, but {site.key} has 0 to {size - 1}")
        return Sliced(site, self)


class SLoRA(Structured):
    """LoRA with a trained core between A and B."""

    slug: ClassVar[str] = "slora"
    identity_at_start: ClassVar[bool] = True


class NLoRA(Nystrom):
    """LoRA with a core, begun with slices of the weight."""

    slug: ClassVar[str] = "nlora"


class IntTune(Nystrom):
    """The core alone, between slices of the weight."""

    slug: ClassVar[str] = "inttune"
    saves: ClassVar[str] = "nearly all parameters, inputs kept for backward, checkpoint; free at inference once merged"
    learning_rates: ClassVar[tuple[float, float]] = (3e-4, 1e-1)
    trained: ClassVar[tuple[str, ...]] = ("N",)


class Cored(Product):
    """ΔW = s B N A

    Args:
        site: gives the sizes. method: gives rank, scaling, dropout, and which of A, N, B train.
    """

    A: Tensor  # (r, in)
    N: Tensor  # (r, r)
    B: Tensor  # (out, r)

    def __init__(self, site: Site, method: Structured) -> None:
        super().__init__(method.dropout)
        self.method, rank = method, method.rank
        for name, shape in (("A", (rank, site.in_features)), ("N", (rank, rank)), ("B", (site.out_features, rank))):
            if name in method.trained:
                setattr(self, name, nn.Parameter(torch.empty(shape)))
            else:
                self.register_buffer(name, torch.empty(shape), persistent=False)

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        kaiming_uniform(self.A, generator)
        kaiming_uniform(self.N, generator)
        self.B.zero_()

    def parts(self) -> Parts:
        return self.N @ self.A, self.B, self.method.scaling, None  # N is multiplied with A once, not with each token


class Sliced(Cored):
    """ΔW = s B N A; for "pinv" s ((B - B₀) N A + B₀ (N A - N₀ A₀)); with N alone trained s B (N - N₀) A.

    Args:
        site, method: as for `Cored`; the method says which slices, too.
    """

    method: Nystrom
    A0: Tensor
    N0: Tensor
    B0: Tensor

    def __init__(self, site: Site, method: Nystrom) -> None:
        super().__init__(site, method)
        self.origin = ""  # digest of the slices
        self.taken_out = tuple(f"{name}0" for name in method.trained) if method.core == "pinv" else ()
        for name in self.taken_out:
            self.register_buffer(name, torch.empty_like(getattr(self, name[0]).detach()))
        for name, value in self._buffers.items():
            self.register_buffer(name, value, persistent=method.save_basis)

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        slug, rank = self.method.slug, self.method.rank
        W = weight_of(slug, base)
        I, J = (
            list(range(rank)) if index is None else list(index) for index in (self.method.rows, self.method.columns)
        )
        A, N, B = W[I], W[I][:, J], W[:, J]
        check_finite(slug, base.site, A, B)
        self.origin = digest(A, B)
        if self.taken_out:
            if not bool(N.any()):
                raise AttachError(
                    f"{slug}: the block of {base.site.key} that core='pinv' inverts is all zero; choose other rows"
                )
            N = torch.linalg.pinv(N.double(), rtol=self.method.tolerance) / self.method.scaling
        for name, value in (("A", A), ("N", N), ("B", B)):
            if name in self._buffers:  # frozen: as exact as W is, and no larger
                self.register_buffer(name, value.to(base.weight.dtype, copy=True), persistent=self.method.save_basis)
            else:
                getattr(self, name).copy_(value)
            if f"{name}0" in self.taken_out:
                getattr(self, f"{name}0").copy_(value)

    def parts(self) -> Parts:
        if isinstance(self.A, nn.Parameter):
            A = self.N @ self.A  # N A (r, in)
            if not self.taken_out:
                return A, self.B, self.method.scaling, None
            grown = A - self.N0 @ self.A0
            return torch.cat([A, grown]), torch.cat([self.B - self.B0, self.B0], 1), self.method.scaling, None
        return self.A, self.B, self.method.scaling, None, self.N - self.N0 if self.taken_out else self.N

    def recipe(self) -> dict[str, Any]:
        return {"slices": self.origin} if self._buffers and not self.method.save_basis else {}
