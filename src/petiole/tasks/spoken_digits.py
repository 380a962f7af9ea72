"""Spoken digits of speakers that pre-training never heard: a small spectrogram transformer, and few labels of each of them.

    folder, data = spoken_digits("data/audio/fsdd", "cache", shots=5)
    task = prepare(data, folder)                      # and task.build_model(), task.encoded("train") as for any other

The first call trains the model on the other speakers, in one to two minutes on one core; later ones find its folder in the cache.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from petiole.errors import ConfigError, DataError
from petiole.tasks import media
from petiole.tasks.base import prepare
from petiole.tasks.data import TaskData, load_data
from petiole.tasks.models import seeded
from petiole.tasks.quiet import quiet
from petiole.tasks.spectrograms import SpecAugment

RATE, FRAMES, BINS = 8000, 64, 32  # frames of 20 ms: 1.3 s
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256, "patch_size": 8, "frequency_stride": 8,
    "time_stride": 8, "num_mel_bins": BINS, "max_length": FRAMES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
EPOCHS, BATCH, RATE_OF_LEARNING = 20, 32, 1e-3


def spoken_digits(
    source: str | Path,
    cache: str | Path,
    *,
    unseen: Sequence[str] = ("lucas", "yweweler"),
    shots: int = 5,
    validation: int = 10,
    seed: int = 0,
    pretraining_seed: int = 0,
    epochs: int = EPOCHS,
) -> tuple[Path, TaskData]:
    """A pre-trained model, and the digits of other speakers than it was trained on.

    Args:
        source: of clips with a `label` and a `speaker`, as `load_data` takes it; its splits are joined.
        cache: folder for the model. A second call with the same clips, speakers, seed and epochs reads it from there.
        unseen: speakers whose clips are the data; the model is trained on all others.
        shots: training clips of each digit of each of them. validation: the same, of the validation split. The rest is the test split.
        seed: of that draw. pretraining_seed: of the model. epochs: of its training.

    Returns:
        The model's folder, with weights, configuration and feature extractor; and the data. The model's own classes are words, those of the
        data numerals, so that a task draws a fresh head.

    Raises:
        DataError: there is no such speaker, or there are too few clips. ConfigError: a number is out of range.
    """
    if shots < 1 or validation < 1 or epochs < 1:
        raise ConfigError(f"shots = {shots}, validation = {validation}, epochs = {epochs}: at least 1 each")
    data = joined(load_data(source, task="audio-classification", validation_fraction=0))
    speakers = np.array(data.train["speaker"])
    missing = sorted(set(unseen) - set(speakers))
    if missing or set(speakers) <= set(unseen):
        raise DataError(
            f"{data.source}: unseen = {tuple(unseen)}, but its speakers are {', '.join(sorted(set(speakers)))}; one has to be left to train on"
        )
    heard = data.train.select(np.flatnonzero(~np.isin(speakers, unseen)))
    folder = pretrained(replace(data, train=heard), Path(cache), pretraining_seed, epochs)
    rng, parts = np.random.default_rng(seed), ([], [], [])  # type: ignore[var-annotated]
    labels = np.array(data.train["label"])
    for speaker in unseen:
        for digit in range(len(data.label_names)):
            rows = rng.permutation(np.flatnonzero((speakers == speaker) & (labels == digit)))
            if len(rows) <= shots + validation:
                raise DataError(
                    f"{data.source}: {len(rows)} clips of {digit} by {speaker}; shots + validation = {shots + validation}, and none is left to test"
                )
            for part, some in zip(parts, np.split(rows, [shots, shots + validation]), strict=True):
                part.extend(some.tolist())
    train, held_out, test = (data.train.select(sorted(part)) for part in parts)
    return folder, replace(data, train=train, validation=held_out, test=test, seed=seed)


def joined(data: TaskData) -> TaskData:
    """All splits as one, the train split."""
    from datasets import concatenate_datasets

    return replace(data, train=concatenate_datasets(list(data.splits.values())), validation=None, test=None)


def pretrained(data: TaskData, cache: Path, seed: int, epochs: int) -> Path:
    """The folder of a model trained on these clips, from the cache if it is there."""
    about = {"sizes": SIZES, "seed": seed, "epochs": epochs, "batch": BATCH, "rate": RATE_OF_LEARNING}
    mark = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for value in media.structs(data.train, data.columns["audio"])[data.columns["audio"]]:
        mark.update(hashlib.sha256(value["bytes"] or Path(value["path"]).read_bytes()).digest())
    folder = cache / f"ast-spoken-digits-{mark.hexdigest()[:12]}"
    if (folder / "config.json").is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=cache))
    try:
        with quiet():
            draw(data, part, seed)
            fit(data, part, seed, epochs)
        if not folder.exists():  # another process may have been faster
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def draw(data: TaskData, folder: Path, seed: int) -> None:
    """An untrained model, with an extractor that normalises by the mean and deviation of these clips."""
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

    config = ASTConfig(**SIZES, id2label=dict(enumerate(WORDS)), label2id={word: i for i, word in enumerate(WORDS)})
    with seeded(seed):
        model = ASTForAudioClassification(config)
    options = {"sampling_rate": RATE, "num_mel_bins": BINS, "max_length": FRAMES}
    ASTFeatureExtractor(**options, do_normalize=False).save_pretrained(folder)
    model.save_pretrained(folder)
    x = torch.stack([row["input_values"] for row in prepare(data, folder).encoded("train")])
    real = x[(x != 0).any(-1)]
    ASTFeatureExtractor(**options, mean=float(real.mean()), std=float(real.std())).save_pretrained(folder)


def fit(data: TaskData, folder: Path, seed: int, epochs: int) -> None:
    """Train the model in a folder on the train split: AdamW, one cycle, SpecAugment."""
    task = prepare(replace(data, label_names=WORDS), folder)
    model: nn.Module = task.build_model(head="keep")
    encoded = task.encoded("train")
    rows: Any = [encoded[i] for i in range(len(encoded))]
    collator = SpecAugment(task.collator, frequencies=BINS // 4, frames=FRAMES // 8, seed=seed)
    loader: Any = DataLoader(
        rows, BATCH, shuffle=True, collate_fn=collator, generator=torch.Generator().manual_seed(seed)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE_OF_LEARNING, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE_OF_LEARNING, total_steps=epochs * len(loader))
    model.train()
    for _ in range(epochs):
        for batch in loader:
            model(**batch).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval().save_pretrained(folder)  # type: ignore[operator]


__all__ = ["spoken_digits"]
