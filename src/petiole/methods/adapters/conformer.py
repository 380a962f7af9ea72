"""The three adapter modules of arXiv 2312.03694: what is between two projections may look along the sequence of tokens.

    bottleneck    A(z) = W_up GELU(W_down z)                                        W_down (b, d), W_up (d, b), all with biases
    conformer     A(z) = W_up SiLU(BN(C(GLU(W_down z))))                            W_down (2 b, d), C depthwise, of k tokens
    convpass      A(z) = W_up φ(C(φ(W_down z))), φ(x) = x sigmoid(1.702 x)          C (b, b, 3)

z (B, T, d). A convolution runs along the tokens as they come, special ones included; it pads (k - 1) // 2 in front and the rest behind, so
that an even k looks one further ahead. Padded tokens count for zero in it, and not at all in the batch's statistics.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from petiole.anatomy import Site
from petiole.method import Base, HiddenDelta
from petiole.methods.adapters.batchnorm import BatchNorm
from petiole.methods.adapters.bottleneck import ACTIVATIONS, Bottleneck

Init = Literal["zero_up", "reference"]


class Branch(HiddenDelta):
    """z (B, T, d) -> A(z), and z itself with it where `residual`."""

    residual: bool = False

    def branch(self, z: Tensor) -> Tensor:
        """A(z)"""
        raise NotImplementedError

    def forward(self, z: Tensor) -> Tensor:
        change = self.branch(z)
        return change + z if self.residual else change


class Plain(Branch, Bottleneck):
    """W_up GELU(W_down z)

    Args:
        size: d. bottleneck: b. out_size: of W_up. dropout: before W_up. init: "reference" zeroes both projections, after which only the
            bias of W_up ever gets a gradient.
    """

    def __init__(self, size: int, bottleneck: int, out_size: int, dropout: float, init: Init) -> None:
        super().__init__(size, bottleneck, activation="gelu", dropout=dropout, out_size=out_size)
        self.dead = init == "reference"

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        super().initialise(generator, base)
        if self.dead:
            self.down.weight.zero_()

    def branch(self, z: Tensor) -> Tensor:
        return Bottleneck.forward(self, z)


class Convolved(Branch):
    """What the two with a convolution share.

    Args:
        site: whose hidden state is read; its model says what is padding. inner: width behind W_down. bottleneck: b. out_size: of W_up.
        kernel_size: k. groups: of the convolution.
    """

    def __init__(
        self, site: Site, inner: int, bottleneck: int, out_size: int, kernel_size: int, groups: int, dropout: float
    ) -> None:
        super().__init__()
        self.site = site
        self.down = nn.Linear(site.size, inner)
        self.convolution = nn.Conv1d(bottleneck, bottleneck, kernel_size, groups=groups)
        self.up = nn.Linear(bottleneck, out_size)
        self.dropout = nn.Dropout(dropout)

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        for layer in (self.down, self.convolution, self.up):
            bound = 1 / math.sqrt(layer.weight[0].numel())
            for parameter in layer.parameters():
                parameter.uniform_(-bound, bound, generator=generator)

    def zero_up(self) -> None:
        self.up.weight.zero_()
        self.up.bias.zero_()

    def branch(self, z: Tensor) -> Tensor:
        x = z if torch.is_autocast_enabled(z.device.type) else z.to(self.down.weight.dtype)
        if z.ndim != 3:  # an image's height and width, or one sequence alone
            x = x.reshape(z.shape[0] if z.ndim > 3 else 1, -1, z.shape[-1])
        real = self.host.unpadded(self.site, x) if self.host is not None else None
        change = self.convolved(self.down(x), real)
        return change.view(*z.shape[:-1], -1).to(z.dtype)

    def convolved(self, x: Tensor, real: Tensor | None) -> Tensor:
        """W_down z (B, T, inner), and which tokens are no padding (B, T) -> A(z) (B, T, d)"""
        raise NotImplementedError

    def along(self, x: Tensor, real: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        """The convolution of x (B, T, b) over its tokens."""
        if real is not None:
            x = x * real[..., None].to(x.dtype)
        k = self.convolution.kernel_size[0]
        x = nn.functional.pad(x.mT, ((k - 1) // 2, k - 1 - (k - 1) // 2))
        return nn.functional.conv1d(x, weight.to(x.dtype), bias.to(x.dtype), groups=self.convolution.groups).mT


class Conformer(Convolved):
    """W_up SiLU(BN(C(GLU(W_down z)))), with the norm folded into the convolution in evaluation.

    Args:
        site: whose hidden state is read. bottleneck: b. kernel_size: k. out_size: of W_up. dropout: after it.
        init: "reference" does not begin with W_up = 0.
    """

    def __init__(
        self, site: Site, bottleneck: int, kernel_size: int, out_size: int, dropout: float, init: Init
    ) -> None:
        super().__init__(site, 2 * bottleneck, bottleneck, out_size, kernel_size, bottleneck, dropout)
        self.norm = BatchNorm(bottleneck)
        self.init = init

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        super().initialise(generator, base)
        self.norm.reset_parameters()
        if self.init == "zero_up":
            self.zero_up()

    def convolved(self, x: Tensor, real: Tensor | None) -> Tensor:
        x, C = nn.functional.glu(x), self.convolution
        if self.norm.training:
            x = self.norm(self.along(x, real, C.weight, C.bias), real)  # type: ignore[arg-type]
        else:
            x = self.along(x, real, *self.norm.folded(C.weight, C.bias))  # type: ignore[arg-type]
        return self.dropout(self.up(nn.functional.silu(x)))


class Convpass(Convolved):
    """W_up φ(C(φ(W_down z))), which begins with W_up = 0.

    Args:
        site: whose hidden state is read. bottleneck: b. kernel_size: k. out_size: of W_up. dropout: before it.
    """

    def __init__(self, site: Site, bottleneck: int, kernel_size: int, out_size: int, dropout: float) -> None:
        super().__init__(site, bottleneck, bottleneck, out_size, kernel_size, 1, dropout)

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        super().initialise(generator, base)
        self.zero_up()

    def convolved(self, x: Tensor, real: Tensor | None) -> Tensor:
        φ, C = ACTIVATIONS["quick_gelu"], self.convolution
        return self.up(self.dropout(φ(self.along(φ(x), real, C.weight, C.bias))))  # type: ignore[arg-type]


class Echo(HiddenDelta):
    """What enters a sub-layer, added to what it gives."""

    def forward(self, z: Tensor) -> Tensor:
        return z
