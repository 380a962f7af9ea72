"""The bottleneck: the one delta of the adapter family.  Form and order as in the reference of arXiv 2110.04366.

Δh = LN_out( s · W_up f( W_down LN_in(x) + b_down ) + b_up )        W_down (r, d), W_up (d, r); either norm may be absent
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from petiole.anatomy import Anatomy, Site
from petiole.errors import AttachError
from petiole.method import Base, HiddenDelta, Place

Activation = Literal["relu", "gelu", "gelu_tanh", "quick_gelu", "silu", "tanh", "identity"]
Init = Literal["lora", "bert"]
NormAt = Literal["none", "in", "out"]
Insertion = Literal["parallel", "sequential", "before_projection", "pfeiffer"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda h: nn.functional.gelu(h, approximate="tanh"),
    "quick_gelu": lambda h: h * torch.sigmoid(1.702 * h),
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


class Renormed(Bottleneck):
    """Δ = A(LN(v)), added to v (..., d), which is what enters LN, the norm that ends a block.

    So the norm is used twice: v = f + x of the ffn's output and the residual  ->  LN(f + A(LN(f + x)) + x).

    Args:
        closing: path of LN. Others as for `Bottleneck`.
    """

    reads_both = True  # what the ffn gives, only to be sure that it ran before

    def __init__(self, closing: str, size: int, bottleneck: int, **options: Any) -> None:
        super().__init__(size, bottleneck, **options)
        self.closing = closing

    def forward(self, f: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(self.host.module(self.closing).forward(v))  # its hooks are where this is called from


def inserted(
    anatomy: Anatomy, sites: Iterable[Site], insertion: Insertion, bottleneck: int, **options: Any
) -> Iterator[Place]:
    """A bottleneck at each sub-layer.

    Args:
        insertion: "parallel": fed by the sub-layer's input, added to its output; "sequential": fed by the output; "before_projection":
            fed by the input of an attention, added to its heads; "pfeiffer": at the norm that ends the block, see `Renormed`.
        options: of `Bottleneck`.

    Raises:
        AttachError: an attention without an output projection, a block that no norm ends.
    """
    for site in sites:
        if insertion == "sequential":
            yield Place(site.at("output"), Bottleneck(site.out_features, bottleneck, **options))
        elif insertion == "pfeiffer":
            norm = anatomy.closing_norm(site)
            if norm is None:
                raise AttachError(
                    f"insertion='pfeiffer': {anatomy.model_class} has no norm after {site.key} and its residual, which it would use\n"
                    "insertion='sequential' puts the adapter after the ffn of any model"
                )
            again = Renormed(norm.path, norm.in_features, bottleneck, **options)
            yield Place(norm.at("input"), again, read=site.at("output"))
        else:
            target = site.at("output") if insertion == "parallel" else before_projection(anatomy, site)
            delta = Bottleneck(site.in_features, bottleneck, out_size=target.size, **options)
            yield Place(target, delta, read=site.at("input"))


def before_projection(anatomy: Anatomy, attention: Site) -> Site:
    """Where an attention's heads stand side by side.

    Raises:
        AttachError: it has no output projection of its own, or one that is never called.
    """
    output = anatomy.part(attention, "o")
    if output is None or output.kind != "linear":
        raise AttachError(f"{attention.key} calls no output projection, before which its heads could change")
    return output.at("input")
