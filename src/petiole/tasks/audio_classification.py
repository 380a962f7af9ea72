"""Audio classification: one sound to one of several classes."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from petiole.errors import ConfigError
from petiole.tasks import media, spectrograms
from petiole.tasks.base import Task
from petiole.tasks.columns import Column
from petiole.tasks.encoding import Rows, encode_arrays
from petiole.tasks.loop import Collator
from petiole.tasks.text_classification import CLASSIFICATION_METRICS, LABEL
from petiole.tasks.tokens import Pad

if TYPE_CHECKING:
    from petiole.tasks.data import TaskData


class AudioClassification(Task):
    """One sound, mixed to one channel and resampled to the model's rate, to one class.

    Args:
        max_seconds: sounds are cut to this length.
        mask_padding: tell a spectrogram transformer by `attention_mask` which tokens are behind a sound's end; it was trained without.
        most_bytes: encoded splits up to this size are kept in memory; larger ones are encoded as they are read.
    """

    name: ClassVar[str] = "audio-classification"
    title: ClassVar[str] = "Audio classification"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("audio", "audio", ("audio", "sound", "speech", "wav", "file", "file_name")),
        LABEL,
    )
    auto_model: ClassVar[str] = "AutoModelForAudioClassification"
    auto_processor: ClassVar[str] = "AutoFeatureExtractor"
    metric_names: ClassVar[tuple[str, ...]] = CLASSIFICATION_METRICS
    usual_metric: ClassVar[str] = "accuracy"

    def __init__(
        self,
        data: TaskData,
        model: str | Path,
        *,
        max_seconds: float = 30.0,
        mask_padding: bool = False,
        most_bytes: int = 1 << 30,
        **kwargs: Any,
    ) -> None:
        super().__init__(data, model, **kwargs)
        if max_seconds <= 0:
            raise ConfigError(f"max_seconds: {max_seconds} is not above 0")
        if mask_padding and not hasattr(self.config, "time_stride"):
            raise ConfigError(f"mask_padding: {self.config.model_type} takes no patches of a spectrogram; leave it out")
        self.max_seconds = max_seconds
        self.mask_padding = mask_padding
        self.most_bytes = most_bytes

    def encode(self, dataset: Any, split: str = "rows") -> Rows:
        column, label = self.data.columns["audio"], self.data.columns["label"]
        rate = int(self.processor.sampling_rate)
        most, cut = round(self.max_seconds * rate), 0

        def rows(batch: dict[str, Any]) -> dict[str, Any]:
            nonlocal cut
            waves = [media.resample(*media.read_audio(value, ""), rate) for value in batch[column]]
            cut += sum(len(wave) > most for wave in waves)
            encoded = self.processor([wave[:most] for wave in waves], sampling_rate=rate)
            arrays = {key: [np.asarray(row) for row in values] for key, values in encoded.items()}
            if self.mask_padding:
                frames = [spectrograms.frames_of(torch.from_numpy(row)) for row in arrays["input_values"]]
                arrays["attention_mask"] = list(spectrograms.token_mask(self.config, frames).numpy())
            return {**arrays, "labels": np.asarray(batch[label])}

        raw = media.structs(dataset.select_columns([column, label]), column)
        encoded = encode_arrays(raw, rows, most_bytes=self.most_bytes, fixed=False)
        if cut:
            self._note(f"{split}: {cut} of {len(dataset)} sounds cut to {self.max_seconds:g} s")
        return encoded

    @cached_property
    def collator(self) -> Collator:
        name = self.processor.model_input_names[0]
        return Pad({name: self.processor.padding_value})
