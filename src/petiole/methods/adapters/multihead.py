"""Multi-head parallel adapters: a small adapter for each head of an attention.  He et al. 2021, arXiv 2110.04366, section 4.5.

    h  <-  h + s · ReLU(LN(x) W_q P_kᵀ) P_v        P_k, P_v (l, d), split over the heads

x (B, T, d) is what goes into the attention, h (B, T, d) are the heads, side by side, before the output projection. W_q is the frozen
projection, with its bias; queries are not divided by √d here. LN is trained. This is the form of the reference code: its W_down = W_q P_kᵀ.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from petiole.anatomy import Anatomy, Site
from petiole.errors import AttachError
from petiole.method import Base, HiddenDelta, Place
from petiole.methods.adapters.bottleneck import before_projection
from petiole.methods.prompts.vectors import AttentionVectors, Vectors


class MultiHeadAdapter(AttentionVectors):
    """A small adapter for each head."""

    scale: float = Field(1.0, description="Factor s on the adapters' output.")

    def place(self, anatomy: Anatomy, attention: Site) -> Place:
        if not attention.heads:
            raise AttachError(f"{self.name}: {attention.key} has an unknown number of heads")
        query = self.linear(anatomy, attention, "q", attention.heads)
        output = before_projection(anatomy, attention)
        if output.in_features != query.out_features:
            raise AttachError(
                f"{self.name}: the heads of {attention.key} have {output.in_features} features, its queries {query.out_features}"
            )
        delta = HeadAdapters(query, attention.heads, self.scale, size=query.out_features, **self.options(attention))
        return Place(output, delta, read=attention.at("input"))


class HeadAdapters(Vectors, HiddenDelta):
    """x (..., d) -> s · ReLU(LN(x) W_q P_kᵀ) P_v (..., d)

    Args:
        query: the frozen projection W_q. heads: how many. scale: s. Others as for `Vectors`.
    """

    def __init__(self, query: Site, heads: int, scale: float, **options: Any) -> None:
        super().__init__(**options)
        self.query, self.heads, self.scale = query, heads, scale
        self.norm = nn.LayerNorm(query.in_features)

    def forward(self, x: Tensor) -> Tensor:
        base = Base(self.query, self.host.module(self.query.path))
        normed = self.norm(x.to(self.norm.weight.dtype)).to(x.dtype)
        q = base.apply(normed, base.weight, base.bias).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
        P_k, P_v = (p.to(q.dtype) for p in self.by_head(self.heads))  # (heads, l, d / heads)
        change = torch.relu(q @ P_k.mT) @ P_v
        return self.scale * change.transpose(-3, -2).flatten(-2)
