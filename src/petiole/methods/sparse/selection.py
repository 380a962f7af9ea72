"""Which entries of several tensors are largest, and how a mask of them stands in a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from petiole.errors import AttachError, ConfigError

CHUNK = 1 << 22  # entries looked at together


def largest(sizes: Sequence[Tensor], k: int, taken: Sequence[Tensor] | None = None) -> list[Tensor]:
    """The k entries of largest absolute value over all tensors together, as flat indices in each, in order.

    Of equal ones those come first that stand in an earlier tensor, then at a smaller index. Compared in float32; two passes over the
    bits, which are ordered as the numbers are, so O(N) and 4 bytes for each entry.

    Args:
        taken: indices in each tensor that do not count.

    Raises:
        ConfigError: k is below 1, or more than there are.
    """
    every = [size.detach().float().abs().reshape(-1).view(torch.int32) for size in sizes]
    for bits, gone in zip(every, taken or (), strict=taken is not None):
        bits[gone] = -1
    free = sum(bits.numel() for bits in every) - sum(gone.numel() for gone in taken or ())
    if not 1 <= k <= free:
        raise ConfigError(f"k = {k}: from 1 to {free:,}, the entries there are")
    upper, above = _reach(every, lambda bits: (bits >> 16) + 1, k)  # 0 is for those that are taken
    lower, more = _reach(every, lambda bits: bits[(bits >> 16) + 1 == upper] & 0xFFFF, k - above)
    threshold, left = ((upper - 1) << 16) | lower, k - above - more
    found = []
    for bits in every:
        chosen = bits > threshold
        equal = (bits == threshold).nonzero().view(-1)[:left]
        left -= equal.numel()
        chosen[equal] = True
        found.append(chosen.nonzero().view(-1))
    return found


def _reach(every: Sequence[Tensor], number: Callable[[Tensor], Tensor], k: int) -> tuple[int, int]:
    """The largest number, of 16 bits, that at least k entries reach, and how many are above it."""
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for bits in every:
        for chunk in bits.split(CHUNK):
            counts += torch.bincount(number(chunk), minlength=len(counts)).cpu()
    reached = counts.flip(0).cumsum(0)  # by how many, from the largest number down
    place = int(torch.searchsorted(reached, k))
    return len(counts) - 1 - place, int(reached[place - 1]) if place else 0


def to_steps(index: Tensor, values: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Flat indices (k,) and values (k,) -> the first index and then the distances between them, and the values in that order.

    As the reference stores a mask: an index counts along the first dimension fastest, i₀ + s₀ (i₁ + s₁ (i₂ + …)); in int64.
    """
    flat, stride = torch.zeros_like(index), 1
    rest, inner = index, index.new_tensor([*shape[1:], 1]).flip(0).cumprod(0).flip(0).tolist()
    for size, below in zip(shape, inner, strict=True):
        flat = flat + stride * (rest // below)
        rest, stride = rest % below, stride * size
    order = flat.argsort()
    return torch.diff(flat[order], prepend=flat.new_zeros(1)), values[order]


def from_steps(steps: Tensor, values: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What `to_steps` gave -> flat indices in order, and their values.

    Raises:
        AttachError: they are no indices of such a tensor.
    """
    rest = steps.cumsum(0)
    entries = torch.Size(shape).numel()
    if steps.shape != values.shape or steps.ndim != 1 or steps.dtype != torch.int64:
        raise AttachError(f"a mask of a {tuple(shape)} tensor has {tuple(steps.shape)} {steps.dtype} steps")
    if bool((steps[1:] < 1).any()) or bool(((rest < 0) | (rest >= entries)).any()):
        raise AttachError(f"a mask names entries that a {tuple(shape)} tensor has not, or one twice")
    index = torch.zeros_like(rest)
    for place, size in enumerate(shape):
        index = index + (rest % size) * torch.Size(shape[place + 1 :]).numel()
        rest = rest // size
    order = index.argsort()
    return index[order], values[order]
