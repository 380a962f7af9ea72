"""Several data sets of text as one: a column says which a row is from, and classes are named after their task ("trec6/LOC")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petiole.errors import ConfigError, DataError, need
from petiole.tasks.names import listed

if TYPE_CHECKING:
    from petiole.tasks.data import TaskData

SEPARATOR = "+"  # between sources
SPLITS = ("train", "validation", "test")
COLUMNS = {"text": "text", "text_pair": "text_pair", "label": "label", "task": "task"}


def several(source: str | Path) -> list[str]:
    """`text/sst2+text/trec6` -> the sources of several tasks; [] where it is one, or the path of something."""
    parts = [part.strip() for part in str(source).split(SEPARATOR)]
    return parts if len(parts) > 1 and all(parts) and not Path(str(source)).expanduser().exists() else []


def load_tasks(sources: Mapping[str, str | Path] | Sequence[str | Path], **options: Any) -> TaskData:
    """Load several sets for text classification as one.

    Args:
        sources: of the tasks, by name, or a list of them, which are then called as files and folders are.
        options: of `load_data`, the same for each: a limit is one for each task.

    Raises:
        ConfigError: fewer than two tasks, two of one name, a name that is none, options that only one set can have.
        DataError: as `load_data`.
    """
    from petiole.tasks.data import TaskData, load_data

    named = dict(sources) if isinstance(sources, Mapping) else by_name(sources)
    if len(named) < 2:
        raise ConfigError(f"sources: {listed(named)} is one task; several are needed, or load_data for one")
    if odd := [name for name in named if not name.isidentifier()]:
        raise ConfigError(f"{odd[0]!r} is no name of a task: letters, digits and _; name them: {{'name': source, …}}")
    if options.get("task", "auto") not in ("auto", "text-classification", "multitask-text"):
        raise ConfigError(f"task: {options['task']!r} is no task that several sets can be of; text-classification is")
    if options.get("label_names") is not None:
        raise ConfigError("label_names: each task has its own; load them one by one, or name classes in the files")
    sets = {name: load_data(source, **{**options, "task": "text-classification"}) for name, source in named.items()}
    classes = [f"{name}/{own}" for name, data in sets.items() for own in data.label_names]
    notes = [f"{name}: {note}" for name, data in sets.items() for note in data.notes]
    rows = {split: joined(sets, split, classes) for split in SPLITS}
    for split in ("validation", "test"):
        lacking = [name for name, data in sets.items() if split not in data.splits]
        if lacking and rows[split] is not None:
            notes.append(f"{split}: none of {listed(lacking)}")
    return TaskData(
        task="multitask-text",
        train=rows["train"],
        validation=rows["validation"],
        test=rows["test"],
        label_names=tuple(classes),
        columns=COLUMNS,
        source=SEPARATOR.join(str(source) for source in named.values()),
        notes=tuple(notes),
        seed=options.get("seed", 0),
        origins={f"{name}/{split}": origin for name, data in sets.items() for split, origin in data.origins.items()},
    )


def by_name(sources: Sequence[str | Path]) -> dict[str, str | Path]:
    """Sources by the last part of their names, without an ending."""
    names = [Path(str(source)).name.partition(":")[0].partition(".")[0].replace("-", "_") for source in sources]
    if double := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two tasks are called {double[0]!r}: name them, {{'one': source, 'other': source}}")
    return dict(zip(names, sources, strict=True))


def joined(sets: Mapping[str, TaskData], split: str, classes: Sequence[str]) -> Any:
    """The rows of one split of all tasks, one task behind the other; None where there are none."""
    datasets = need("compare", "datasets")
    first, parts = 0, []
    features = datasets.Features(
        text=datasets.Value("string"),
        text_pair=datasets.Value("string"),
        label=datasets.ClassLabel(names=list(classes)),
        task=datasets.ClassLabel(names=list(sets)),
    )
    for number, data in enumerate(sets.values()):
        if split in data.splits:
            rows, columns = data.splits[split], data.columns
            pairs = list(rows[columns["text_pair"]]) if "text_pair" in columns else [None] * len(rows)
            table = {
                "text": list(rows[columns["text"]]),
                "text_pair": pairs,
                "label": [first + label for label in rows[columns["label"]]],
                "task": [number] * len(rows),
            }
            parts.append(datasets.Dataset.from_dict(table, features=features))
        first += len(data.label_names)
    return datasets.concatenate_datasets(parts) if parts else None


def classes_of(data: TaskData) -> dict[str, tuple[int, int]]:
    """The classes of each task, as a range of all.

    Raises:
        DataError: they are not named after tasks, as those of `load_tasks` are.
    """
    found: dict[str, tuple[int, int]] = {}
    for number, name in enumerate(data.label_names):
        task, slash, _ = name.partition("/")
        if not slash or "task" not in data.columns:
            raise DataError(
                f"{data.source}: not several tasks: class {name!r} is of none\nJoin sets of their own: 'text/sst2+text/trec6'."
            )
        found[task] = (found.get(task, (number, 0))[0], number + 1)
    return found
