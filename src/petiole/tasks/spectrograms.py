"""What models of spectrograms need around them: which tokens are padding, SpecAugment, another length than the pre-trained one.

A spectrogram is (frames, bins). Its patches are tokens in the order of frequency first, time running fastest within, after the special ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from petiole.errors import ConfigError
from petiole.tasks.loop import Collator

SPECIAL = 2  # tokens in front of the patches of an audio spectrogram transformer: class and distillation


def grid(config: Any, frames: int | None = None) -> tuple[int, int]:
    """Patches along frequency and along time, of a spectrogram of so many frames; of the configured length if None."""
    frames = config.max_length if frames is None else frames
    bins = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
    return bins, (frames - config.patch_size) // config.time_stride + 1


def frames_of(spectrogram: Tensor) -> int:
    """Frames (T, bins) in front of the padding: what repeats one constant up to the end; at least one."""
    last = spectrogram[-1, 0]
    real = (spectrogram != last).any(-1).nonzero()
    return int(real[-1]) + 1 if len(real) else 1


def token_mask(config: Any, frames: Sequence[int] | Tensor) -> Tensor:
    """Frames of each sound (B,) -> which tokens hold any of it (B, special ones + patches), as `attention_mask` for the model."""
    bins, times = grid(config)
    starts = torch.arange(times) * config.time_stride
    real = starts < torch.as_tensor(frames)[:, None]  # (B, times)
    special = torch.ones(len(real), SPECIAL, dtype=torch.bool)
    return torch.cat([special, real.repeat(1, bins)], 1).long()


def fit_length(model: nn.Module, frames: int) -> None:
    """Bring a spectrogram transformer's position embeddings to another number of frames, IN PLACE, before anything is attached.

    Fewer patches along time keep the middle ones, more are interpolated. Frequencies and special tokens stay as they are.

    Raises:
        ConfigError: it is no such model, or so few frames hold no patch.
    """
    config: Any = getattr(model, "config", None)
    owner: Any = next(
        (m for m in model.modules() if isinstance(getattr(m, "position_embeddings", None), nn.Parameter)), None
    )
    if owner is None or not hasattr(config, "time_stride"):
        raise ConfigError(f"{type(model).__name__} has no position embeddings of the patches of a spectrogram")
    if frames < config.patch_size:
        raise ConfigError(f"frames = {frames}: at least {config.patch_size}, the size of a patch")
    old: Tensor = owner.position_embeddings.detach()
    (bins, before), (_, after) = grid(config), grid(config, frames)
    table = old[:, SPECIAL:].unflatten(1, (bins, before)).permute(0, 3, 1, 2)  # (1, d, bins, before)
    if after <= before:
        start = (before - after) // 2
        table = table[..., start : start + after]
    else:
        table = nn.functional.interpolate(table, (bins, after), mode="bilinear", align_corners=False)
    new = torch.cat([old[:, :SPECIAL], table.permute(0, 2, 3, 1).flatten(1, 2)], 1)
    owner.position_embeddings = nn.Parameter(new.contiguous(), owner.position_embeddings.requires_grad)
    config.max_length = frames


class SpecAugment:
    """A collator that hides a band of frequencies and a stretch of time in each spectrogram: arXiv 1904.08779. For training alone.

    Args:
        collator: of the task.
        frequencies, frames: widest band and longest stretch; widths and places are drawn evenly. seed: of what is drawn.
        key: of the spectrograms (B, T, bins) in a batch. fill: what stands there instead, the mean of normalised features.
    """

    def __init__(
        self,
        collator: Collator,
        *,
        frequencies: int,
        frames: int,
        seed: int = 0,
        key: str = "input_values",
        fill: float = 0.0,
    ) -> None:
        if frequencies < 0 or frames < 0:
            raise ConfigError(f"frequencies = {frequencies}, frames = {frames}: widths are at least 0")
        self.collator, self.widths, self.key, self.fill = collator, (frames, frequencies), key, fill
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = self.collator(rows)
        x = batch[self.key]
        for axis, width in zip((1, 2), self.widths, strict=True):
            drawn = torch.rand(2, len(x), 1, generator=self.generator)
            width_ = (drawn[0] * (min(width, x.shape[axis]) + 1)).floor()
            start = (drawn[1] * (x.shape[axis] - width_ + 1)).floor()
            place = torch.arange(x.shape[axis])[None]
            hidden = (place >= start) & (place < start + width_)
            x = x.masked_fill(hidden.unsqueeze(3 - axis), self.fill)
        return {**batch, self.key: x}
