"""What a kind of task says: its columns, its model class, how a row becomes model inputs, which metrics count; and the registry.

One file for each kind in this package; a kind registers itself by being defined, here or in anyone's own code.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from petiole.errors import ConfigError, DataError
from petiole.tasks import media
from petiole.tasks.columns import Column, kinds
from petiole.tasks.encoding import Rows
from petiole.tasks.loop import Collator, batches, evaluating, joined
from petiole.tasks.metrics import IGNORED, METRICS, compute
from petiole.tasks.models import Head, empty_model, load_config, load_model, load_processor
from petiole.tasks.names import ModelPlace, listed, locate_model, nearest

if TYPE_CHECKING:
    from petiole.tasks.data import TaskData

__all__ = ["Task", "evaluating", "prepare", "registry"]

_REGISTRY: dict[str, type[Task]] = {}


def registry() -> dict[str, type[Task]]:
    """Every kind of task, by name: those of this package and those that were defined elsewhere."""
    import petiole.tasks as package

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_REGISTRY.items()))


class Task(ABC):
    """A data set bound to a backbone: inputs for it, metrics of it.

    Args:
        data: from `load_data`.
        model: folder or Hub name of the backbone; see `locate_model`.
        processor: its tokenizer, image processor or feature extractor; its own if None.
        main_metric: what models are compared by; the kind's usual one if None.
        revision: of a model on the Hub.

    Attributes:
        notes: what was decided: rows cut, head drawn afresh.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    columns: ClassVar[tuple[Column, ...]]
    tables: ClassVar[tuple[str, ...]] = ()  # that its rows refer to, beside the splits
    auto_model: ClassVar[str]
    auto_processor: ClassVar[str]
    metric_names: ClassVar[tuple[str, ...]]
    usual_metric: ClassVar[str]
    drops_empty_text: ClassVar[bool] = False
    by_name_only: ClassVar[bool] = False  # never taken by task="auto"

    def __init_subclass__(cls) -> None:
        name = cls.__dict__.get("name")
        if name is None:  # shared code of several kinds
            return
        known = _REGISTRY.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(
                f"two tasks are called {name!r}: {known.__module__}.{known.__qualname__} and {cls.__module__}.{cls.__qualname__}"
            )
        _REGISTRY[name] = cls

    def __init__(
        self,
        data: TaskData,
        model: str | Path,
        *,
        processor: Any = None,
        main_metric: str | None = None,
        revision: str | None = None,
    ) -> None:
        self.data = data
        self.place: ModelPlace = locate_model(model)
        self.revision = revision
        self.notes: list[str] = []
        if processor is not None:
            self.processor = processor
        if main_metric is not None and main_metric not in self.all_metrics:
            raise ConfigError(
                f"main_metric: {main_metric!r} isn't measured by {self.name}{nearest(main_metric, self.all_metrics)}\n"
                f"Allowed: {', '.join(self.all_metrics)}."
            )
        self.main_metric = main_metric or self.usual_metric

    # ------------------------------------------------------------------------------------------------------------------ columns

    @classmethod
    def guess(cls, dataset: Any, given: Mapping[str, str]) -> dict[str, str]:
        """Columns of a data set by key: those given, then those of a usual name and a fitting type, then the only one that can be meant."""
        found = dict(given)
        for column in cls.columns:
            if column.key in found:
                continue
            free = [name for name in dataset.column_names if name not in found.values()]
            fitting = [name for name in free if column.kind in kinds(dataset, name)]
            usual = [name for word in column.usual for name in fitting if name.lower() == word]
            if (
                column.kind == "label"
            ):  # numbers may be anything: only a column that is declared to hold classes goes without a usual name
                fitting = [name for name in fitting if hasattr(dataset.features[name], "names")]
            if usual:
                found[column.key] = usual[0]
            elif column.required and column.alone and len(fitting) == 1:
                found[column.key] = fitting[0]
        return found

    @classmethod
    def specificity(cls) -> tuple[int, int]:
        """Which of several tasks that fit is meant: the one that uses more: first of images and sounds, then of all."""
        required = [column for column in cls.columns if column.required]
        return sum(column.kind in media.SUFFIXES for column in required), len(required)

    def column(self, dataset: Any, key: str) -> Any:
        """All values of a column, by the task's word for it."""
        return dataset[self.data.columns[key]]

    # -------------------------------------------------------------------------------------------------------------------- model

    @cached_property
    def config(self) -> Any:
        """The backbone's configuration."""
        return load_config(self.place, self.revision)

    @cached_property
    def processor(self) -> Any:
        """The backbone's own tokenizer, image processor or feature extractor."""
        return load_processor(self.auto_processor, self.place, self.revision)

    def build_model(
        self, *, head: Head = "auto", seed: int = 0, dtype: torch.dtype | str = "float32", **options: Any
    ) -> nn.Module:
        """The backbone with a head for this task's classes, in evaluation mode, on the CPU.

        Args:
            head: "fresh" draws a new one; "keep" takes the checkpoint's; "auto" keeps it if its classes have the same names.
            seed: a new head is drawn from it; the global generator stays where it was.
            dtype: of the weights. float32 by default, also where the file holds half precision: it is to be trained.
            options: further arguments of `from_pretrained`, such as attn_implementation.

        Raises:
            FileError: the model can't be loaded, or is of another kind.
        """
        model, notes = load_model(
            self.auto_model,
            self.place,
            label_names=self.label_names,
            head=head,
            seed=seed,
            dtype=dtype,
            revision=self.revision,
            options=options,
        )
        self._note(*notes)
        return model

    @property
    def label_names(self) -> Sequence[str]:
        """Of the outputs of the head: this task's classes."""
        return self.data.label_names

    def empty_model(self) -> nn.Module:
        """The model on the meta device: shapes without values, for counting before anything is loaded."""
        return empty_model(self.auto_model, self.place, label_names=self.label_names, revision=self.revision)

    # --------------------------------------------------------------------------------------------------------------------- data

    @abstractmethod
    def encode(self, dataset: Any, split: str = "rows") -> Rows:
        """Rows of a data set -> rows of model inputs.

        Args:
            dataset: a split of the data, or rows selected from it.
            split: what to call it in notes.
        """

    @property
    @abstractmethod
    def collator(self) -> Collator:
        """Rows of `encode` -> a batch for the model."""

    def encoded(self, split: str) -> Rows:
        """A split by name, encoded once and kept.

        Raises:
            DataError: there is no such split.
        """
        if split not in self._encoded:
            self._encoded[split] = self.encode(self.rows(split), split)
        return self._encoded[split]

    def rows(self, split: str) -> Any:
        """The raw rows of a split.

        Raises:
            DataError: there is no such split.
        """
        if split not in self.data.splits:
            raise DataError(f"{self.data.source}: no {split} split; there are {listed(self.data.splits)}")
        return self.data.splits[split]

    @cached_property
    def _encoded(self) -> dict[str, Rows]:
        return {}

    # ------------------------------------------------------------------------------------------------------------------ metrics

    @property
    def all_metrics(self) -> tuple[str, ...]:
        """Every metric that `evaluate` gives."""
        return self.metric_names

    @property
    def higher_is_better(self) -> bool:
        """Direction of the main metric."""
        return METRICS[self.main_metric].higher_is_better

    def reduce(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What metrics need of a batch's logits. Also as `preprocess_logits_for_metrics` of Transformers' Trainer."""
        return _first(logits)

    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        """Metrics of reduced predictions and labels of a whole split."""
        return compute(self.metric_names, predictions, labels)

    def compute_metrics(self, evaluated: Any) -> dict[str, float]:
        """The same, as `compute_metrics` of Transformers' Trainer."""
        return self.metrics(evaluated.predictions, evaluated.label_ids)

    def evaluate(self, model: nn.Module, split: str | Any = "validation", *, batch_size: int = 32) -> dict[str, float]:
        """Metrics of a model on a split, or on any rows of the same columns; the model is left in the mode it was in."""
        rows = self.encoded(split) if isinstance(split, str) else self.encode(split)
        return self.metrics(*self.predict(model, rows, batch_size=batch_size))

    def predict(self, model: nn.Module, rows: Rows, *, batch_size: int = 32) -> tuple[Tensor, Tensor]:
        """Reduced predictions and labels of encoded rows, on the CPU."""
        predictions, labels = [], []
        with evaluating(model):
            for batch in batches(rows, self.collator, batch_size, model):
                output = model(**batch)
                logits = _first(output if isinstance(output, torch.Tensor) else output.logits)
                predictions.append(self.reduce(logits, batch["labels"]).float().cpu())
                labels.append(batch["labels"].cpu())
        return joined(predictions, 0.0), joined(labels, IGNORED)

    def _note(self, *notes: str) -> None:
        self.notes.extend(note for note in notes if note not in self.notes)


def prepare(data: TaskData, model: str | Path, **options: Any) -> Task:
    """The task of a data set, bound to a backbone.

    Args:
        data: from `load_data`.
        model: folder or Hub name of the backbone.
        options: of the kind of task: see its class.

    Raises:
        ConfigError: an option that this kind doesn't have.
    """
    kind = registry()[data.task]
    known = {
        name for base in kind.__mro__ if "__init__" in base.__dict__ for name in inspect.signature(base).parameters
    }
    known -= {"data", "model", "args", "kwargs"}
    for name in options:
        if name not in known:
            raise ConfigError(
                f"{name}: {data.task} has no such option{nearest(name, known)}\nAllowed: {', '.join(sorted(known))}."
            )
    return kind(data, model, **options)


def _first(logits: Any) -> Any:
    return logits[0] if isinstance(logits, tuple | list) else logits
