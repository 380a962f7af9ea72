"""A prefix without its gate: an ablation of prefix tuning.  He et al. 2021, arXiv 2110.04366, section 3.3.

    h  <-  h + s · softmax(q P_kᵀ / √d) P_v        P_k, P_v (l, d), split over the heads

h (B, T, d) are the heads, side by side, before the output projection. Prefix tuning itself is the gated change
h <- (1 - λ) h + λ softmax(q P_kᵀ / √d) P_v, with λ the share of attention that P_k gets of all keys.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from petiole.anatomy import Anatomy, Site
from petiole.method import AttentionDelta, Place
from petiole.methods.prompts.vectors import AttentionVectors, Vectors, key_size


class UngatedPrefix(AttentionVectors):
    """Learned keys and values, attended to by themselves."""

    scale: float = Field(1.0, description="Factor s on what comes of them.")

    def place(self, anatomy: Anatomy, attention: Site) -> Place:
        size = key_size(self, anatomy, attention)
        return Place(attention, Aside(scale=self.scale, size=size, **self.options(attention)))


class Aside(Vectors, AttentionDelta):
    """h + s · softmax(q P_kᵀ / √d) P_v

    Args:
        scale: s. Others as for `Vectors`.
    """

    def __init__(self, scale: float, **options: Any) -> None:
        super().__init__(**options)
        self.scale = scale

    def heads_output(self, output: Tensor, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """output (B, T, heads, d), query (B, heads, T, d) -> output, changed."""
        heads = key.shape[1]
        P_k, P_v = (p.to(query.dtype).repeat_interleave(query.shape[1] // heads, 0) for p in self.by_head(heads))
        scores = query @ P_k.mT * scaling
        change = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(P_v.dtype) @ P_v
        return output + (self.scale * change).transpose(1, 2).to(output.dtype)
