"""Parallel adapters: beside a sub-layer, fed by its input.  He et al. 2021, arXiv 2110.04366.

    h  <-  h + s · ( W_up f(W_down x + b_down) + b_up )        x: the sub-layer's input, h: its output before residual and norm

Sits     from the input to the output of each ffn (or attention).
Trains   2 d r + r + d numbers per site; s too, if `learn_scale`.
Starts   at W_up = 0: the bare backbone, bit for bit (`init="bert"` starts nearby instead).
Merges   no: f stands between the two projections.

Relations: the scaled form with s = 4 on the ffn is the better half of MAM; in sequence (`houlsby`, `pfeiffer`) needs more parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field, field_validator

from petiole.anatomy import Anatomy
from petiole.method import Layers, Method, Place, layers_field
from petiole.methods.adapters.bottleneck import Activation, Init, inserted


class ParallelAdapter(Method):
    """An adapter beside each ffn."""

    slug: ClassVar[str] = "parallel-adapter"
    title: ClassVar[str] = "Towards a Unified View of Parameter-Efficient Transfer Learning"
    paper: ClassVar[str] = "2110.04366"
    saves: ClassVar[str] = "optimiser state and checkpoint"
    identity_at_start: ClassVar[bool] = True
    size: ClassVar[str] = "bottleneck"

    bottleneck: int = Field(16, ge=1, description="Inner width r.")
    scale: float = Field(1.0, description="Factor s on the adapter's output; not 0.")
    learn_scale: bool = Field(False, description="Train s, starting from `scale`.")
    activation: Activation = Field("relu", description="Between the two projections.")
    dropout: float = Field(0.0, ge=0, lt=1, description="After the activation, in training.")
    init: Init = Field(
        "lora", description="lora: starts as the bare backbone; bert: both projections normal(0, 0.02²)."
    )
    roles: tuple[str, ...] = Field(("ffn",), min_length=1, description="Sub-layers to stand beside: ffn, attention.")
    layers: Layers = layers_field()

    @field_validator("scale")
    @classmethod
    def not_zero(cls, scale: float) -> float:
        if scale == 0:
            raise ValueError("a scale of 0 switches the adapter off for good")
        return scale

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        yield from inserted(
            anatomy,
            anatomy.sites(self.roles, self.layers),
            "parallel",
            self.bottleneck,
            scale=self.scale,
            learn_scale=self.learn_scale,
            activation=self.activation,
            dropout=self.dropout,
            init=self.init,
        )


class ScaledParallelAdapter(ParallelAdapter):
    """The same with the paper's scale for generation, s = 4."""

    slug: ClassVar[str] = "scaled-parallel-adapter"
    scale: float = Field(4.0, description="Factor s on the adapter's output; not 0.")
