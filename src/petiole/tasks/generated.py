"""What tasks on generated data share: their splits, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar

from petiole.errors import DataError

Rows = TypeVar("Rows")


class Generated(Generic[Rows]):
    """A task whose splits are made, not loaded."""

    splits: Mapping[str, Rows]

    def encoded(self, split: str) -> Rows:
        """A split by name.

        Raises:
            DataError: there is no such split.
        """
        if split not in self.splits:
            raise DataError(f"no {split} split; there are {', '.join(self.splits)}")
        return self.splits[split]
