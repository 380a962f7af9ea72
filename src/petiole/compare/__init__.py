"""`petiole compare`: methods side by side on one backbone and one data set, each with the same search, seeds repeated, costs measured.

from petiole.compare import compare
result = compare("petiole:vit-cifar10", "sklearn:digits", "lora,vpt", output="runs/digits", trials=4, steps=60)
print(result.rows[0].label, result.rows[0].mean)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from petiole.compare.cluster import Ray as Ray
    from petiole.compare.run import Comparison as Comparison
    from petiole.compare.run import compare as compare
    from petiole.compare.settings import Settings as Settings

_HOMES = {"Ray": "cluster", "Comparison": "run", "compare": "run", "Settings": "settings"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'petiole.compare' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"petiole.compare.{_HOMES[name]}"), name)
