"""Prefix tuning: learned keys and values in every attention.  Li and Liang 2021, arXiv 2101.00190; as in arXiv 2110.04366.

    softmax( q [P_k; K]ᵀ / √d ) [P_v; V]        P_k, P_v (l, d), split over the heads like K and V; no position, never masked

Sits     inside self-attention (and cross-attention, if asked), through Transformers' attention interface.
Trains   2 l d per attention; with the MLP, (l d) + (d m + m) + (2 d m + 2 d) per attention, of which only P_k, P_v are stored.
Starts   beside the backbone, not at it.
Merges   no; the MLP folds away on save.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from petiole.anatomy import Anatomy, Site
from petiole.method import AttentionDelta, Place
from petiole.methods.prompts.vectors import AttentionVectors, Vectors, key_size


class PrefixTuning(AttentionVectors):
    """Learned keys and values before the real ones."""

    slug: ClassVar[str] = "prefix-tuning"
    title: ClassVar[str] = "Prefix-Tuning: Optimizing Continuous Prompts for Generation"
    paper: ClassVar[str] = "2101.00190"
    saves: ClassVar[str] = "nearly all parameters; costs length in attention"
    learning_rates: ClassVar[tuple[float, float]] = (1e-3, 1e-1)

    def place(self, anatomy: Anatomy, attention: Site) -> Place:
        return Place(attention, Prefix(size=key_size(self, anatomy, attention), **self.options(attention)))


class Prefix(Vectors, AttentionDelta):
    """P_k, P_v (l, d_k), put before the keys and values of every sample."""

    def keys_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """key, value (B, heads, T, d) -> P_k, P_v (B, heads, l, d)"""
        batch, heads = key.shape[:2]
        P_k, P_v = self.by_head(heads)
        return P_k.expand(batch, -1, -1, -1), P_v.expand(batch, -1, -1, -1)
