"""Adapters in sequence: after attention and ffn (Houlsby et al. 2019, arXiv 1902.00751), or after the ffn (Pfeiffer et al. 2020, arXiv 2005.00247).

    h  <-  h + W_up f(W_down h + b_down) + b_up        h: output of the sub-layer, before dropout, residual and norm

Sits     at the output of each attention (self and cross) and ffn; Pfeiffer's at the ffn alone.
Trains   2 d r + r + d numbers per site.
Starts   at W_up = 0: the bare backbone, bit for bit (`init="bert"` starts nearby instead).
Merges   no: f stands between the two projections.

Relations: parallel adapters reach the same quality with fewer parameters (arXiv 2110.04366) and don't lengthen the critical path.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from petiole.anatomy import Anatomy, Site
from petiole.method import Layers, Method, Place, layers_field, stack_field
from petiole.methods.adapters.bottleneck import Activation, Init, inserted


class SequentialAdapter(Method):
    """What the two have in common."""

    saves: ClassVar[str] = "optimiser state and checkpoint"
    identity_at_start: ClassVar[bool] = True
    size: ClassVar[str] = "bottleneck"

    bottleneck: int = Field(16, ge=1, description="Inner width r.")
    activation: Activation = Field("relu", description="Between the two projections.")
    dropout: float = Field(0.0, ge=0, lt=1, description="After the activation, in training.")
    init: Init = Field(
        "lora", description="lora: starts as the bare backbone; bert: both projections normal(0, 0.02²)."
    )
    layers: Layers = layers_field()
    stack: str | None = stack_field()

    def places(self, anatomy: Anatomy, sites: list[Site]) -> Iterator[Place]:
        """An adapter at the output of each sub-layer."""
        options = {"activation": self.activation, "dropout": self.dropout, "init": self.init}
        yield from inserted(anatomy, sites, "sequential", self.bottleneck, **options)


class HoulsbyAdapter(SequentialAdapter):
    """An adapter after each attention and each ffn."""

    slug: ClassVar[str] = "houlsby"
    title: ClassVar[str] = "Parameter-Efficient Transfer Learning for NLP"
    paper: ClassVar[str] = "1902.00751"

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        yield from self.places(anatomy, anatomy.sites(["attention", "ffn"], self.layers, self.stack))
        attentions = anatomy.attentions(self.layers, self.stack)
        yield from self.places(anatomy, [site for site in attentions if site.role == "cross_attention"])


class PfeifferAdapter(SequentialAdapter):
    """An adapter after each ffn."""

    slug: ClassVar[str] = "pfeiffer"
    title: ClassVar[str] = "AdapterFusion: Non-Destructive Task Composition for Transfer Learning"
    paper: ClassVar[str] = "2005.00247"

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        yield from self.places(anatomy, anatomy.sites(["ffn"], self.layers, self.stack))
