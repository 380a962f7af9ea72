"""(IA)³: learned rescaling of keys, values and ffn activations.  Liu et al. 2022, arXiv 2205.05638.

    h  <-  ℓ ⊙ h        h (..., d), ℓ (d,)

Sits     after the k and v projections, and before the ffn's down projection.
Trains   ℓ alone, one vector per site: d_k + d_v + d_ff numbers per block.
Starts   at ℓ = 1, so the adapted model is the bare backbone, bit for bit.
Merges   exactly. After a linear: ΔW = diag(ℓ - 1) W, Δb = (ℓ - 1) ⊙ b. Before it: ΔW = W diag(ℓ - 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from petiole.anatomy import Anatomy, Side
from petiole.errors import AttachError, ConfigError
from petiole.method import Base, Composition, Delta, HiddenDelta, Layers, Method, Place, WeightDelta, layers_field


class IA3(Method):
    """Rescale activations by one learned vector per site."""

    slug: ClassVar[str] = "ia3"
    title: ClassVar[str] = "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning"
    paper: ClassVar[str] = "2205.05638"
    saves: ClassVar[str] = "nearly all parameters; free at inference once merged"
    merges: ClassVar[bool] = True
    identity_at_start: ClassVar[bool] = True
    learning_rates: ClassVar[tuple[float, float]] = (1e-3, 1e-1)

    roles: tuple[str, ...] = Field(("k", "v", "down"), min_length=1, description="Linears to rescale, by role.")
    input_roles: tuple[str, ...] = Field(("down",), description="Those of them that are rescaled at their input.")
    layers: Layers = layers_field()

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        stray = [role for role in self.input_roles if role not in self.roles]
        if stray and self.input_roles != IA3.model_fields["input_roles"].default:  # which other roles need not repeat
            raise ConfigError(f"IA3.input_roles names {stray[0]!r}, which is not among roles {self.roles}")
        for role in self.roles:
            side: Side = "input" if role in self.input_roles else "output"
            for site in anatomy.sites([role], self.layers):
                if side == "input" and site.groups > 1:
                    raise AttachError(
                        f"ia3: {site.key} is a convolution in {site.groups} groups; rescale its output: input_roles=[]"
                    )
                kind = RescaledWeight if site.kind == "parameter" else Rescale
                yield Place(site.at(side), kind(site.at(side).size, side))


class Rescaled(Delta):
    """ℓ (d,), and what it does to a weight at its input or output.

    Args:
        size: width d of the hidden state at the site.
        side: of the linear at which the site lies; it decides what a merge scales, rows or columns.
    """

    def __init__(self, size: int, side: Side) -> None:
        super().__init__()
        self.side = side
        self.gain = nn.Parameter(torch.empty(size))  # ℓ (d,)

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        self.gain.fill_(1)

    def weight(self, base: Tensor) -> Tensor:
        """W (out, in, *kernel) -> ΔW of the same shape"""
        shape = [1] * base.ndim
        shape[self.side == "input"] = -1
        return (self.gain - 1).view(shape) * base

    def bias(self, base: Tensor | None) -> Tensor | None:
        """b (out,) -> Δb (out,); None where the scale sits before the linear and leaves b alone."""
        return None if base is None or self.side == "input" else (self.gain - 1) * base


class Rescale(Rescaled, HiddenDelta):
    """h (..., d) -> ℓ (d,), by which h is multiplied."""

    composition: Composition = "multiply"

    def forward(self, h: Tensor) -> Tensor:
        return self.gain


class RescaledWeight(Rescaled, WeightDelta):
    """The same where the linear is never called as a module, so that only its weight can be rescaled."""
