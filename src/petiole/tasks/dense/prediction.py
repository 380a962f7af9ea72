"""Dense prediction as a task: splits of scenes, a model for a backbone, and what a model reaches on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from petiole.errors import ConfigError
from petiole.tasks.dense.metrics import METRICS, delta_m
from petiole.tasks.dense.model import DenseModel
from petiole.tasks.dense.scenes import Scenes
from petiole.tasks.dense.targets import TARGETS
from petiole.tasks.generated import Generated
from petiole.tasks.loop import evaluating


class DensePrediction(Generated[Scenes]):
    """Several dense tasks on generated scenes.

    Args:
        tasks: of `TARGETS`, in order.
        sizes: rows of each split.
        size: height and width of an image.
        seed: of the scenes; splits never share one.
        scenes: further settings of `Scenes`.
    """

    def __init__(
        self,
        tasks: Sequence[str] = ("semseg", "normals", "saliency", "human_parts"),
        *,
        sizes: Mapping[str, int] | None = None,
        size: int = 64,
        seed: int = 0,
        **scenes: Any,
    ) -> None:
        counts = {"train": 256, "validation": 64, "test": 64, **(sizes or {})}
        self.splits = {
            split: Scenes(count, size=size, tasks=tasks, seed=seed * len(counts) + number, **scenes)
            for number, (split, count) in enumerate(counts.items())
        }
        self.tasks = self.splits["train"].tasks

    def build_model(self, backbone: nn.Module, **options: Any) -> DenseModel:
        """The backbone with a decoder for each task; see `DenseModel` for options."""
        return DenseModel(backbone, self.tasks, **options)

    @staticmethod
    def collator(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """Rows -> a batch: pixels (B, 3, H, W), and labels by task."""
        rows = list(rows)
        labels = {task: torch.stack([row["labels"][task] for row in rows]) for task in rows[0]["labels"]}
        return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "labels": labels}

    def evaluate(self, model: nn.Module, split: str = "validation", *, batch_size: int = 16) -> dict[str, float]:
        """The figure of each task on a split; the model is left in the mode it was in.

        Raises:
            ConfigError: the model predicts none of the tasks.
        """
        device = next(model.parameters()).device
        sums: dict[str, Tensor] = {}
        loader = DataLoader(self.encoded(split), batch_size, collate_fn=self.collator, generator=torch.Generator())
        with evaluating(model):
            for batch in loader:
                found = model(pixel_values=batch["pixel_values"].to(device)).logits
                for task in self.tasks:
                    if task in found:
                        of_batch = METRICS[TARGETS[task].metric].sums(found[task], batch["labels"][task].to(device))
                        sums[task] = sums[task] + of_batch if task in sums else of_batch
        if not sums:
            raise ConfigError(f"the model predicts none of {', '.join(self.tasks)}")
        return {task: METRICS[TARGETS[task].metric].value(whole) for task, whole in sums.items()}

    @staticmethod
    def delta_m(found: Mapping[str, float], single: Mapping[str, float]) -> float:
        """Δm in % against single-task models."""
        return delta_m(found, single)
