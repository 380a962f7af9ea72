"""Rows of a data set to rows of model inputs: at once and in memory, or whenever they are read."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from petiole.errors import need
from petiole.tasks.quiet import quiet

Rows = Any  # datasets.Dataset, or torch's Dataset
Encode = Callable[[dict[str, Any]], dict[str, Any]]


def encode_rows(dataset: Any, function: Encode, *, batch_size: int = 256, **options: Any) -> Any:
    """`Dataset.map` over batches, in memory, nothing cached on disk; the result holds what the function returned alone."""
    with quiet():
        return dataset.map(
            function,
            batched=True,
            batch_size=batch_size,
            remove_columns=dataset.column_names,
            keep_in_memory=True,
            load_from_cache_file=False,
            new_fingerprint=uuid.uuid4().hex[:16],  # else everything the function can reach is hashed
            **options,
        )


def encode_arrays(dataset: Any, function: Encode, *, most_bytes: int, fixed: bool) -> Rows:
    """Rows of large arrays: computed once if they fit into `most_bytes`, else again whenever they are read.

    Args:
        dataset: the raw rows.
        function: a batch of rows -> arrays by key.
        most_bytes: what the computed arrays may take in memory.
        fixed: all rows have the same shape.
    """
    first = {key: np.asarray(values[0]) for key, values in function(dataset[:1]).items()}
    if len(dataset) * sum(array.nbytes for array in first.values()) > most_bytes:
        return LazyRows(dataset, function)
    if not fixed:
        return encode_rows(dataset, function).with_format("torch")
    datasets = need("compare", "datasets")
    features = {key: _array_feature(datasets, array) for key, array in first.items()}
    return encode_rows(dataset, function, features=datasets.Features(features)).with_format("torch")


def _array_feature(datasets: Any, array: np.ndarray) -> Any:
    if array.ndim == 0:
        return datasets.Value(str(array.dtype))
    if array.ndim == 1:
        return datasets.Sequence(datasets.Value(str(array.dtype)), length=len(array))
    return getattr(datasets, f"Array{array.ndim}D")(shape=array.shape, dtype=str(array.dtype))


class LazyRows(Dataset[dict[str, Tensor]]):
    """Encodes rows of a data set on access: slower with every epoch, but only one batch is in memory.

    Args:
        dataset: the raw rows.
        function: a batch of rows -> arrays by key.
    """

    def __init__(self, dataset: Any, function: Encode) -> None:
        self.dataset = dataset
        self.function = function

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        encoded = self.function(self.dataset[list(indices)])
        return [{key: torch.as_tensor(values[i]) for key, values in encoded.items()} for i in range(len(indices))]
