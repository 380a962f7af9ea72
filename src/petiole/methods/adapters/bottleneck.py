"""The bottleneck: the one delta of the adapter family.  Form and order as in the reference of arXiv 2110.04366.

Δh = LN_out( s · W_up f( W_down LN_in(x) + b_down ) + b_up )        W_down (r, d), W_up (d, r); either norm may be absent
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from petiole.method import Base, HiddenDelta

Activation = Literal["relu", "gelu", "silu", "tanh", "identity"]
Init = Literal["lora", "bert"]
NormAt = Literal["none", "in", "out"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
    "identity": lambda h: h,
}


class Bottleneck(HiddenDelta):
    """x (..., d) -> Δh (..., d_out)

    Args:
        size: width d of what is read.
        bottleneck: inner width r.
        scale: s. learn_scale: train s, starting there.
        norm: a LayerNorm on the input ("in"), on the scaled output ("out"), or none.
        init: "lora": W_down Kaiming-uniform, W_up = 0, so Δh = 0 at start; "bert": both normal with deviation 0.02.
        out_size: width of Δh, d if None.
    """

    def __init__(
        self,
        size: int,
        bottleneck: int,
        *,
        scale: float = 1.0,
        learn_scale: bool = False,
        activation: Activation = "relu",
        dropout: float = 0.0,
        norm: NormAt = "none",
        bias: bool = True,
        init: Init = "lora",
        out_size: int | None = None,
    ) -> None:
        super().__init__()
        out_size = out_size or size
        self.init, self.activation = init, activation
        self.norm_in = nn.LayerNorm(size) if norm == "in" else None
        self.norm_out = nn.LayerNorm(out_size) if norm == "out" else None
        self.down = nn.Linear(size, bottleneck, bias=bias)
        self.up = nn.Linear(bottleneck, out_size, bias=bias)
        self.dropout = nn.Dropout(dropout)
        self.fixed_scale = scale
        self.scale = nn.Parameter(torch.empty(())) if learn_scale else None

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        if self.init == "bert":
            self.down.weight.normal_(0, 0.02, generator=generator)
            self.up.weight.normal_(0, 0.02, generator=generator)
        else:
            bound = 1 / math.sqrt(self.down.in_features)
            self.down.weight.uniform_(-bound, bound, generator=generator)
            self.up.weight.zero_()
        for layer in (self.down, self.up):
            if layer.bias is not None:
                layer.bias.zero_()
        if self.scale is not None:
            self.scale.fill_(self.fixed_scale)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.dtype
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.down.weight.dtype)  # a half-precision backbone under full-precision adapters
        if self.norm_in is not None:
            x = self.norm_in(x)
        x = self.up(self.dropout(ACTIVATIONS[self.activation](self.down(x))))
        x = x * (self.fixed_scale if self.scale is None else self.scale)
        return (x if self.norm_out is None else self.norm_out(x)).to(kind)
