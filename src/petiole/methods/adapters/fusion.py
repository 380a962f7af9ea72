"""AdapterFusion: attention over several trained adapters.  Pfeiffer et al. 2020, arXiv 2005.00247.

    q = W_q u + b_q,  k_s = W_k a_s + b_k,  v_s = W_v a_s        a_s: output of source s without its residual, frozen; u: what it reads
    o = f + Σ_s p_s v_s,  p = softmax over s of q · k_s        no division by √d

Sits     where the sources do, which are adaptations attached before.
Trains   W_q, W_k, W_v (d, d), b_q, b_k (d,): 3 d² + 2 d numbers per place, and a fresh head.
Starts   at W_v of nearly 1, so near the mean of the sources.
Merges   no: the weights p differ between tokens.

Its loss has a term value_reg · Σ ‖I - W_v‖², over all layers. Keys and values of single sources are never formed: q · k_s is taken as
(W_kᵀ q) · a_s in the adapters' middle, and W_v acts on the sum.

Relations: `scalearn` has one scale per source instead, and a 300th of the numbers. A file holds a digest of each source, as there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from petiole.anatomy import Anatomy
from petiole.method import Method, Moment, Place
from petiole.methods.adapters.bottleneck import Bottleneck
from petiole.methods.adapters.sources import Combined, check_names, places_of, sources_field


class AdapterFusion(Method):
    """Weigh trained adapters at every token."""

    slug: ClassVar[str] = "adapterfusion"
    title: ClassVar[str] = "AdapterFusion: Non-Destructive Task Composition for Transfer Learning"
    paper: ClassVar[str] = "2005.00247"
    saves: ClassVar[str] = "labels: trained adapters serve a further task"
    builds_on: ClassVar[str] = "adapters that were trained before"
    learning_rates: ClassVar[tuple[float, float]] = (1e-5, 1e-3)

    sources: tuple[str, ...] = sources_field()
    value: bool = Field(True, description="Whether W_v acts on what the sources give.")
    value_reg: float = Field(0.01, ge=0, description="Factor of ‖I - W_v‖² in the loss.")
    dropout: float = Field(0.0, ge=0, lt=1, description="On the scores, in training.")

    @field_validator("sources")
    @classmethod
    def each_once(cls, sources: tuple[str, ...]) -> tuple[str, ...]:
        return check_names(sources)

    def deltas_on(self, anatomy: Anatomy, model: nn.Module) -> Iterator[Place]:
        for each in places_of(self.slug, model, self.sources):
            yield Place(each.place.site, Fused(each.bottlenecks, self.value, self.dropout), read=each.place.read)

    def loss(self, moment: Moment) -> Tensor | None:
        terms = [delta.departure() for delta in moment.deltas.values() if isinstance(delta, Fused) and self.value]
        return self.value_reg * torch.stack([term.to(terms[0].device) for term in terms]).sum() if terms else None


class Fused(Combined):
    """Δ = Σ_s p_s W_v a_s

    Args:
        sources: by name. value: whether there is a W_v. dropout: on the scores.
    """

    def __init__(self, sources: dict[str, Bottleneck], value: bool = True, dropout: float = 0.0) -> None:
        super().__init__(sources)
        size, width = self.down.shape[1], self.up.shape[0]
        self.query, self.key = nn.Linear(size, width), nn.Linear(width, width)
        self.value = nn.Linear(width, width, bias=False) if value else None
        self.dropout = nn.Dropout(dropout)
        members = nn.functional.one_hot(self.owner.cpu(), len(sources)).to(self.up.dtype)  # (R, n)
        self.register_buffer("members", members, persistent=False)

    members: Tensor

    def initialise(self, generator: torch.Generator, base: Any) -> None:
        for layer in (self.query, self.key):
            layer.weight.normal_(0, 0.02, generator=generator)
            layer.bias.zero_()
        if self.value is not None:
            self.value.weight.fill_(1e-6).fill_diagonal_(1.0)

    def mixed(self, u: Tensor, m: Tensor) -> Tensor:
        p = self.shares(u, m)
        a = (m * (p @ self.members.T.to(p.dtype))) @ self.up.T.to(m.dtype) + p @ self.up_bias.to(p.dtype)  # Σ_s p_s a_s
        return a if self.value is None else self.value(a)

    def shares(self, u: Tensor, m: Tensor) -> Tensor:
        """u (..., d) and m (..., R) -> p (..., n)"""
        q = self.query(u)
        asked = q @ self.key.weight.to(q.dtype)  # (..., d): q · W_k a_s = (W_kᵀ q) · a_s
        scores = (m * (asked @ self.up.to(q.dtype))) @ self.members.to(q.dtype) + asked @ self.up_bias.T.to(q.dtype)
        scores = scores + (q @ self.key.bias.to(q.dtype)).unsqueeze(-1)  # the same for all sources
        return self.dropout(scores).softmax(-1)

    def departure(self) -> Tensor:
        """‖I - W_v‖²"""
        assert self.value is not None
        W = self.value.weight
        return (torch.eye(len(W), dtype=W.dtype, device=W.device) - W).square().sum()
