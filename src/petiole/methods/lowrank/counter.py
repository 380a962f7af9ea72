"""Random bases that no file holds and no graph keeps: drawn from a counter, the same on every device, in any order and any portion.

    z_i = mix(seed + (i + 1) γ)        SplitMix64 (Steele, Lea, Flood 2014), in 64-bit integers that wrap

One z gives two numbers, each 24 of its bits: u = bits / 2²³ - 1 in [-1, 1), exact in float32. Element e of basis matrix m, with n elements each
and h = ⌈n / 2⌉, is the lower half of z at m h + e for e < h, else the upper half at m h + e - h. No generator of torch's is involved.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NAME = "splitmix64-24"  # stands in files; another way of drawing needs another name


def signed(value: int) -> int:
    """64 bits as the signed integer that they are."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


_GAMMA = signed(0x9E3779B97F4A7C15)
_ROUNDS = ((30, signed(0xBF58476D1CE4E5B9)), (27, signed(0x94D049BB133111EB)), (31, 1))
_LOW = (1 << 24) - 1


def bits(seed: int, first: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """z_first, … as int64 (count,)"""
    z = torch.arange(first + 1, first + count + 1, device=device)
    z.mul_(_GAMMA).add_(signed(seed))
    for shift, factor in _ROUNDS:
        z.bitwise_xor_((z >> shift).bitwise_and_((1 << (64 - shift)) - 1))  # a shift of int64 brings the sign along
        if factor != 1:
            z.mul_(factor)
    return z


def uniform(seed: int, first: int, count: int, n: int, device: torch.device | str = "cpu") -> Tensor:
    """Basis matrices first, …, each of n elements: float32 (count, n) in [-1, 1)"""
    return drawn(signed(seed), first, count, n, torch.device(device))


@torch.library.custom_op("petiole::uniform", mutates_args=())
def drawn(seed: int, first: int, count: int, n: int, device: torch.device) -> Tensor:
    """`uniform` as one operation: where shapes alone pass, it is one step instead of twenty."""
    half = (n + 1) // 2
    z = bits(seed, first * half, count * half, device).view(count, half)
    u = torch.empty(count, 2, half, device=device, dtype=torch.float32)
    u[:, 1] = (z >> 40).bitwise_and_(_LOW)
    u[:, 0] = z.bitwise_and_(_LOW)
    return u.mul_(2**-23).sub_(1).view(count, 2 * half)[:, :n].contiguous()


@drawn.register_fake
def _(seed: int, first: int, count: int, n: int, device: torch.device) -> Tensor:
    return torch.empty(count, n, device=device)


@dataclass(frozen=True)
class Basis:
    """`count` matrices of one shape, with entries uniform in [-1, 1)."""

    seed: int
    count: int
    shape: tuple[int, ...]

    def draw(self, first: int, count: int, device: torch.device | str = "cpu") -> Tensor:
        """Matrices first, … as rows: float32 (count, elements)"""
        return uniform(self.seed, first, count, prod(self.shape), device)

    def whole(self, device: torch.device | str = "cpu") -> Tensor:
        """All of them: float32 (count, elements)"""
        return self.draw(0, self.count, device)


class Combine(torch.autograd.Function):
    """c (k,) -> Σ c_m U_m, of the basis's shape, in float32. The basis is drawn `chunk` matrices at a time, again for the gradient ⟨G, U_m⟩.

    Arguments of `apply`: c, the basis, chunk, whether to keep the basis from forward to backward, and the whole basis (k, elements) if it
    is at hand.
    """

    @staticmethod
    def forward(ctx: Any, c: Tensor, basis: Basis, chunk: int, keep: bool, whole: Tensor | None) -> Tensor:
        with torch.autocast(c.device.type, enabled=False):
            if keep and whole is None:
                whole = basis.whole(c.device)
            total = torch.zeros(prod(basis.shape), device=c.device)
            for first, part in portions(basis, chunk, whole, c.device):
                total.addmv_(part.T, c[first : first + len(part)].float())
        ctx.basis, ctx.chunk, ctx.dtype = basis, chunk, c.dtype
        ctx.save_for_backward(whole)
        return total.view(basis.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (whole,) = ctx.saved_tensors
        flat = gradient.float().flatten()
        with torch.autocast(flat.device.type, enabled=False):
            found = [part @ flat for _, part in portions(ctx.basis, ctx.chunk, whole, flat.device)]
        return torch.cat(found).to(ctx.dtype), None, None, None, None


def portions(basis: Basis, chunk: int, whole: Tensor | None, device: torch.device) -> Any:
    """The basis, a few matrices at a time: the number of the first, and rows of elements."""
    if whole is not None:
        yield 0, whole
        return
    for first in range(0, basis.count, chunk):
        yield first, basis.draw(first, min(chunk, basis.count - first), device)
