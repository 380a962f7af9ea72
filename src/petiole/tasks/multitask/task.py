"""Text classification of several tasks by one model: which rows it trains on, and what it reaches on each task."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from petiole.errors import ConfigError
from petiole.tasks.columns import Column
from petiole.tasks.encoding import Rows
from petiole.tasks.labels import stratified
from petiole.tasks.metrics import METRICS, compute
from petiole.tasks.models import Head, empty_model, load_model
from petiole.tasks.multitask.data import classes_of
from petiole.tasks.multitask.model import MultiTaskModel
from petiole.tasks.names import nearest
from petiole.tasks.text_classification import CLASSIFICATION_METRICS, TextClassification

if TYPE_CHECKING:
    from petiole.tasks.data import TaskData

Sampling = Literal["proportional", "uniform"]


class MultiTaskText(TextClassification):
    """Sets of text with a head for each on one backbone.

    Args:
        sampling: of training rows. "proportional": tasks come as often as they have rows; "uniform": all alike, so that rows of smaller
            ones come several times in an epoch.
        task_metrics: what a task is measured by, where it is not accuracy: {"cola": "matthews"}. Higher has to be better.
        dropout: before the heads.

    Attributes:
        tasks: their names, in order. classes: of each task, as a range of all.
    """

    name: ClassVar[str] = "multitask-text"
    title: ClassVar[str] = "Text classification of several tasks"
    columns: ClassVar[tuple[Column, ...]] = (
        *TextClassification.columns,
        Column("task", "label", ("task",), alone=False),
    )
    auto_model: ClassVar[str] = "AutoModel"
    metric_names: ClassVar[tuple[str, ...]] = ("task_mean",)
    usual_metric: ClassVar[str] = "task_mean"
    by_name_only: ClassVar[bool] = True

    def __init__(
        self,
        data: TaskData,
        model: str | Path,
        *,
        sampling: Sampling = "proportional",
        task_metrics: Mapping[str, str] | None = None,
        dropout: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(data, model, **kwargs)
        self.classes = classes_of(data)
        self.tasks = tuple(self.classes)
        if sampling not in ("proportional", "uniform"):
            raise ConfigError(f"sampling: {sampling!r} is neither proportional nor uniform")
        self.task_metrics = dict.fromkeys(self.tasks, "accuracy") | dict(task_metrics or {})
        allowed = [name for name in CLASSIFICATION_METRICS if METRICS[name].higher_is_better]
        for task, metric in self.task_metrics.items():
            self.known(task, "task_metrics")
            if metric not in allowed:
                raise ConfigError(f"task_metrics: {metric!r} of {task}{nearest(metric, allowed)}; {', '.join(allowed)}")
        self.sampling, self.dropout = sampling, dropout

    def known(self, task: str, field: str) -> int:
        """The number of a task.

        Raises:
            ConfigError: there is none of that name.
        """
        if task not in self.classes:
            raise ConfigError(f"{field}: {task!r} is none of {', '.join(self.tasks)}{nearest(task, self.tasks)}")
        return self.tasks.index(task)

    # -------------------------------------------------------------------------------------------------------------------- model

    def build_model(
        self, *, head: Head = "auto", seed: int = 0, dtype: torch.dtype | str = "float32", **options: Any
    ) -> MultiTaskModel:
        """The backbone with a fresh head for each task, in evaluation mode; arguments of `Task.build_model`.

        Raises:
            ConfigError: head="keep", where no file has heads of several tasks.
        """
        if head == "keep":
            raise ConfigError("head: 'keep' needs a checkpoint with heads of these tasks; load an adaptation instead")
        backbone, notes = load_model(
            self.auto_model, self.place, seed=seed, dtype=dtype, revision=self.revision, options=options
        )
        self._note(*notes, f"heads of {', '.join(self.tasks)} drawn from seed {seed}")
        return self.wrapped(backbone, seed).to(next(backbone.parameters()).dtype)

    def empty_model(self) -> MultiTaskModel:
        backbone = empty_model(self.auto_model, self.place, revision=self.revision)
        with torch.device("meta"):
            return self.wrapped(backbone)

    def wrapped(self, backbone: Any, seed: int = 0) -> MultiTaskModel:
        counts = {task: end - first for task, (first, end) in self.classes.items()}
        if backbone.config.pad_token_id is None:
            backbone.config.pad_token_id = self.processor.pad_token_id
        return MultiTaskModel(backbone, counts, dropout=self.dropout, seed=seed).eval()

    # --------------------------------------------------------------------------------------------------------------------- rows

    def encode(self, dataset: Any, split: str = "rows") -> Rows:
        """Rows of model inputs, with the number of each row's task; pairs and single texts may stand side by side."""
        pairs = np.array([pair is not None for pair in dataset["text_pair"]], dtype=bool)
        if pairs.all() or not pairs.any():
            encoded = self.encode_alike(dataset, split, bool(pairs.any()))
        else:
            from petiole.errors import need

            order = np.argsort(np.concatenate([np.flatnonzero(pairs), np.flatnonzero(~pairs)]))
            parts = [self.encode_alike(dataset.select(np.flatnonzero(which)), split, paired)
                     for which, paired in ((pairs, True), (~pairs, False))]  # fmt: skip
            encoded = need("compare", "datasets").concatenate_datasets(parts).select(order)
        return encoded.add_column("task", list(dataset["task"]))

    def encode_alike(self, dataset: Any, split: str, paired: bool) -> Rows:
        """As `TextClassification.encode`, rows that are all pairs or all single texts."""
        whole = self.data
        columns = {key: name for key, name in whole.columns.items() if paired or key != "text_pair"}
        self.data = replace(whole, columns=columns)
        try:
            return super().encode(dataset, split)
        finally:
            self.data = whole

    def encoded(self, split: str) -> Rows:
        """A split by name, encoded once and kept; of train, as many rows of each task as `sampling` says.

        Raises:
            DataError: there is no such split.
        """
        rows = super().encoded(split)
        if split != "train" or self.sampling == "proportional":
            return rows
        if "uniform" not in self._encoded:
            self._encoded["uniform"] = rows.select(self.balanced(np.asarray(rows["task"])))
        return self._encoded["uniform"]

    def balanced(self, tasks: np.ndarray) -> np.ndarray:
        """Rows so that each task has as many as the largest: all of its own as often as they fit, and some drawn from the seed."""
        generator = np.random.default_rng(self.data.seed)
        most = np.unique(tasks, return_counts=True)[1].max()
        chosen = []
        for task in np.unique(tasks):
            own = np.flatnonzero(tasks == task)
            chosen += [np.tile(own, most // len(own)), generator.permutation(own)[: most % len(own)]]
        return np.sort(np.concatenate(chosen))

    def steps(
        self, batch_size: int, count: int, *, split: str = "train", seed: int = 0
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """So many batches, each of one task, with its name: drawn by `sampling`, the rows of a task in turn, in another order each time."""
        rows = super().encoded(split)
        tasks = np.asarray(rows["task"])
        own = {task: np.flatnonzero(tasks == number) for number, task in enumerate(self.tasks)}
        own = {task: found for task, found in own.items() if len(found)}
        sizes = np.array([len(found) if self.sampling == "proportional" else 1 for found in own.values()])
        generator = np.random.default_rng(seed)
        left = {task: np.empty(0, dtype=np.int64) for task in own}
        for _ in range(count):
            task = list(own)[int(generator.choice(len(own), p=sizes / sizes.sum()))]
            while len(left[task]) < batch_size:
                left[task] = np.concatenate([left[task], generator.permutation(own[task])])
            chosen, left[task] = left[task][:batch_size], left[task][batch_size:]
            yield task, self.collator([rows[int(row)] for row in chosen])

    def only(self, *tasks: str, shots: int | None = None, seed: int = 0) -> MultiTaskText:
        """The same for some of the tasks alone; the model is that of all of them.

        Args:
            shots: training rows of each class that are left, drawn by the seed; all if None.

        Raises:
            ConfigError: an unknown task, or no shots.
        """
        numbers = [self.known(task, "only") for task in tasks]
        if shots is not None and shots < 1:
            raise ConfigError(f"shots: {shots} is below 1")
        made = copy.copy(self)
        splits: dict[str, Any] = {}
        for split, rows in self.data.splits.items():
            kept = np.flatnonzero(np.isin(np.asarray(rows["task"]), numbers))
            if split == "train" and shots is not None:
                labels = np.asarray(rows["label"])[kept]
                few = [stratified(labels[labels == c], shots, seed + int(c)) for c in np.unique(labels)]
                places = [np.flatnonzero(labels == c)[own] for c, own in zip(np.unique(labels), few, strict=True)]
                kept = kept[np.sort(np.concatenate(places))]
            splits[split] = rows.select(kept) if len(kept) else None
        made.data = replace(self.data, **splits)
        made.notes = list(self.notes)
        made.__dict__.pop("_encoded", None)
        return made

    # ------------------------------------------------------------------------------------------------------------------ metrics

    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        """The figure of each task that there are rows of, and their mean, `task_mean`."""
        scores, truth = torch.as_tensor(predictions), torch.as_tensor(labels)
        found = {}
        for task, (first, end) in self.classes.items():
            own = (truth >= first) & (truth < end)
            if own.any():
                metric = self.task_metrics[task]
                found[task] = compute([metric], scores[own, first:end], truth[own] - first)[metric]
        return {"task_mean": sum(found.values()) / len(found), **found}
