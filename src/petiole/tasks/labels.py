"""Labels: from whatever a column holds to class numbers with names; and samples that keep the share of every class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from petiole.errors import ConfigError, DataError, need
from petiole.tasks.names import listed, nearest
from petiole.tasks.sources import Raw, Split

Unlabelled = Literal["error", "drop"]


@dataclass(frozen=True)
class Classes:
    """How the values of a label column become class numbers.

    Attributes:
        names: name of each class, in order.
        index: value -> class number.
        note: what was decided, if anything was.
    """

    names: tuple[str, ...]
    index: Mapping[Any, int]
    note: str = ""


def label(
    raw: Raw, column: str, names: Sequence[str] | None, unlabelled: Unlabelled
) -> tuple[dict[str, Split], tuple[str, ...]]:
    """Give every split its class numbers, and the column the names of the classes.

    Raises:
        DataError: rows without a label, labels that are no class, numbers that are no class numbers; with file and row.
    """
    labelled: dict[str, Split] = {}
    values: dict[str, list[Any]] = {}
    for key, split in raw.splits.items():
        found = _column(split.dataset, column)
        missing = np.array([_missing(value) for value in found])
        if missing.all() and key == "test" and raw.remote:
            raw.notes.append("test split left out: the Hub keeps its labels back")
            continue
        if missing.any():
            if unlabelled == "error" or missing.all():
                raise DataError(_unlabelled(split, column, missing))
            raw.notes.append(f"{key}: {missing.sum()} rows without a label dropped")
        kept = np.flatnonzero(~missing)
        labelled[key] = split.select(kept) if missing.any() else split
        values[key] = [_value(found[i], labelled[key], row, column) for row, i in enumerate(kept)]
    classes = _classes(labelled["train"], values["train"], column, names)
    if classes.note:
        raw.notes.append(classes.note)
    return {key: _numbered(split, values[key], column, classes) for key, split in labelled.items()}, classes.names


def _column(dataset: Any, column: str) -> list[Any]:
    return dataset.select_columns([column]).with_format("arrow")[:][column].to_pylist()


def _missing(value: Any) -> bool:
    return (
        value is None
        or value == -1
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and not value.strip())
    )


def _unlabelled(split: Split, column: str, missing: np.ndarray) -> str:
    first = int(np.flatnonzero(missing)[0])
    return (
        f"{split.where(first)}, column {column!r}: no label; so {missing.sum()} of {len(missing)} rows (empty or -1)\n"
        "Label or remove these rows, pass unlabelled='drop' to leave them out, or splits={'test': None} for a split without labels."
    )


def _value(value: Any, split: Split, row: int, column: str) -> Any:
    """A label as str, int or bool."""
    if isinstance(value, float) and value.is_integer():
        return int(value)  # a column of whole numbers that once had a gap
    if isinstance(value, str | int):
        return value
    what = (
        f"{value!r} is not a whole number"
        if isinstance(value, float)
        else f"{type(value).__name__} instead of one label"
    )
    raise DataError(
        f"{split.where(row)}, column {column!r}: {what}\nClassification needs one class a row: a name or a number from 0."
    )


def _classes(train: Split, values: Sequence[Any], column: str, given: Sequence[str] | None) -> Classes:
    feature = train.dataset.features[column]
    known = getattr(feature, "names", None)
    if given is not None:
        names = tuple(given)
        if len(set(names)) != len(names) or len(names) < 2:
            raise ConfigError(f"label_names: two or more different names are needed, got {listed(names)}")
        if known is not None and len(known) != len(names):
            raise ConfigError(f"label_names: {len(names)} names for the {len(known)} classes of column {column!r}")
        if known is None and isinstance(values[0], str):
            return Classes(names, {name: i for i, name in enumerate(names)})
        return Classes(names, {i: i for i in range(len(names))})
    if known is not None:
        return Classes(tuple(known), {i: i for i in range(len(known))})
    distinct = sorted(set(values), key=lambda value: (isinstance(value, str), value))
    index = {value: i for i, value in enumerate(distinct)}
    if isinstance(values[0], str):
        return Classes(tuple(map(str, distinct)), index)
    spoken = _companion(train, values, column, index)
    if spoken is not None:
        return Classes(spoken[1], index, f"label names from the column {spoken[0]!r}")
    note = (
        ""
        if distinct == list(range(len(distinct)))
        else f"labels {distinct[0]} to {distinct[-1]} numbered from 0 as {len(distinct)} classes"
    )
    return Classes(tuple(map(str, distinct)), index, note)


def _companion(
    train: Split, values: Sequence[Any], column: str, index: Mapping[Any, int]
) -> tuple[str, tuple[str, ...]] | None:
    """A column of text that goes one to one with the label holds the names of the classes."""
    if len(values) < 2 * len(index):  # with one row a class every text would do
        return None
    for other, feature in train.dataset.features.items():
        if other == column or getattr(feature, "dtype", None) not in ("string", "large_string"):
            continue
        names: dict[Any, str] = {}
        for value, name in zip(values, _column(train.dataset, other), strict=True):
            if not name or names.setdefault(value, name) != name:
                break
        else:
            if len(set(names.values())) == len(index):
                return other, tuple(names[value] for value in index)
    return None


def _numbered(split: Split, values: Sequence[Any], column: str, classes: Classes) -> Split:
    datasets = need("compare", "datasets")
    for row, value in enumerate(values):
        if value not in classes.index:
            allowed = list(map(str, classes.index))
            raise DataError(
                f"{split.where(row)}, column {column!r}: label {value!r} is none of the {len(allowed)} classes{nearest(str(value), allowed)}\n"
                f"Allowed: {listed(allowed)}."
            )
    labels = np.array([classes.index[value] for value in values], dtype=np.int64)
    if getattr(split.dataset.features[column], "names", None) == list(classes.names):
        return replace(split, labels=labels)
    feature = datasets.ClassLabel(names=list(classes.names))
    order = split.dataset.column_names
    dataset = (
        split.dataset.remove_columns(column).add_column(column, labels.tolist(), feature=feature).select_columns(order)
    )
    return replace(split, dataset=dataset, labels=labels)


def several_classes(key: str, split: Split, names: Sequence[str]) -> None:
    """Refuse a split whose rows are all of one class: nothing can be learnt from it, and every metric on it misleads."""
    assert split.labels is not None
    present = np.unique(split.labels)
    if len(present) < 2:
        raise DataError(
            f"{split.origin}: the {key} split has one class only, {names[int(present[0])]!r}, in all {len(split)} rows (first: {split.where(0)})\n"
            "Give rows of two classes or more; a sorted file that was cut off has this fault."
        )


def stratified(labels: np.ndarray, size: int, seed: int, keep: int = 0) -> np.ndarray:
    """Indices of about `size` rows in which every class has its share, drawn by a seed, in ascending order.

    Args:
        labels: class of each row (n,).
        size: rows to take; fewer come back if `keep` doesn't leave as many.
        seed: of the drawing.
        keep: rows of every class that must not be taken.

    Each class gets at least one row where `size` allows it.
    """
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    room = np.maximum(counts - keep, 0)
    size = min(size, int(room.sum()))
    share = size * counts / max(len(labels), 1)
    least = np.minimum(room, 1 if size >= len(counts) else 0)
    take = np.clip(np.floor(share).astype(int), least, room)
    while take.sum() != size:  # one row at a time to or from the class that is furthest from its share
        more = take.sum() < size
        open_ = take < room if more else take > least
        off = np.where(open_, share - take if more else take - share, -np.inf)
        take[int(off.argmax())] += 1 if more else -1
    generator = np.random.default_rng(seed)
    drawn = [generator.permutation(np.flatnonzero(inverse == c))[:n] for c, n in enumerate(take)]
    return np.sort(np.concatenate(drawn))
