"""SVFit: train the largest singular values of each weight.  arXiv 2409.05926.

    W x + b  <-  U diag(σ) Vᵀ x + W_e x + b        U (out, r), Vᵀ (r, in), σ (r,), W_e = W - U diag(s) Vᵀ

with U, s, Vᵀ the r leading singular triplets of W, and σ = s at the start. Written as a change, with τ = σ - s, W_e is not needed:

    W x + b  <-  W x + b + U (τ ⊙ Vᵀ x)

Sits     on the named linears, each decomposed by itself; a convolution as a matrix (out, in · kernel).
Trains   τ alone: r numbers per site. U and Vᵀ are frozen, and built again from W on load.
Starts   at τ = 0, so the adapted model is the bare backbone, bit for bit (to rounding in the residual form).
Merges   exactly: ΔW = U diag(τ) Vᵀ.

Relations: LoRA moves freely in a subspace that it learns, this only along directions that W has: 16 times fewer parameters at r = d than
LoRA's at rank 8, but U and Vᵀ take r (in + out) numbers of memory, and at r = d a site costs twice its linear.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from petiole.anatomy import Anatomy, Site
from petiole.errors import AttachError
from petiole.factored import Parts
from petiole.method import Base, Layers, Method, Place, convolve, layers_field, read_weight
from petiole.methods.lowrank.factors import Product, convolve_1x1
from petiole.methods.lowrank.origin import check_finite, check_rank, digest, largest_rank, linears, weight_of

_ENERGY = 0.99
_GAP = 1e-8  # of the largest singular value: two that lie closer have no directions of their own
_OVERSAMPLING = 10


class SVFit(Method):
    """Learn the leading singular values of each weight, and nothing else."""

    slug: ClassVar[str] = "svfit"
    title: ClassVar[str] = "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values"
    paper: ClassVar[str] = "2409.05926"
    saves: ClassVar[str] = "nearly all parameters, optimiser state and checkpoint; free at inference once merged"
    merges: ClassVar[bool] = True
    identity_at_start: ClassVar[bool] = True
    size: ClassVar[str] = "rank"
    learning_rates: ClassVar[tuple[float, float]] = (1e-3, 1e-1)

    rank: int | Literal["full"] | None = Field(
        None,
        description="Singular values r that train in each weight, at least 1; 'full' for all; None to go by `energy`.",
    )
    energy: float | None = Field(
        None, gt=0, le=1, description="Where there is no rank: the share of Σ s² that the r largest hold, 0.99 if None."
    )
    form: Literal["delta", "residual"] = Field(
        "delta",
        description="Add U (τ ⊙ Vᵀ x), or compute U (σ ⊙ Vᵀ x) + W_e x as printed, which forms W_e in each pass.",
    )
    svd: Literal["exact", "randomised"] = Field(
        "exact", description="Randomised is approximate, and fast where r is small."
    )
    power_iterations: int = Field(2, ge=0, description="Of the randomised decomposition; more are more exact.")
    train_bias: bool = Field(False, description="Also learn Δb at each site with a bias.")
    save_basis: bool = Field(False, description="Store U and Vᵀ in the file; otherwise only where W leaves them open.")
    roles: tuple[str, ...] = Field(("q", "v"), min_length=1, description="Linears (or conv) to adapt, by role.")
    layers: Layers = layers_field()

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if isinstance(self.rank, int) and self.rank < 1:
            raise ValueError(f"rank = {self.rank}, but it starts at 1")
        if self.rank is not None and self.energy is not None:
            raise ValueError(f"rank = {self.rank} and energy = {self.energy} each say how many values train; give one")
        if self.svd == "randomised" and not isinstance(self.rank, int):
            raise ValueError("svd = 'randomised' finds the r leading values alone, so it needs rank as a number")
        return self

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        for site in linears(self.slug, anatomy, self.roles, self.layers, convolutions=True, fused=False):
            if isinstance(self.rank, int):
                check_rank(self.slug, site, self.rank)
            yield Place(site, Spectrum(site, self))


class Spectrum(Product):
    """ΔW = U diag(τ) Vᵀ

    Args:
        site: gives the sizes. method: gives rank, form and how to decompose.
    """

    U: Tensor  # (out, r)
    singular: Tensor  # s (r,)
    V: Tensor  # Vᵀ (r, in, *kernel)

    def __init__(self, site: Site, method: SVFit) -> None:
        super().__init__()
        self.site, self.method, self.origin = site, method, ""  # digest of W
        self.allocate(method.rank if isinstance(method.rank, int) else largest_rank(site), method.save_basis)
        self.delta_bias = nn.Parameter(torch.empty(site.out_features)) if method.train_bias and site.bias else None

    def allocate(self, rank: int, stored: bool) -> None:
        """Room for r triplets. Without values, r is the most that it can become."""
        self.rank, self.stored = rank, stored
        self.shift = nn.Parameter(torch.zeros(rank))  # τ (r,)
        self.keep(
            torch.empty(self.site.out_features, rank),
            torch.empty(rank),
            torch.empty(rank, self.site.in_features, *self.site.kernel),
        )

    def keep(self, U: Tensor, s: Tensor, V: Tensor) -> None:
        self.register_buffer("U", U, persistent=self.stored)
        self.register_buffer("singular", s, persistent=self.stored)
        self.register_buffer("V", V, persistent=self.stored)

    @property
    def sigma(self) -> Tensor:
        """σ (r,), as it is now."""
        return self.singular + self.shift

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        W = weight_of("svfit", base)
        check_finite("svfit", self.site, W)
        U, s, V = self.decompose(W.flatten(1), generator)
        rank = self.choose(s, W)
        gaps = s[:rank] - s[1 : rank + 1] if rank < len(s) else s[:-1] - s[1:]
        ambiguous = bool((gaps <= _GAP * s[0]).any())
        self.allocate(
            rank, self.method.save_basis or ambiguous
        )  # equal values leave open which directions: the file must say
        kind = base.weight.dtype
        U, V = U[:, :rank].to(kind, copy=True), V[:rank].to(kind, copy=True)
        self.keep(U, s[:rank].to(W.dtype, copy=True), V.view(rank, *W.shape[1:]))
        self.origin = digest(base.weight)
        if self.delta_bias is not None:
            self.delta_bias.zero_()

    def decompose(self, W: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """W (out, in) -> U, s, Vᵀ in float64, so that another machine finds the same."""
        W = W.double()
        if self.method.svd == "exact":
            U, s, V = torch.linalg.svd(W, full_matrices=False)
            return U, s, V
        width = min(self.rank + _OVERSAMPLING, *W.shape)
        probe = torch.randn(W.shape[1], width, dtype=W.dtype, generator=generator).to(W.device)
        Q = torch.linalg.qr(W @ probe)[0]
        for _ in range(self.method.power_iterations):
            Q = torch.linalg.qr(W @ torch.linalg.qr(W.T @ Q)[0])[0]
        U, s, V = torch.linalg.svd(Q.T @ W, full_matrices=False)
        return Q @ U, s, V

    def choose(self, s: Tensor, W: Tensor) -> int:
        """r: as asked, or the fewest values that hold the energy asked for, at most the rank of W and at least 1."""
        if self.method.rank is not None:
            return len(s) if self.method.rank == "full" else self.method.rank
        share = _ENERGY if self.method.energy is None else self.method.energy
        held, noise = s.square().cumsum(0), s[0] * max(W.shape) * torch.finfo(W.dtype).eps
        whole = max(1, int((s > noise).sum()))
        return whole if share == 1 else min(whole, 1 + int((held < share * held[-1]).sum()))

    def residual(self, W: Tensor) -> Tensor:
        """W (out, in, ...) -> W_e = W - U diag(s) Vᵀ"""
        return W - ((self.U * self.singular).to(W.dtype) @ self.V.flatten(1).to(W.dtype)).view(W.shape)

    def parts(self) -> Parts:
        return self.V.flatten(1), self.U, 1.0, self.delta_bias, self.shift

    def factored(self) -> Parts | None:
        return None if self.site.kind == "conv" or self.method.form == "residual" else self.parts()

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """x (..., in) -> Δy (..., out) = U (τ ⊙ Vᵀ x); in the residual form U (σ ⊙ Vᵀ x) + W_e x - W x"""
        conv, delta = self.site.kind == "conv", self.method.form == "delta"
        ends = [1] * (x.ndim - 2 if conv else 0)  # a convolution's channels stand before its positions
        values = (self.shift if delta else self.sigma).to(x.dtype).view(-1, *ends)
        V, U = self.V.to(x.dtype), self.U.to(x.dtype)
        if conv:
            change = convolve_1x1(convolve(base.module, x, V) * values, U)
        else:
            change = nn.functional.linear(nn.functional.linear(x, V) * values, U)
        if not delta:
            W = read_weight(base.site, base.module)
            change = change + base.apply(x, self.residual(W) - W)
        return change if self.delta_bias is None else change + self.delta_bias.to(change.dtype).view(-1, *ends)

    def weight(self, base: Tensor) -> Tensor:
        """ΔW (out, in, *kernel) = U diag(τ) Vᵀ"""
        return super().weight(base).view(base.shape)

    def recipe(self) -> dict[str, Any]:
        return {} if self.stored and self.method.form == "delta" else {"weight": self.origin}

    def structure(self) -> dict[str, Any]:
        return {"rank": self.rank, "basis": self.stored}

    def restructure(self, structure: Mapping[str, Any]) -> None:
        rank, stored = structure.get("rank"), structure.get("basis")
        if type(rank) is not int or not 1 <= rank <= largest_rank(self.site) or type(stored) is not bool:
            raise AttachError(f"svfit: {self.site.key} has no structure {structure}")
        if stored:
            kinds = self.U.dtype, self.singular.dtype, self.V.dtype
            self.allocate(rank, stored)
            self.keep(*(t.to(kind) for t, kind in zip((self.U, self.singular, self.V), kinds, strict=True)))
        elif rank != self.rank or self.stored:
            raise AttachError(f"svfit: {self.site.key} was decomposed to rank {rank}, here to {self.rank}")
