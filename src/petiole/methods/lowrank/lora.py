"""LoRA: low-rank adaptation of weights.  Hu et al. 2021, arXiv 2106.09685; rank-stabilised scaling: Kalajdzievski 2023, arXiv 2312.03732.

    W x + b  <-  W x + b + s · B A x        A (r, in), B (out, r), s = alpha / r, or alpha / √r rank-stabilised

Sits     on the named linears (q and v in the paper), or on embeddings and convolutions.
Trains   A and B: r (in + out) numbers per site; with `bias`, b too.
Starts   at B = 0, or at A = 0, so the adapted model is the bare backbone, bit for bit.
Merges   exactly: ΔW = s · B A.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from petiole.anatomy import Anatomy
from petiole.errors import AttachError
from petiole.method import Layers, Method, Place, layers_field
from petiole.methods.full.names import biases
from petiole.methods.lowrank.factors import Factors, Zero


class LoRA(Method):
    """Add a product of two thin matrices to each weight."""

    slug: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA: Low-Rank Adaptation of Large Language Models"
    paper: ClassVar[str] = "2106.09685"
    saves: ClassVar[str] = "optimiser state and checkpoint; free at inference once merged"
    merges: ClassVar[bool] = True
    identity_at_start: ClassVar[bool] = True
    size: ClassVar[str] = "rank"

    rank: int = Field(8, ge=1, description="Inner width r of the two factors.")
    alpha: float = Field(16.0, gt=0, description="Numerator of the scaling alpha / rank.")
    rank_stabilised: bool = Field(
        False, description="Scale by alpha / √rank, so that large ranks keep learning (rsLoRA)."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="On the input of A, in training.")
    bias: Literal["none", "adapted", "all"] = Field(
        "none", description="Biases that train too: none, those of the adapted sites, all."
    )
    zero: Zero = Field("B", description="The factor that starts at 0; the other one starts Kaiming-uniform.")
    roles: tuple[str, ...] = Field(
        ("q", "v"), min_length=1, description="Linears (or embedding, conv) to adapt, by role."
    )
    layers: Layers = layers_field()

    @property
    def scaling(self) -> float:
        """s, the factor on B A."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        for site in anatomy.sites(self.roles, self.layers):
            if site.groups > 1:
                raise AttachError(
                    f"lora: {site.key} is a convolution in {site.groups} groups, whose kernel has no factors B A"
                )
            adapted = self.bias == "adapted" and bool(site.bias)
            yield Place(site, Factors(site, self.rank, self.scaling, self.dropout, adapted, self.zero))

    def trains(self, anatomy: Anatomy, model: nn.Module) -> Iterable[str]:
        return biases(anatomy, model) if self.bias == "all" else ()
