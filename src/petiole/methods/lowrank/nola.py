"""NOLA: LoRA's factors as mixtures of random matrices.  Koohpayegani et al. 2023, arXiv 2310.02556.

    W x + b  <-  W x + b + s · B A x        A = A₀ + Σ_i α_i A_i (r, in), i ≤ k,    B = Σ_j β_j B_j (out, r), j ≤ l

variant   A_i, B_j uniform within           A₀                      start                              s
"llm"     ±1/√k, ±1/√l                      uniform within ±1/√in   α = 0, β = 0                       alpha / r
"paper"   ±1/√k, ±1/√l                      none                    α normal of variance 1/in, β = 0   alpha / r
"vit"     ±1/√(in r), ±1/√(out r)           none                    α = 1/k, β = 1/l                   1 / r

Sits     on the named linears.
Trains   α and β: k + l numbers per site, whatever its size and rank. The matrices are drawn from a seed, a few at a time, once for the
         forward pass and once for the gradient, and never stored; an evaluation draws them once.
Starts   at B = 0, the bare backbone, bit for bit; "vit" starts near it.
Merges   exactly: ΔW = s · B A, of rank r.

Relations: fewer numbers than LoRA of rank 1, for more work in each step: k r in + l r out draws, which large batches amortise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from petiole.anatomy import Anatomy, Site
from petiole.factored import Parts
from petiole.method import Base, Layers, Method, Place, layers_field
from petiole.methods.lowrank import counter
from petiole.methods.lowrank.counter import Basis, Combine
from petiole.methods.lowrank.factors import Product
from petiole.methods.lowrank.origin import linears

Count = Annotated[int, Field(ge=1)]


class NOLA(Method):
    """Low-rank factors mixed from random matrices; only the coefficients train and are stored."""

    slug: ClassVar[str] = "nola"
    title: ClassVar[str] = "NOLA: Compressing LoRA using Linear Combination of Random Basis"
    paper: ClassVar[str] = "2310.02556"
    saves: ClassVar[str] = "nearly all parameters, optimiser state and checkpoint; free at inference once merged"
    merges: ClassVar[bool] = True
    identity_at_start: ClassVar[bool] = True
    size: ClassVar[str] = "num_basis"
    learning_rates: ClassVar[tuple[float, float]] = (1e-3, 1e-1)

    rank: int = Field(8, ge=1, description="Inner width r; costs nothing that trains. A whole matrix is no choice.")
    num_basis: Count | tuple[Count, Count] = Field(
        512, description="Matrices k for A and l for B, at least 1; one number for both."
    )
    alpha: float | None = Field(
        None, gt=0, description="Numerator of the scaling alpha / rank; if None 8, and 1 for 'vit'."
    )
    variant: Literal["llm", "paper", "vit"] = Field(
        "llm", description="Which of the published forms, see the table above."
    )
    shared_seed: int | None = Field(
        None, ge=0, description="One seed for all sites, so that equal sizes share a basis; if None each has its own."
    )
    chunk: int = Field(4, ge=1, description="Basis matrices drawn at once; a matter of memory and speed alone.")
    cache_basis: Literal["never", "forward", "always"] = Field(
        "never", description="Keep the basis in memory: never, from forward to backward, always."
    )
    save_bits: Literal[32, 16, 8, 4] = Field(
        32, description="Of each stored coefficient, between smallest and largest."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="On the input of A, in training.")
    roles: tuple[str, ...] = Field(("q", "v"), min_length=1, description="Linears to adapt, by role.")
    layers: Layers = layers_field()

    @property
    def scaling(self) -> float:
        """s, the factor on B A."""
        return (self.alpha or (1.0 if self.variant == "vit" else 8.0)) / self.rank

    @property
    def counts(self) -> tuple[int, int]:
        """k and l."""
        return self.num_basis if isinstance(self.num_basis, tuple) else (self.num_basis, self.num_basis)

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        for site in linears(self.slug, anatomy, self.roles, self.layers):
            yield Place(site, Mixed(site, self))


class Mixed(Product):
    """ΔW = s · B A, both mixed from random matrices.

    Args:
        site: gives the sizes. method: everything else.
    """

    def __init__(self, site: Site, method: NOLA) -> None:
        super().__init__(method.dropout)
        self.method, self.width, (k, l) = method, site.in_features, method.counts
        self.alpha, self.beta = nn.Parameter(torch.empty(k)), nn.Parameter(torch.empty(l))
        self.offset = method.variant == "llm"  # A₀ is the last matrix of A's basis
        shapes = (method.rank, site.in_features), (site.out_features, method.rank)
        self.bases: tuple[Basis, ...] = Basis(0, k + self.offset, shapes[0]), Basis(0, l, shapes[1])
        fans = [float(a * b) for a, b in shapes] if method.variant == "vit" else [k, l]
        self.bounds = tuple(fan**-0.5 for fan in fans)
        self._whole: dict[int, Tensor] = {}  # of each basis, where it is always kept
        self._last: tuple[Tensor, ...] = ()  # α, β, and the A and B they gave, while nothing trains

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        shared = self.method.shared_seed
        seeds = (
            [shared_seed(shared, end) for end in "AB"] if shared is not None else [draw_seed(generator) for _ in "AB"]
        )
        self.bases = tuple(replace(basis, seed=seed) for basis, seed in zip(self.bases, seeds, strict=True))
        if self.method.variant == "vit":
            self.alpha.fill_(1 / len(self.alpha))
            self.beta.fill_(1 / len(self.beta))
        else:
            self.alpha.normal_(0, self.width**-0.5 if self.method.variant == "paper" else 0.0, generator=generator)
            self.beta.zero_()

    def parts(self) -> Parts:
        still = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if not still:
            self._last = ()
        elif self._last and all(same(*pair) for pair in zip(self._last, (self.alpha, self.beta), strict=False)):
            return self._last[2], self._last[3], self.method.scaling, None
        c = self.bounds[0] * self.alpha
        if self.offset:
            c = torch.cat([c, c.new_full((1,), self.width**-0.5)])
        A, B = self.mixed(0, c), self.mixed(1, self.bounds[1] * self.beta)
        if still:
            self._last = self.alpha.detach().clone(), self.beta.detach().clone(), A, B
        return A, B, self.method.scaling, None

    def mixed(self, end: int, c: Tensor) -> Tensor:
        """Coefficients, bound included -> A (r, in) or B (out, r)"""
        basis, cache = self.bases[end], self.method.cache_basis
        if cache == "always" and (end not in self._whole or self._whole[end].device != c.device):
            self._whole[end] = basis.whole(c.device)
        return Combine.apply(c, basis, self.method.chunk, cache == "forward", self._whole.get(end))

    def recipe(self) -> dict[str, Any]:
        bases = {end: [b.seed, b.count, *b.shape] for end, b in zip("AB", self.bases, strict=True)}
        return {"generator": counter.NAME, "variant": self.method.variant, **bases}

    def folded_state(self) -> dict[str, Tensor]:
        state = self.state_dict()
        if self.method.save_bits == 32:
            return state
        return {f"{n}.{part}": t for n, v in state.items() for part, t in packed(v, self.method.save_bits).items()}

    def unfold(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        sizes = {"alpha": len(self.alpha), "beta": len(self.beta)}
        if set(state) != {f"{name}.{part}" for name in sizes for part in ("codes", "range")}:
            return state
        return {
            n: unpacked(state[f"{n}.codes"], state[f"{n}.range"], self.method.save_bits, size)
            for n, size in sizes.items()
        }


def same(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and torch.equal(one, other)


def draw_seed(generator: torch.Generator) -> int:
    return int(torch.randint(1 << 62, (), generator=generator))


def shared_seed(seed: int, end: str) -> int:
    """A's and B's bases must not be parts of one sequence."""
    return int.from_bytes(hashlib.sha256(f"nola {seed} {end}".encode()).digest()[:8], "big") >> 2


def packed(values: Tensor, bits: int) -> dict[str, Tensor]:
    """Evenly spaced codes between the smallest and the largest value; two of four bits share a byte."""
    low, high = values.float().aminmax()
    steps = (1 << bits) - 1
    codes = ((values.float() - low) / (high - low).clamp_min(1e-30) * steps).round().to(torch.int32)
    if bits == 4:
        pairs = nn.functional.pad(codes, (0, len(codes) % 2)).view(-1, 2)
        codes = pairs[:, 0] + 16 * pairs[:, 1]
    return {"codes": codes.to(torch.uint16 if bits == 16 else torch.uint8), "range": torch.stack([low, high])}


def unpacked(codes: Tensor, ends: Tensor, bits: int, size: int) -> Tensor:
    """What `packed` gave -> values (size,)"""
    whole = codes.to(torch.int32)
    if bits == 4:
        whole = torch.stack([whole % 16, whole // 16], 1).flatten()
    return ends[0] + whole[:size] * ((ends[-1] - ends[0]) / ((1 << bits) - 1))
