"""Load a data set for a task: find it, choose its columns, name its classes, split it, and refuse what would train in vain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from petiole.errors import ConfigError, DataError, need
from petiole.tasks import media, sources
from petiole.tasks.labels import Unlabelled, label, several_classes, stratified
from petiole.tasks.multitask.data import load_tasks, several
from petiole.tasks.names import listed, nearest
from petiole.tasks.quiet import quiet
from petiole.tasks.sources import SPLITS, Dataset, Raw, Split

if TYPE_CHECKING:
    from petiole.tasks.base import Task
    from petiole.tasks.columns import Column


@dataclass(frozen=True)
class TaskData:
    """A data set, ready for its task.

    Attributes:
        task: name of the task.
        train, validation, test: the rows, with their own column names; the label column holds class numbers with names.
        label_names: name of each class; empty where the task has none.
        columns: what the task calls a column -> its name here.
        source: what was asked for.
        notes: what was decided: columns guessed, splits made, rows left out.
        seed: of the splits.
        origins: split -> the file or folder it came from.
        tables: what rows of every split refer to, by name: the corpus of a retrieval task.
    """

    task: str
    train: Dataset
    validation: Dataset | None
    test: Dataset | None
    label_names: tuple[str, ...]
    columns: Mapping[str, str]
    source: str
    notes: tuple[str, ...] = ()
    seed: int = 0
    origins: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, Dataset] = field(default_factory=dict)

    @property
    def splits(self) -> dict[str, Dataset]:
        """The splits there are, by name."""
        return {name: rows for name in SPLITS if (rows := getattr(self, name)) is not None}

    def __str__(self) -> str:
        sizes = ", ".join(f"{len(rows)} {name}" for name, rows in self.splits.items())
        classes = f", {len(self.label_names)} classes" if self.label_names else ""
        beside = "".join(f"; {len(rows)} {name}" for name, rows in self.tables.items())
        first = f"{self.source}: {self.task}{classes}; rows: {sizes}{beside}"
        return "\n".join([first, *(f"  {note}" for note in self.notes)])


def load_data(
    source: str | Path,
    *,
    task: str = "auto",
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    image: str | None = None,
    audio: str | None = None,
    target: str | None = None,
    columns: Mapping[str, str] | None = None,
    label_names: Sequence[str] | None = None,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.0,
    limit: int | Mapping[str, int] | None = None,
    seed: int = 0,
    unlabelled: Unlabelled = "error",
    splits: Mapping[str, str | None] | None = None,
    subset: str | None = None,
    revision: str | None = None,
) -> TaskData:
    """Load a data set from this machine or the Hub.

    Args:
        source: a csv, tsv, json, jsonl, parquet or txt file (its rows are the train split); a folder with a file or folder for each
            split (train; validation, val or dev; test); the common beginning of such files (`text/trec6` for trec6-train.parquet and
            trec6-test.parquet); a folder of images or sounds with a folder for each class or a metadata.csv (file_name, label);
            several of these for text, with + between them (`text/sst2+text/trec6`), as tasks of one model;
            a collection to search, with files called corpus, queries and qrels (`retrieval/cranfield` for cranfield-corpus.parquet and so on);
            `sklearn:digits`; or a name on the Hub (owner/name, owner/name:subset), which alone uses the network.
        task: name of the task; "auto" takes the one that the columns fit.
        text, text_pair, label, image, audio, target: names of the columns; those not given are found by name and type.
        columns: further columns, for tasks that have others than these.
        label_names: names of the classes, in the order of their numbers.
        validation_fraction: share of train to set aside where there is no validation split, every class in proportion; 0 for none.
        test_fraction: the same for a test split.
        limit: at most so many rows of each split, or of the splits named, drawn by the seed, every class in proportion.
        seed: of the splits and of `limit`.
        unlabelled: what to do with rows without a label (empty or -1).
        splits: train, validation or test -> the source's own name for it; None leaves it out.
        subset, revision: of a data set on the Hub.

    Raises:
        DataError: nothing there, a missing column, unlabelled rows, unreadable images or sounds, a split with one class; names file and row.
        ConfigError: an argument is out of range.
    """
    _in_range(validation_fraction, test_fraction, limit, seed)
    if tasks := several(source):
        shared = {
            "validation_fraction": validation_fraction,
            "test_fraction": test_fraction,
            "limit": limit,
            "seed": seed,
        }
        named = {"text": text, "text_pair": text_pair, "label": label, "columns": columns, "label_names": label_names}
        origin = {"splits": splits, "subset": subset, "revision": revision}
        return load_tasks(tasks, task=task, unlabelled=unlabelled, **shared, **named, **origin)
    own = {"text": text, "text_pair": text_pair, "label": label, "image": image, "audio": audio, "target": target}
    given = {key: name for key, name in {**own, **(columns or {})}.items() if name is not None}
    with quiet():
        raw = sources.read(source, seed=seed, splits=splits, subset=subset, revision=revision)
        kind, found = choose(raw, task, given)
        names: tuple[str, ...] = ()
        raw.splits = {key: _texts(key, split, kind, found, raw) for key, split in raw.splits.items()}
        for column in kind.columns:
            if column.kind == "label" and column.key in found:
                raw.splits, names = _label(raw, found[column.key], label_names, unlabelled)
        _set_aside(raw, "validation", validation_fraction, seed)
        _set_aside(raw, "test", test_fraction, seed + 1)
        raw.splits = {key: _limited(key, split, limit, seed) for key, split in raw.splits.items()}
        for key, split in raw.splits.items():
            if names:
                several_classes(key, split, names)
            for column in kind.columns:
                if column.kind in media.SUFFIXES and column.key in found:
                    media.check(split, found[column.key], column.kind)
    rows: dict[str, Any] = {name: raw.splits[name].dataset if name in raw.splits else None for name in SPLITS}
    origins = {key: str(split.origin) for key, split in raw.splits.items()}
    return TaskData(
        task=kind.name,
        **rows,
        label_names=names,
        columns=found,
        source=raw.source,
        notes=tuple(raw.notes),
        seed=seed,
        origins=origins,
        tables=raw.tables,
    )


_label = label  # the argument of the same name hides it


def _in_range(
    validation_fraction: float, test_fraction: float, limit: int | Mapping[str, int] | None, seed: int
) -> None:
    if seed < 0:
        raise ConfigError(f"seed: {seed} is below 0")
    for name, share in (("validation_fraction", validation_fraction), ("test_fraction", test_fraction)):
        if not 0 <= share < 1:
            raise ConfigError(f"{name}: {share} is outside [0, 1)")
    if validation_fraction + test_fraction >= 1:
        raise ConfigError("validation_fraction and test_fraction: together they leave nothing to train on")
    limits = limit if isinstance(limit, Mapping) else {"train": limit}
    for name, rows in limits.items():
        if name not in SPLITS:
            raise ConfigError(f"limit: {name!r} is none of train, validation, test{nearest(name, SPLITS)}")
        if rows is not None and rows < 2:
            raise ConfigError(f"limit: {rows} rows are too few; 2 or more")


# ----------------------------------------------------------------------------------------------------------------------- columns


def choose(raw: Raw, task: str, given: Mapping[str, str]) -> tuple[type[Task], dict[str, str]]:
    """The task and its columns: what it calls them -> their names here.

    Raises:
        ConfigError: no task of that name.
        DataError: a column that is missing; several tasks that fit equally well.
    """
    from petiole.tasks.base import registry

    tasks, train = registry(), raw.splits["train"]
    present = train.dataset.column_names
    for key, name in given.items():
        if name not in present:
            raise DataError(
                f"{train.origin}: no column {name!r} (asked for as {key}){nearest(name, present)}\nColumns found: {listed(present)}."
            )
    if task != "auto":
        if task not in tasks:
            raise ConfigError(f"task: {task!r} is not known{nearest(task, tasks)}\nAllowed: auto, {', '.join(tasks)}.")
        kind = tasks[task]
        if foreign := set(given) - {column.key for column in kind.columns}:
            raise ConfigError(
                f"{min(foreign)}: {task} has no such column\nIt has {listed(column.key for column in kind.columns)}."
            )
        if set(kind.tables) != set(raw.tables):
            others = [name for name, other in tasks.items() if set(other.tables) == set(raw.tables)]
            raise DataError(
                f"{raw.source}: {task} needs {' and '.join(kind.tables) or 'rows alone'}, and there is {' and '.join(raw.tables) or 'none'}\n"
                f"Tasks that it could be: {', '.join(others)}."
            )
        found = kind.guess(train.dataset, given)
        _complete(raw, kind, found, train)
    else:
        fits = []
        for kind in tasks.values():
            its_own = set(kind.tables) == set(raw.tables) and set(given) <= {column.key for column in kind.columns}
            if its_own and not kind.by_name_only:
                found = kind.guess(train.dataset, given)
                if not _lacking(kind, found):
                    fits.append((kind.specificity(), kind, found))
        best = [(kind, found) for rank, kind, found in fits if rank == max(rank for rank, _, _ in fits)]
        if len(best) != 1:
            fitting = listed(kind.name for kind, _ in best) if best else "none"
            raise DataError(
                f"{train.origin}: tasks that these columns fit: {fitting}\nColumns found: {listed(present)}.\n"
                f"Say task= ({', '.join(tasks)}) and which column is what, as in text='...', label='...'."
            )
        kind, found = best[0]
    if guessed := {key: name for key, name in found.items() if key not in given and key != name}:
        raw.notes.append("columns: " + ", ".join(f"{key} is {name!r}" for key, name in guessed.items()))
    for key, split in raw.splits.items():
        for name in found.values():
            if name not in split.dataset.column_names:
                raise DataError(
                    f"{split.origin}: no column {name!r} in the {key} split{nearest(name, split.dataset.column_names)}\n"
                    f"Columns found: {listed(split.dataset.column_names)}. Add it, or leave the split out: splits={{{key!r}: None}}."
                )
    return kind, found


def _lacking(kind: type[Task], found: Mapping[str, str]) -> list[Column]:
    return [column for column in kind.columns if column.required and column.key not in found]


def _complete(raw: Raw, kind: type[Task], found: Mapping[str, str], train: Split) -> None:
    if lacking := _lacking(kind, found):
        column, present = lacking[0], train.dataset.column_names
        close = next((hint for name in column.usual if (hint := nearest(name, present))), "")
        raise DataError(
            f"{train.origin}: no column for {column.key!r} of {kind.name}{close}\nColumns found: {listed(present)}.\n"
            f"Say which it is: {column.key}='...'."
        )


def _texts(key: str, split: Split, kind: type[Task], found: Mapping[str, str], raw: Raw) -> Split:
    """Columns of text as strings, columns of media as structs; refuse rows that have none."""
    datasets = need("compare", "datasets")
    for column in kind.columns:
        name = found.get(column.key)
        if name is None:
            continue
        if column.kind in media.SUFFIXES:
            split = media.normalise(split, name, column.kind, raw.remote)
        elif column.kind == "text":
            values = split.dataset.select_columns([name]).with_format("arrow")[:][name]
            missing = np.flatnonzero(np.asarray(values.is_null()))
            if len(missing):
                raise DataError(
                    f"{split.where(int(missing[0]))}, column {name!r}: no text; so {len(missing)} of {len(split)} rows\nFill or remove these rows."
                )
            if getattr(split.dataset.features[name], "dtype", None) != "string":
                split = replace(split, dataset=split.dataset.cast_column(name, datasets.Value("string")))
                values = split.dataset.select_columns([name]).with_format("arrow")[:][name]
            full = np.array([bool(text.strip()) for text in values.to_pylist()])
            if not full.all():
                if not full.any():
                    raise DataError(
                        f"{split.origin}: column {name!r} is empty in all {len(split)} rows\nFill it, or name another column."
                    )
                if kind.drops_empty_text:
                    split = split.select(np.flatnonzero(full))
                raw.notes.append(
                    f"{key}: {(~full).sum()} rows with empty {name!r}" + (" dropped" if kind.drops_empty_text else "")
                )
    return split


# ------------------------------------------------------------------------------------------------------------------------ splits


def _draw(split: Split, size: int, seed: int, keep: int) -> np.ndarray:
    labels = np.zeros(len(split), dtype=np.int64) if split.labels is None else split.labels
    return stratified(labels, size, seed, keep)


def _set_aside(raw: Raw, key: str, fraction: float, seed: int) -> None:
    """Take a share of train for a split that the source doesn't have."""
    if key in raw.splits or fraction == 0:
        return
    train = raw.splits["train"]
    classes = 1 if train.labels is None else len(np.unique(train.labels))
    drawn = _draw(train, max(round(fraction * len(train)), min(classes, 2)), seed, keep=1)
    if not len(drawn) or (train.labels is not None and classes > 1 and len(np.unique(train.labels[drawn])) < 2):
        raise DataError(
            f"{train.origin}: {len(train)} rows are too few to set a {key} split aside\nGive a {key} file, more rows, or {key}_fraction=0 for none."
        )
    raw.splits[key] = train.select(drawn)
    raw.splits["train"] = train.select(np.setdiff1d(np.arange(len(train)), drawn))
    raw.notes.append(f"{key} split: {len(drawn)} of {len(train)} train rows, seed {seed}")


def _limited(key: str, split: Split, limit: int | Mapping[str, int] | None, seed: int) -> Split:
    size = limit.get(key) if isinstance(limit, Mapping) else limit
    if size is None or size >= len(split):
        return split
    return split.select(_draw(split, size, seed, keep=0))
