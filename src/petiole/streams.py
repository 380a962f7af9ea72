"""Streams beside a model's own hidden state: published by deltas in a forward pass, read by other deltas or by task heads."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Published = dict[int, dict[str, Tensor]]  # place, counted along the model -> name -> state (B, ...)


class Streams:
    """What was published in one model, by thread. A copy of the model starts without any, since they belong to a forward pass."""

    def __init__(self) -> None:
        self._held: dict[int, Published] = {}
        self._kept: dict[tuple[int, str], Any] = {}

    def publish(self, place: int, states: Mapping[str, Tensor]) -> None:
        """Say what runs at a place, in whatever stood there's stead."""
        self._held.setdefault(self._here(), {})[place] = dict(states)

    def at(self, place: int) -> dict[str, Tensor]:
        """What was published at a place; nothing is an empty dictionary."""
        return self._held.get(self._here(), {}).get(place, {})

    def take(self) -> Published:
        """Everything that was published in this thread, or by compiled code. It is gone afterwards."""
        if not self._held:
            return {}
        compiled = self._held.pop(0, {})
        return self._held.pop(self._here(), {}) or compiled

    def bring_back(self, published: Published) -> None:
        """Undo a `take`."""
        if published:
            self._held[self._here()] = published

    def keep(self, name: str, value: Any) -> None:
        """Hold a value beyond the forward pass, until another takes its place: an encoder's, for the decoder's passes in generation."""
        if value is None:
            self._kept.pop((self._here(), name), None)
        else:
            self._kept[self._here(), name] = value

    def kept(self, name: str) -> Any:
        """What was kept in this thread; None is nothing."""
        return self._kept.get((self._here(), name))

    @staticmethod
    def _here() -> int:
        return 0 if torch.compiler.is_compiling() else threading.get_ident()

    def __reduce__(self) -> tuple[Any, ...]:
        return (Streams, ())
