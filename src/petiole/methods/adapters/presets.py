"""Settings of a paper's by name: `UnifiedView.preset("mam")`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from petiole.errors import ConfigError
from petiole.method import Method


class Presets(Method):
    """A method with such settings."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # settings of the paper's, by name

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """Settings of the paper's.

        Args:
            name: a key of `presets`. changes: of its fields.

        Raises:
            ConfigError: no preset is called so, or a field has a value out of its range.
        """
        if name not in cls.presets:
            raise ConfigError(f"no preset is called {name!r}: {', '.join(cls.presets)}")
        return cls(**{**cls.presets[name], **changes})
