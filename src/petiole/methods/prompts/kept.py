"""A tensor that follows from parameters, computed once as long as they stay: what `dept` and `apt` need at inference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class Kept(nn.Module):
    """What was computed last, and from what. A module, so that it forgets when training begins or ends."""

    def __init__(self) -> None:
        super().__init__()
        self._state: list[Any] | None = None
        self._value: Tensor | None = None

    def train(self, mode: bool = True) -> Kept:
        self._state = self._value = None
        return super().train(mode)

    def forward(self, parts: Sequence[Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """`compute()`, anew where a gradient is wanted or one of the parts it is computed from has changed. In the precision of the parts."""
        device = parts[0].device.type
        with torch.autocast(device, enabled=False) if device != "meta" else nullcontext():  # which knows no autocast
            if torch.is_grad_enabled() or torch.compiler.is_compiling() or any(part.is_inference() for part in parts):
                return compute()
            state = [(id(part), part._version, part.dtype, part.device) for part in parts]
            if self._value is None or self._state != state:
                self._state, self._value = state, compute()
            return self._value
