"""The columns that a task needs, and what a column of a data set could be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from petiole.tasks import media


@dataclass(frozen=True)
class Column:
    """A column that a task needs.

    Attributes:
        key: what the task calls it.
        kind: what is in it.
        usual: names by which it is found where the user doesn't say.
        required: without it the task can't be.
        alone: it is also found, without a usual name, as the only column of its kind.
    """

    key: str
    kind: Literal["text", "label", "image", "audio"]
    usual: tuple[str, ...]
    required: bool = True
    alone: bool = True


def kinds(dataset: Any, name: str) -> set[str]:
    """What a column could be, by its type and, for paths and bytes, its first value."""
    feature = dataset.features[name]
    kind = type(feature).__name__
    if kind in ("ClassLabel", "Image", "Audio"):
        return {"label" if kind == "ClassLabel" else kind.lower()}
    dtype = getattr(feature, "dtype", None)
    if isinstance(dtype, str) and (
        dtype.startswith(("int", "uint", "bool")) or dtype in ("float32", "float64", "null")
    ):
        return {"label"}
    if dtype in ("string", "large_string", "binary", "large_binary") or isinstance(feature, dict):
        some = dataset.select_columns([name]).with_format("arrow")[: min(len(dataset), 100)][name].to_pylist()
        medium = media.sniff(next((value for value in some if value), None))
        if medium:
            return {medium}
        return {"text", "label"} if dtype in ("string", "large_string") else set()
    return set()
