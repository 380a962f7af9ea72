"""MAM: a small prefix in every attention and a scaled adapter beside every ffn.  He et al. 2021, arXiv 2110.04366.

    attention    h  <-  (1 - λ) h + λ softmax(q P_kᵀ / √d) P_v        λ: the share of attention that the prefix P_k (l, d) gets
    ffn          h  <-  h + s · (W_up ReLU(W_down x + b_down) + b_up)        W_down (r, d), W_up (d, r), x: the ffn's input

Sits     inside every attention, self and cross, and beside every ffn.
Trains   2 l d numbers per attention, 2 d r + r + d per ffn; through an MLP (`reparametrisation`) more, of which files hold none.
Starts   near the backbone: the adapters at zero, the prefix beside it.
Merges   no: softmax and ReLU stand in between.

The sizes here are the paper's for classification; for generation with BART-large it takes length=30, bottleneck=512, scale=4 and the MLP,
which is `UnifiedView.preset("mam")`. Without the MLP what trains is what a file holds, which is what a budget counts.

Relations: the best of the points that `unified-view` spans; each half alone is `prefix-tuning` and `scaled-parallel-adapter`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator

from petiole.method import Layers, Method, layers_field, stack_field
from petiole.methods.adapters.composed import Composed
from petiole.methods.adapters.parallel import ScaledParallelAdapter
from petiole.methods.prompts.prefix import PrefixTuning


class MAM(Composed):
    """A prefix in each attention, a scaled adapter beside each ffn."""

    slug: ClassVar[str] = "mam"
    title: ClassVar[str] = "Towards a Unified View of Parameter-Efficient Transfer Learning"
    paper: ClassVar[str] = "2110.04366"
    saves: ClassVar[str] = "optimiser state and checkpoint; costs length in attention"
    size: ClassVar[str] = "bottleneck"

    bottleneck: int = Field(16, ge=1, description="Inner width r of the adapters.")
    length: int = Field(16, ge=1, description="Keys and values l per attention.")
    scale: float = Field(2.0, description="Factor s on the adapters' output; not 0.")
    learn_scale: bool = Field(False, description="Train s, starting from `scale`.")
    reparametrisation: Literal["none", "mlp"] = Field(
        "none", description="Train keys and values directly, or through an MLP that is folded away on save."
    )
    hidden_size: int = Field(800, ge=1, description="Inner width of that MLP.")
    dropout: float = Field(0.0, ge=0, lt=1, description="In the adapters and on the keys and values, in training.")
    layers: Layers = layers_field()
    stack: str | None = stack_field()

    @field_validator("scale")
    @classmethod
    def not_zero(cls, scale: float) -> float:
        if scale == 0:
            raise ValueError("a scale of 0 switches the adapters off for good")
        return scale

    def parts(self) -> Sequence[Method]:
        return (
            PrefixTuning(
                length=self.length,
                reparametrisation=self.reparametrisation,
                hidden_size=self.hidden_size,
                dropout=self.dropout,
                layers=self.layers,
                stack=self.stack,
            ),
            ScaledParallelAdapter(
                bottleneck=self.bottleneck,
                scale=self.scale,
                learn_scale=self.learn_scale,
                dropout=self.dropout,
                roles=(f"{self.stack}:ffn" if self.stack else "ffn",),
                layers=self.layers,
            ),
        )

    def folded(self) -> Self:
        return self.model_copy(update={"reparametrisation": "none"})
