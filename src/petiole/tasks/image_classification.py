"""Image classification: one image to one of several classes."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from petiole.errors import ConfigError
from petiole.tasks import media
from petiole.tasks.base import Task
from petiole.tasks.columns import Column
from petiole.tasks.encoding import Rows, encode_arrays
from petiole.tasks.loop import Collator
from petiole.tasks.text_classification import CLASSIFICATION_METRICS, LABEL
from petiole.tasks.tokens import Pad

if TYPE_CHECKING:
    from petiole.tasks.data import TaskData


class ImageClassification(Task):
    """One image, turned upright and to RGB, to one class.

    Args:
        most_bytes: encoded splits up to this size are kept in memory; larger ones are encoded as they are read.
    """

    name: ClassVar[str] = "image-classification"
    title: ClassVar[str] = "Image classification"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("image", "image", ("image", "img", "picture", "photo", "file_name")),
        LABEL,
    )
    auto_model: ClassVar[str] = "AutoModelForImageClassification"
    auto_processor: ClassVar[str] = "AutoImageProcessor"
    metric_names: ClassVar[tuple[str, ...]] = CLASSIFICATION_METRICS
    usual_metric: ClassVar[str] = "accuracy"

    def __init__(self, data: TaskData, model: str | Path, *, most_bytes: int = 1 << 30, **kwargs: Any) -> None:
        super().__init__(data, model, **kwargs)
        self.most_bytes = most_bytes
        if (channels := getattr(self.config, "num_channels", 3)) != 3:
            raise ConfigError(f"{self.place.name}: takes images of {channels} channels; this task gives three (RGB)")

    def encode(self, dataset: Any, split: str = "rows") -> Rows:
        column, label = self.data.columns["image"], self.data.columns["label"]

        def rows(batch: dict[str, Any]) -> dict[str, Any]:
            images = [media.read_image(value, "") for value in batch[column]]
            return {"pixel_values": self.processor(images, return_tensors="np")["pixel_values"], "labels": batch[label]}

        raw = media.structs(dataset.select_columns([column, label]), column)
        return encode_arrays(raw, rows, most_bytes=self.most_bytes, fixed=True)

    @cached_property
    def collator(self) -> Collator:
        return Pad({})
